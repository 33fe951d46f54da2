"""Kill a training again and again, and check its result: `python -m benchmarks.faults`.

A training of the quickstart's small model, in one process and in two, is killed while it trains,
evaluates and writes a checkpoint, and resumed by the same command until it ends. Its final weights
and metrics must be the same bytes as without kills. The results go to `results/reliability` and
from there into `docs/reliability.md`. It takes about ten minutes on two cores.
"""

import functools
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import row
from benchmarks.row import Measurement, Row, Settings, Target
from experiments import cli
from experiments.documents.markdown import aligned_table
from experiments.provenance import ROOT
from experiments.training.metrics import CLOCK_VALUES, read_metrics

RESULTS = ROOT / "results" / "reliability"
STEPS, EPOCHS = 22, 3
"""Steps per epoch and epochs of the trainings."""
KILLS, QUICK_KILLS = 21, 3
KILLS_PER_TRAINING = 7
COMMAND = (
    *("-m", "experiments.train", "--config", str(ROOT / "configs" / "digits_HVTM.yaml")),
    *("--device", "cpu", "--data.batch_size", "64", "--schedule.epochs", str(EPOCHS)),
    *("--data.eval_batch_size", "16"),  # many batches, so that a kill can hit an evaluation
    *("--logging.evaluate_every", "1", "--logging.interval", "4", "--checkpoint.every_steps", "5"),
)
TRAINING, EVALUATION, CHECKPOINT = "training", "evaluation", "checkpoint"
PHASES = (TRAINING, EVALUATION, CHECKPOINT)


