"""Row 11: what a second process costs, with gloo on this machine's CPU cores.

Each process has one thread and its own batch. Three things are timed in turn: one process alone
while the others wait; all of them side by side, without a word between them; all of them together,
with averaged gradients. The first against the second is what they take from each other (memory,
caches, clock), the second against the third what their exchange costs.
"""

import multiprocessing
import os
import socket
import sys
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import harness
from benchmarks.harness import Row, Settings, Target
from benchmarks.learners import Steps, Workload, make_learner
from benchmarks.timing import interleaved, ratio
from experiments.documents.markdown import aligned_table
from experiments.training.distributed import ONE_PROCESS, World, joined_world

WORKLOAD = Workload("CCT-7/3×1", 16)
VARIANTS = ("plain", "HVTM")
PROCESSES = 2
WAYS = ("alone", "side by side", "together")
_TIMEOUT_MINUTES = 5.0


def measure(settings: Settings) -> dict[str, Any]:
    """Steps of the plain model and of HTM with VTM, in one process and in two."""
    workload = Workload(WORKLOAD.model, 4, quick=True) if settings.quick else WORKLOAD
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (workload, settings.rounds(7), _free_port(), sender)
    processes = [
        context.Process(target=_process, args=(rank, *arguments)) for rank in range(PROCESSES)
    ]
    for process in processes:
        process.start()
    sender.close()
    try:
        found = receiver.recv()
    except EOFError:
        raise RuntimeError("a process of the benchmark ended before it had measured") from None
    finally:
        for process in processes:
            process.join()
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


def _process(rank: int, workload: Workload, rounds: int, port: int, sender: Any) -> None:
    torch.set_num_threads(1)
    os.environ.update(
        RANK=str(rank),
        WORLD_SIZE=str(PROCESSES),
        MASTER_ADDR="127.0.0.1",
        MASTER_PORT=str(port),
        GLOO_SOCKET_IFNAME="lo",
    )
    with joined_world("cpu", _TIMEOUT_MINUTES) as world:
        found = {variant: _variant(workload, variant, world, rounds) for variant in VARIANTS}
        if world.is_main:
            sender.send(found)


def _variant(workload: Workload, variant: str, world: World, rounds: int) -> dict[str, Any]:
    alone = Steps(workload, make_learner(workload, variant, ONE_PROCESS))
    together = Steps(workload, make_learner(workload, variant, world))
    actions: dict[str, Callable[[], object]] = {
        "alone": alone if world.is_main else lambda: None,
        "side by side": alone,
        "together": together,
    }
    # whoever is done waits for the others, so that the slowest counts
    timings = interleaved(actions, rounds, synchronise=torch.distributed.barrier)
    return {
        "steps": {way: timings[way].record() for way in WAYS},
        "efficiency": ratio(timings["alone"], timings["together"]),
        "of_the_exchange": ratio(timings["side by side"], timings["together"]),
    }


def tables(values: dict[str, Any]) -> str:
    """A line for each variant."""
    rows = [
        [
            variant,
            *(harness.milliseconds(found["steps"][way]) for way in WAYS),
            harness.times(found["efficiency"]),
            harness.times(found["of_the_exchange"]),
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
    """Nothing is to be reached but this: TokenMixup must not scale worse than the plain model."""
    plain, both = (values["variants"][name]["efficiency"] for name in VARIANTS)
    return [
        Target(
            f"11. efficiency of {values['processes']} processes, HTM + VTM",
            "measured; not below plain's interval",
            f"{harness.times(both)}; plain {harness.times(plain)}",
            both["high"] >= plain["low"],
        )
    ]


ROW = Row("scaling", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(harness.main(ROW))
