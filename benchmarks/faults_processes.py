"""Trainings as processes of their own, watched and ended from outside."""

import hashlib
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from experiments.provenance import ROOT
from experiments.training.folder import RunFolder
from experiments.training.metrics import CLOCK_VALUES, read_metrics

CONFIG = ROOT / "configs" / "digits_HVTM.yaml"
STEPS, EPOCHS = 22, 3
"""Of the runs that are killed: steps an epoch, and epochs."""
SETTINGS = {
    "device": "cpu",
    "data.batch_size": "64",
    "data.eval_batch_size": "16",  # many batches: an evaluation that lasts long enough to be hit
    "schedule.epochs": str(EPOCHS),
    "logging.evaluate_every": "1",
    "logging.interval": "4",
    "checkpoint.every_steps": "5",
}
TRAINING, EVALUATION, CHECKPOINT = "training", "evaluation", "checkpoint"
PHASES = (TRAINING, EVALUATION, CHECKPOINT)


class Job:
    """The same command each time: a training that goes on with what its folder holds."""

    def __init__(self, folder: Path, processes: int, **settings: str) -> None:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}", "--max-restarts=0"]
        command += ["-m", "experiments.train", "--config", str(CONFIG), "--output", str(folder)]
        for key, value in {**SETTINGS, **settings}.items():
            command += [f"--{key}", value]
        self.folder = folder
        self._log = folder.with_suffix(".log").open("ab")
        self.process = subprocess.Popen(
            command,
            cwd=ROOT,
            env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            stdout=self._log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )

    def running(self) -> bool:
        """Whether it has not ended."""
        return self.process.poll() is None

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to every process of it, torchrun first, so that it starts none again."""
        for pid in (self.process.pid, *_descendants(self.process.pid)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def wait(self) -> int:
        """Its exit code."""
        code = self.process.wait()
        self._log.close()
        return code


def _descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)


def place(folder: Path) -> tuple[str, int]:
    """What a run does and the steps it has recorded, told from its files alone.

    A checkpoint is being written where its temporary file lies beside the others. An evaluation
    lies between the last row of an epoch's training, once that is saved, and the row of validation.
    """
    try:
        names = os.listdir(folder / "checkpoints")
    except FileNotFoundError:
        names = []
    try:
        rows = read_metrics(folder)
    except ValueError:
        rows = []
    step = rows[-1]["step"] if rows else 0
    if any(name.endswith(".tmp") for name in names):
        return CHECKPOINT, step
    ended = bool(rows) and rows[-1]["split"] == "train" and step % STEPS == 0
    if ended and f"step-{step:08d}.pt" in names:
        return EVALUATION, step
    return TRAINING, step


def kill(job: Job, phase: str, step: int, chance: random.Random) -> str | None:
    """Wait for a phase at or after a step, and end every process at once, without a warning.

    The processes are stopped before it is looked where they are, so what is told is true; where
    they have left the phase by then, they go on, and the hunt too.

    Returns:
        The phase in which they were, or None where the run came to its end before.
    """
    while job.running():
        now, done = place(job.folder)
        if done < step or now != phase:
            # writing a checkpoint takes milliseconds: look without a rest
            time.sleep(0 if phase == CHECKPOINT else 0.002)
            continue
        time.sleep(chance.uniform(0, 0.003 if phase == CHECKPOINT else 0.05))
        job.signal_all(signal.SIGSTOP)
        now, _ = place(job.folder)
        if now == phase and job.running():
            job.signal_all(signal.SIGKILL)
            job.wait()
            return now
        job.signal_all(signal.SIGCONT)
    job.wait()
    return None


def outcome(folder: Path) -> tuple[str, list[dict[str, Any]]]:
    """A hash of the final weights, and the metrics without what a clock gives."""
    content = (folder / "final.safetensors").read_bytes()
    rows = [{k: v for k, v in row.items() if k not in CLOCK_VALUES} for row in read_metrics(folder)]
    return hashlib.sha256(content).hexdigest(), rows


def undisturbed(folder: Path, processes: int) -> tuple[str, list[dict[str, Any]]]:
    """What a run comes to that nobody disturbs."""
    code = Job(folder, processes).wait()
    assert code == 0, f"the undisturbed run failed: {folder.with_suffix('.log')}"
    return outcome(folder)


@dataclass
class Kills:
    """What came of the kills of one kind of run."""

    processes: int
    survived: int = 0
    total: int = 0
    phases: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PHASES, 0))


def measure_kills(folder: Path, processes: int, kills: int, runs: int, seed: int) -> Kills:
    """Kill runs at random moments, over and over, and let each go on to its end.

    A kill counts as survived where its run came to the same bytes and metrics as an undisturbed
    one, and nothing half written stays behind.
    """
    chance = random.Random(f"{seed} {processes}")
    wanted = undisturbed(folder / f"whole-{processes}", processes)
    result = Kills(processes)
    for number in range(runs):
        count = kills // runs + (number < kills % runs)
        run = folder / f"killed-{processes}-{number}"
        phases = [PHASES[(number + index) % len(PHASES)] for index in range(count)]
        chance.shuffle(phases)
        # the last validation ends the run: the last kills are due early enough to find each phase
        steps = sorted(chance.randrange(1, STEPS * (EPOCHS - 1)) for _ in phases)
        done = 0
        for phase, step in zip(phases, steps, strict=True):
            hit = kill(Job(run, processes), phase, step, chance)
            if hit is None:
                break
            done += 1
            result.phases[hit] += 1
            print(f"{processes} process(es), run {number + 1}: killed in {hit}", flush=True)
        while (code := Job(run, processes).wait()) == 75:
            pass
        clean = not list(run.rglob("*.tmp"))
        same = code == 0 and clean and outcome(run) == wanted
        result.total += done
        result.survived += done if same else 0
        print(f"  run {number + 1}: {'the same bytes' if same else 'LOST'} after {done} kills")
    print(f"{processes} process(es): survived {result.survived} of {result.total}", flush=True)
    return result


@dataclass
class Stops:
    """Seconds from SIGTERM on."""

    to_saved: list[float]
    to_exit: list[float]
    codes: list[int]
    same: bool


def measure_stops(folder: Path, count: int, seed: int) -> Stops:
    """Send SIGTERM at random moments; time until the checkpoint is on disk, and until the exit."""
    chance = random.Random(f"{seed} stops")
    wanted = undisturbed(folder / "whole-stops", 1)
    run = folder / "stopped"
    result = Stops([], [], [], False)
    for step in sorted(chance.sample(range(1, STEPS * (EPOCHS - 1)), count)):
        job = Job(run, 1)
        while job.running() and place(run)[1] < step:
            time.sleep(0.01)
        time.sleep(chance.uniform(0, 0.3))
        before = time.time()
        job.process.send_signal(signal.SIGTERM)
        code = job.wait()
        after = time.time()
        if code != 75:
            break  # it was at its end already
        saved = RunFolder(run).saved()[0].stat().st_mtime
        result.to_saved.append(round(max(saved - before, 0.0), 3))
        result.to_exit.append(round(after - before, 3))
        result.codes.append(code)
        print(f"SIGTERM: saved after {saved - before:.2f} s, ended after {after - before:.2f} s")
    result.same = Job(run, 1).wait() == 0 and outcome(run) == wanted
    return result
