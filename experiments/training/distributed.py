"""One process or many: who this process is, and sums over all of them.

torchrun tells each process its place through the environment; without it there is one process.
"""

import gc
import os
import re
import time
import traceback
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed
from torch import Tensor

from experiments.errors import ConfigError, ProcessLost

dist: Any = torch.distributed  # which does not say that it exports its stores

# what torch's backends say when another process does not answer; they have other errors as well
_BACKENDS = ("gloo", "nccl")
_SIGNS_OF_A_LOST_PROCESS = re.compile(
    r"timed out|timeout|abort|broken pipe|connection refused|connectfullmesh failed"
    r"|(closed|reset) by (remote )?peer|remote process exit|exit of a remote peer|socket closed"
)


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

    def from_main(self, number: int) -> int:
        """The number that the main process gives, in all processes."""
        if self.size == 1:
            return number
        tensor = torch.tensor(number)
        dist.broadcast(tensor, src=0)
        return int(tensor.item())

    def gather(self, plain: Any) -> list[Any]:
        """What each process gives, ordered by rank; empty outside the main process."""
        if self.size == 1:
            return [plain]
        gathered: list[Any] | None = [None] * self.size if self.is_main else None
        dist.gather_object(plain, gathered)
        return gathered or []

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The main process leaves the block before any other enters it."""
        if self.size > 1 and not self.is_main:
            dist.barrier()
        yield
        if self.size > 1 and self.is_main:
            dist.barrier()


class Agreement:
    """Whether any process wants something: the same answer in all of them.

    Each call of `ask` returns the answer to the call before it, which travels while the processes
    compute, so that no process waits. A single process gets its answer at once.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._underway: tuple[Any, torch.Tensor] | None = None

    def ask(self, wish: bool) -> bool:
        """Send this process's wish; every process asks equally often."""
        if self._world.size == 1:
            return wish
        answer = self.finish()
        votes = torch.tensor(float(wish))  # on the CPU, whatever the device
        self._underway = (dist.all_reduce(votes, dist.ReduceOp.MAX, async_op=True), votes)
        return answer

    def finish(self) -> bool:
        """Wait for the last answer; every process calls it before it leaves the group."""
        if self._underway is None:
            return False
        work, votes = self._underway
        self._underway = None
        work.wait()
        return bool(votes.item())


ONE_PROCESS = World(0, 1, torch.device("cpu"))
"""This process alone, on the CPU."""


@contextmanager
def joined_world(device: str, timeout_minutes: float) -> Iterator[World]:
    """Join the processes that torchrun started, and leave them at the end.

    Models must live in functions called from inside, so that they are gone when it ends.

    Args:
        device: cpu, cuda, or auto for cuda where there is one.
        timeout_minutes: how long a process waits for the others.

    Raises:
        ConfigError: the device is not there, or there are fewer of them than processes.
        ProcessLost: another process died or did not answer in time.
    """
    rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    chosen = choose_device(device)
    if size == 1:
        yield World(0, 1, chosen)
        return
    backend = "gloo"
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        # gloo as well: exchanges between hosts alone never wait for the device
        backend = "cpu:gloo,cuda:nccl"
    timeout = timedelta(minutes=timeout_minutes)
    with _lost_processes_told(rank, size, timeout_minutes):
        dist.init_process_group(
            backend,
            store=_fresh_store(rank, size, timeout),
            rank=rank,
            world_size=size,
            timeout=timeout,
            device_id=chosen if chosen.type == "cuda" else None,
        )
    try:
        with _lost_processes_told(rank, size, timeout_minutes):
            yield World(rank, size, chosen)
    finally:
        # A parallel model must be freed before the group: where the model frees the group, the
        # group's threads wait for Python's lock, and the exit hangs.
        gc.collect()
        dist.destroy_process_group()


def _fresh_store(rank: int, size: int, timeout: timedelta) -> Any:
    """Wait for the other processes of this start; gives a torch store without older entries.

    After a process has died, torchrun starts all of them again with the store that the dead ones
    used (pytorch issue 135712). Stale entries there, such as ports, make the new processes wait for
    dead ones until the timeout. torchrun has no name for a start that is the same on all machines,
    so the main process draws one and sends it to each process in answer to a word of its own.
    Messages from dead processes are acknowledged and dropped.

    Raises:
        RuntimeError: one of torch's (`DistError`): some did not come in time.
    """
    shared, _, _ = next(dist.rendezvous("env://", rank, size, timeout=timeout))
    meeting = dist.PrefixStore("tokenmixup", shared)
    if rank:
        word = uuid.uuid4().hex
        meeting.set(f"process {rank}", word)
        start = meeting.get(word).decode()
        meeting.add(start, 1)
        return dist.PrefixStore(start, shared)
    start, answered = uuid.uuid4().hex, set[str]()
    deadline = time.monotonic() + timeout.total_seconds()
    while meeting.add(start, 0) < size - 1:
        for other in range(1, size):
            word = meeting.get(f"process {other}").decode()
            if word not in answered:
                meeting.set(word, start)
                answered.add(word)
        if time.monotonic() > deadline:
            raise dist.DistStoreError(f"only some of the {size - 1} other processes joined in time")
        time.sleep(0.02)
    return dist.PrefixStore(start, shared)


@contextmanager
def _lost_processes_told(rank: int, size: int, timeout_minutes: float) -> Iterator[None]:
    try:
        yield
    except BaseException as error:
        _forget_frames(error)
        if isinstance(error, RuntimeError) and _tells_of_a_lost_process(error):
            reason = str(error).strip().splitlines()[0][:300]
            raise ProcessLost(
                f"process {rank} of {size}: another process is gone, or has not answered for "
                f"{timeout_minutes:g} minutes (timeout_minutes); torch says: {reason}"
            ) from None
        raise


def _tells_of_a_lost_process(error: RuntimeError) -> bool:
    if isinstance(error, dist.DistNetworkError | dist.DistStoreError):
        return True
    text = str(error).lower()
    of_a_backend = isinstance(error, dist.DistError) or any(name in text for name in _BACKENDS)
    return of_a_backend and _SIGNS_OF_A_LOST_PROCESS.search(text) is not None


def _forget_frames(error: BaseException | None) -> None:
    """Free the local variables, such as models, that the traceback of an error keeps alive."""
    while error is not None:
        traceback.clear_frames(error.__traceback__)
        error = error.__cause__ or error.__context__


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
