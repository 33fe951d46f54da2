"""Row 11: the cost of a second process, with gloo on this machine's CPU cores.

Each process has one thread and its own batch. Three ways are timed in turn: one process alone while
the other waits; both side by side, without communication; both together, with averaged gradients.
The first against the second shows what the processes take from each other (memory, caches, clock),
the second against the third what their communication costs.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch

from benchmarks import row
from benchmarks.row import Row, Settings, Target
from benchmarks.steps import Steps, Workload
from benchmarks.timing import interleaved, milliseconds, ratio, recorded, times
from experiments.documents.markdown import aligned_table
from experiments.training.distributed import World, joined_world

WORKLOAD = Workload("CCT-7/3×1", 16)
VARIANTS = ("plain", "HVTM")
PROCESSES = 2
WAYS = ("alone", "side by side", "together")
_TIMEOUT_MINUTES = 5.0


def measure(settings: Settings) -> dict[str, Any]:
    """Steps of the plain model and of HTM with VTM, in one process and in two."""
    workload = Workload(WORKLOAD.model, 4, quick=True) if settings.quick else WORKLOAD
    rounds, port = settings.rounds(7), _free_port()
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(PROCESSES, mp_context=context) as pool:
        processes = [
            pool.submit(_process, rank, workload, rounds, port) for rank in range(PROCESSES)
        ]
        found, *_ = [process.result() for process in processes]
    return {
        "model": workload.model,
        "batch": workload.batch,
        "processes": PROCESSES,
        "variants": found,
    }


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def _process(rank: int, workload: Workload, rounds: int, port: int) -> dict[str, Any]:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(PROCESSES),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    with joined_world("cpu", _TIMEOUT_MINUTES) as world:
        return {variant: _variant(workload, variant, world, rounds) for variant in VARIANTS}


def _variant(workload: Workload, variant: str, world: World, rounds: int) -> dict[str, Any]:
    alone, together = Steps(workload, variant), Steps(workload, variant, world)
    actions: dict[str, Callable[[], object]] = {
        "alone": alone if world.is_main else lambda: None,
        "side by side": alone,
        "together": together,
    }
    # the barrier makes the slowest process count
    timings = interleaved(actions, rounds, synchronise=torch.distributed.barrier)
    return {
        "steps": recorded(timings),
        "efficiency": ratio(timings["alone"], timings["together"]),
        "of_the_exchange": ratio(timings["side by side"], timings["together"]),
    }


def tables(values: dict[str, Any]) -> str:
    """One line per variant."""
    rows = [
        [
            variant,
            *(milliseconds(found["steps"][way]) for way in WAYS),
            times(found["efficiency"]),
            times(found["of_the_exchange"]),
        ]
        for variant, found in values["variants"].items()
    ]
    head = (
        *("step", "alone (ms)", "side by side (ms)", "together (ms)"),
        *("efficiency, alone / together (95%)", "of the exchange, side by side / together"),
    )
    text = (
        f"\n{values['model']}, {values['processes']} processes of one thread with "
        f"{values['batch']} images each, gloo.\n"
    )
    return aligned_table(head, rows, range(1, 6)) + text


def targets(values: dict[str, Any]) -> list[Target]:
    """TokenMixup must not scale worse than the plain model."""
    plain, both = (values["variants"][name]["efficiency"] for name in VARIANTS)
    return [
        Target(
            f"11. efficiency of {values['processes']} processes, HTM + VTM",
            "measured; not below plain's interval",
            f"{times(both)}; plain {times(plain)}",
            both["high"] >= plain["low"],
        )
    ]


ROW = Row("scaling", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(row.main(ROW))