class Job:
    """One start of the training, which resumes from what its folder holds."""

    def __init__(self, folder: Path, processes: int) -> None:
        command = [sys.executable]
        if processes > 1:
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={processes}", "--max-restarts=0"]
        with folder.with_suffix(".log").open("ab") as log:
            self.process = subprocess.Popen(
                [*command, *COMMAND, "--output", str(folder)],
                cwd=ROOT,
                env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        self.folder = folder

    def signal_all(self, number: signal.Signals) -> None:
        """Send a signal to all its processes, torchrun first, so that it restarts none."""
        for pid in (self.process.pid, *_descendants(self.process.pid)):
            try:
                os.kill(pid, number)
            except ProcessLookupError:
                continue

    def kill(self, phase: str, step: int, chance: random.Random) -> bool:
        """Kill all processes in a phase at or after a step; False if the training ended before.

        The phase is read again while the processes are stopped, so that it is certain.
        """
        while self.process.poll() is None:
            now, done = place(self.folder)
            if now != phase or done < step:
                # a checkpoint takes milliseconds to write: look for one without a pause
                time.sleep(0 if phase == CHECKPOINT else 0.002)
                continue
            time.sleep(chance.uniform(0, 0.003 if phase == CHECKPOINT else 0.05))
            self.signal_all(signal.SIGSTOP)
            if place(self.folder)[0] == phase and self.process.poll() is None:
                self.signal_all(signal.SIGKILL)
                self.process.wait()
                return True
            self.signal_all(signal.SIGCONT)
        return False


def _descendants(pid: int) -> Iterator[int]:
    try:
        children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    except OSError:
        return
    for child in map(int, children):
        yield child
        yield from _descendants(child)


def place(folder: Path) -> tuple[str, int]:
    """The phase of a training and its recorded steps, from its files alone.

    While a checkpoint is written, its temporary file exists. An evaluation lies between the
    checkpoint at the end of an epoch and the metrics of the validation.
    """
    checkpoints = folder / "checkpoints"
    names = os.listdir(checkpoints) if checkpoints.exists() else []
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


def outcome(folder: Path, processes: int) -> tuple[str, list[dict[str, Any]]]:
    """Run to the end; the hash of the final weights, and the metrics without clock values.

    Raises:
        RuntimeError: the training failed, or a temporary file remains.
    """
    code = Job(folder, processes).process.wait()
    if code or list(folder.rglob("*.tmp")):
        raise RuntimeError(f"a training failed; see {folder.with_suffix('.log')}")
    weights = hashlib.sha256((folder / "final.safetensors").read_bytes()).hexdigest()
    rows = read_metrics(folder)
    return weights, [{k: v for k, v in r.items() if k not in CLOCK_VALUES} for r in rows]


def measure(processes: int, settings: Settings) -> dict[str, Any]:
    """Kill trainings at random moments; a kill survives if its training ends in the same bytes."""
    chance = random.Random(processes)
    left = settings.given_rounds or (QUICK_KILLS if settings.quick else KILLS)
    found: dict[str, Any] = {"processes": processes, "survived": 0, "total": 0}
    found["phases"] = dict.fromkeys(PHASES, 0)
    work = ROOT / "output"  # on a disk, unlike many folders for temporary files
    work.mkdir(exist_ok=True)
    folder = Path(tempfile.mkdtemp(dir=work, prefix="faults-"))
    wanted = outcome(folder / "undisturbed", processes)
    while left > 0:
        training = folder / f"killed-{left}"
        count = min(left, KILLS_PER_TRAINING)
        left -= count
        # the last evaluation ends the training, so every kill is due before the last epoch
        steps = sorted(chance.randrange(1, STEPS * (EPOCHS - 1)) for _ in range(count))
        done = 0
        for number, step in enumerate(steps):
            phase = PHASES[number % len(PHASES)]
            if Job(training, processes).kill(phase, step, chance):
                found["phases"][phase] += 1
                done += 1
                print(f"{processes} process(es): killed during {phase}", flush=True)
        same = outcome(training, processes) == wanted
        found["total"] += done
        found["survived"] += done if same else 0
        print(f"{processes} process(es): {'same bytes' if same else 'LOST'} after {done} kills")
        settings.keep(found)
    shutil.rmtree(folder)
    return found


def tables(values: dict[str, Any]) -> str:
    """The kills of one number of processes."""
    return aligned_table(_HEAD, [[*_kills(values), _SAME]], ())


def targets(values: dict[str, Any]) -> list[Target]:
    """Every kill survives, and every phase was hit."""
    what, measured = _kills(values)
    every = values["survived"] == values["total"] and all(values["phases"].values())
    return [Target(what, _SAME, measured, every)]


_HEAD = ("what", "measured", "promised")
_SAME = "all, final weights and metrics the same to the byte"
ROWS = tuple(
    Row(f"kills-{processes}", functools.partial(measure, processes), tables, targets)
    for processes in (1, 2)
)


def _kills(values: Mapping[str, Any]) -> tuple[str, str]:
    count = values["processes"]
    who = "one process" if count == 1 else f"{count} processes (gloo)"
    phases = ", ".join(f"{number} in {phase}" for phase, number in values["phases"].items())
    return (
        f"kill -9 of all processes at once, {who}",
        f"{values['survived']} of {values['total']} survived ({phases})",
    )


def page(found: Mapping[str, Measurement]) -> str:
    """The table of `docs/reliability.md`."""
    lines = []
    for name in (one.name for one in ROWS):
        if name in found:
            what, measured = _kills(found[name].values)
            good = targets(found[name].values)[0].reached
            lines.append([what, measured if good else f"{measured} **(not met)**", _SAME])
    return aligned_table(_HEAD, lines, ())


def main(argv: Sequence[str]) -> None:
    """Measure; exit with 1 unless every training survived its kills."""
    options = row.parser("python -m benchmarks.faults", __doc__).parse_args(argv)
    command = ["python -m benchmarks.faults", *argv]
    found = [target for one in ROWS for target in row.run(one, options, command, RESULTS)]
    if options.results is None and not options.quick:
        print("python -m benchmarks.report updates docs/reliability.md")
    if not all(target.reached for target in found):
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(cli.run(main))
