"""One process or many: who this process is, and sums over all of them.

torchrun tells each process its place through the environment; without it there is one process.
"""

import gc
import os
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from experiments.errors import ConfigError

COLLECTIVE_TIMEOUT = timedelta(minutes=10)
"""A collective that waits longer than this ends the process: some other process is gone."""


@dataclass(frozen=True)
class World:
    """All processes of a run, and which of them this is."""

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process is the one that writes files and prints."""
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum of a tensor over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.SUM)
        return tensor

    def minimum(self, tensor: Tensor) -> Tensor:
        """Element-wise minimum over all processes, in place."""
        if self.size > 1:
            dist.all_reduce(tensor, dist.ReduceOp.MIN)
        return tensor

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """What stands inside is done by the main process before any other begins it."""
        if self.size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()


ONE_PROCESS = World(0, 1, torch.device("cpu"))
"""This process alone, on the CPU."""


@contextmanager
def joined_world(device: str) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end.

    Models must live in functions called from inside, so that they are gone when it ends.

    Args:
        device: cpu, cuda, or auto for cuda where there is one.

    Raises:
        ConfigError: the device is not there, or there are fewer of them than processes.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        dist.init_process_group("nccl", timeout=COLLECTIVE_TIMEOUT, device_id=chosen)
    else:
        dist.init_process_group("gloo", timeout=COLLECTIVE_TIMEOUT)
    try:
        yield World(rank, size, chosen)
    except BaseException as error:
        _forget_frames(error)
        raise
    finally:
        # A parallel model must go before the group: the group's threads wait for Python's lock when
        # the model, as the last to hold the group, takes the group with it, and the exit hangs.
        gc.collect()
        dist.destroy_process_group()


def _forget_frames(error: BaseException | None) -> None:
    """Let go of the local variables that the traceback of an error keeps alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


def one_process(device: str) -> World:
    """This process alone, on the device that a config asks for."""
    return World(0, 1, choose_device(device))


def choose_device(device: str) -> torch.device:
    """The device of this process: cpu, cuda, or auto for cuda where there is one.

    Raises:
        ConfigError: it is not there, or there are fewer of them than processes.
    """
    available = torch.cuda.is_available()
    if device == "cuda" and not available:
        raise ConfigError("device: got 'cuda', but torch finds no CUDA device; allowed: cpu, auto")
    if device == "cpu" or not available:
        return torch.device("cpu")
    wanted, found = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if wanted > found:
        raise ConfigError(
            f"device: {wanted} processes were started on this machine, and torch finds {found} "
            "CUDA devices; start at most so many processes (NPROC)"
        )
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
