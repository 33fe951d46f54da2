"""What can be measured in this process: damaged files, the cost of checkpoints, leaks."""

import os
import random
import shutil
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.faults_processes import CONFIG, SETTINGS, Job, outcome, undisturbed
from experiments.config import load_config
from experiments.errors import SavedAndStopped
from experiments.training.distributed import ONE_PROCESS
from experiments.training.folder import RunFolder
from experiments.training.run import Run
from experiments.training.stopping import StopRequests


@dataclass
class Damages:
    """What came of damaged checkpoints."""

    detected: int
    recovered: int
    total: int
    truncated: int
    flipped: int
    continued: int
    """Runs that were really resumed, to the same bytes, after damage of either kind."""


def measure_damages(folder: Path, count: int, seed: int) -> Damages:
    """Cut or change the newest checkpoint at random places; the one before must be taken."""
    chance = random.Random(f"{seed} damages")
    whole = folder / "whole-damages"
    wanted = undisturbed(whole, 1)
    newest, before = RunFolder(whole).saved()[:2]
    content, size = newest.read_bytes(), newest.stat().st_size
    expected = before.read_bytes()
    result = Damages(0, 0, count, 0, 0, 0)
    for number in range(count):
        damaged = bytearray(content)
        if number % 2:
            del damaged[chance.randrange(size) :]
            result.truncated += 1
        else:
            damaged[chance.randrange(size)] ^= chance.randrange(1, 256)
            result.flipped += 1
        newest.write_bytes(damaged)
        told: list[str] = []
        saved = RunFolder(whole).newest_valid(told.append)
        result.detected += any(str(newest) in text and "damaged" in text for text in told)
        result.recovered += saved is not None and saved[0] == before
        newest.with_name(newest.name + ".damaged").unlink(missing_ok=True)
        assert before.read_bytes() == expected
        if number < 2:  # one of each kind is resumed
            run = folder / f"damaged-{number}"
            shutil.copytree(whole, run)
            (run / "checkpoints" / newest.name).write_bytes(damaged)
            (run / "final.safetensors").unlink()
            result.continued += Job(run, 1).wait() == 0 and outcome(run) == wanted
    print(f"damage: detected {result.detected}, recovered {result.recovered} of {count}")
    return result


@dataclass
class Cost:
    """Seconds of one run in this process."""

    epochs: int
    run_seconds: float
    checkpoint_seconds: float
    """Saving the state of the run after every epoch, and the best."""
    checkpoints: int

    @property
    def percent(self) -> float:
        """Of the time without them."""
        return 100 * self.checkpoint_seconds / (self.run_seconds - self.checkpoint_seconds)


class _Timed:
    """Counts the calls of a function and the time in them."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.function, self.seconds, self.calls = function, 0.0, 0

    def __call__(self, *arguments: Any, **keywords: Any) -> Any:
        start = time.perf_counter()
        try:
            return self.function(*arguments, **keywords)
        finally:
            self.seconds += time.perf_counter() - start
            self.calls += 1


def measure_cost(folder: Path, epochs: int) -> Cost:
    """Train the quickstart's model as it is, and time what saves it."""
    output = folder / "cost"
    overrides = {"schedule.epochs": str(epochs), "device": "cpu", "output": str(output)}
    run = Run(load_config(str(CONFIG), overrides), ONE_PROCESS)
    untyped: Any = run  # its methods are replaced by timed ones
    untyped._save = saving = _Timed(untyped._save)
    untyped.folder.save_best = best = _Timed(untyped.folder.save_best)
    start = time.perf_counter()
    run.fit()
    seconds = time.perf_counter() - start
    result = Cost(epochs, seconds, saving.seconds + best.seconds, saving.calls + best.calls)
    print(f"checkpoints: {result.percent:.2f}% of {seconds:.0f} s, {result.checkpoints} of them")
    return result


@dataclass
class Soak:
    """What grew over many cycles of going on and stopping, after a tenth of them for warming up."""

    cycles: int
    minutes: float
    resident_mib: tuple[float, float]
    """At the beginning and at the end, medians of a tenth each."""
    kib_a_cycle: float
    """Slope of the resident memory, least squares, over the second half."""
    files: tuple[int, int]
    threads: tuple[int, int]


class _OneStep(StopRequests):
    """Asks the run to stop as soon as it looks."""

    @property
    def reason(self) -> str | None:
        return "soak"


def measure_soak(folder: Path, cycles: int, minutes: float) -> Soak:
    """Go on, take one step, save, stop; over and over in this one process."""
    overrides = {
        **SETTINGS,
        "schedule.epochs": "5000",
        "schedule.warmup_epochs": "2",
        "logging.evaluate_every": "5000",
        "output": str(folder / "soak"),
    }
    config = load_config(str(CONFIG), overrides)
    samples: list[tuple[float, int, int]] = []
    start = time.monotonic()
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        while len(samples) < cycles and time.monotonic() - start < 60 * minutes:
            try:
                Run(config, ONE_PROCESS).fit(_OneStep())
            except SavedAndStopped:
                samples.append(_resources())
    memory, files, threads = (np.array(column) for column in zip(*samples, strict=True))
    tenth = max(1, len(samples) // 10)
    half = np.arange(len(samples) // 2, len(samples))
    slope = np.polyfit(half, memory[half], 1)[0] if len(half) > 1 else 0.0
    result = Soak(
        len(samples),
        (time.monotonic() - start) / 60,
        (float(np.median(memory[tenth : 2 * tenth])), float(np.median(memory[-tenth:]))),
        float(1024 * slope),
        (int(files[tenth]), int(files[-1])),
        (int(threads[tenth]), int(threads[-1])),
    )
    print(f"soak: {result}")
    return result


def _resources() -> tuple[float, int, int]:
    """Resident memory in MiB, open files, threads of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    files, threads = _count("fd"), _count("task")
    # the kernel lists a thread that was joined for a moment longer
    for _ in range(5):
        time.sleep(0.02)
        threads = min(threads, _count("task"))
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, files, threads


def _count(what: str) -> int:
    return len(os.listdir(f"/proc/self/{what}"))
