"""How far a run has come, what it measures without waiting for the device, and where that goes."""

import json
import math
import os
import statistics
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from experiments.errors import DataError, TrainingStopped
from experiments.files import write_atomically
from experiments.training.distributed import World

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

CLOCK_VALUES = ("time", "step_seconds", "data_seconds", "images_per_second")
"""Values of a row that a clock gives; all others are the same whenever a run is repeated."""
CHECKED = ("training loss", "ScoreNet's loss", "norm of the gradient")
"""What must be finite at each step."""

_PLACE_OF_A_ROW = ("split", "epoch", "step", "time")
_PER_EASY_SAMPLE = ("tokens_mixed", "label_share", "saliency_difference_mean")  # means over those
_PER_FINITE_STEP = "gradient_norm"  # steps that overflow in fp16 have none
_Batch = TypeVar("_Batch")


@dataclass
class Progress:
    """How far a run has come."""

    epochs_done: int = 0
    """Epochs that are trained and, where it is due, evaluated."""
    step: int = 0
    """Optimiser steps done; beyond `epochs_done` they belong to the current epoch."""
    skipped_steps: int = 0
    """Those of them that were left out, since something was not finite."""
    top1: float = -1.0
    best_top1: float = -1.0
    best_epoch: int = 0


class RunningStatistics:
    """What was measured since the last row of metrics, over all processes, kept on the device.

    A name that ends in `_min` or `_max` gives the smallest or largest value of any step; a mean
    over easy samples weights each step by its share of easy samples, and the norm of the gradient
    by whether it was finite, where `finite_share` tells; all others give the mean.

    All processes have the same names, and exchange values only if there are any.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._one = torch.ones(1, device=device)
        self._given: tuple[str, ...] = ()  # the names of the last step, in its own order
        self._restart()

    def _restart(self) -> None:
        self.steps = 0
        """Optimiser steps since the last row."""
        self._finite = torch.ones(len(CHECKED), dtype=torch.bool, device=self._device)
        self._good_steps = torch.zeros(len(CHECKED), device=self._device)  # before a bad one
        self._added = 0.0
        self._names: list[str] = []
        self._sums = self._low = self._high = torch.empty(0)

    def add_step(self, names: tuple[str, ...], parts: Sequence[Tensor], finite: Tensor) -> None:
        """Take in a step, without waiting for the device.

        Args:
            names: of the values.
            parts: (V,) float32 for each part of the batch.
            finite: (3,) bool, whether each of `CHECKED` was finite.
        """
        self.steps += 1
        self._finite = self._finite & finite
        self._good_steps = self._good_steps + self._finite
        if names != self._given:
            self._arrange(names)
        for values in parts:
            self._add(values)

    def add_skipped_step(self) -> None:
        """Count a step that was left out; its values are not part of any mean."""
        self.steps += 1
        self._good_steps = self._good_steps + 1

    def _arrange(self, names: tuple[str, ...]) -> None:
        """Note, in the names' sorted order, where a step's values are, and where their weights."""
        self._given, self._sorted = names, sorted(names)
        places = {name: place for place, name in enumerate(names)}
        weights = [places.get(_weight_of(name), len(names)) for name in self._sorted]
        rows = ([places[name] for name in self._sorted], weights)
        self._places = torch.tensor(rows, device=self._device)  # (2, V)

    def _add(self, values: Tensor) -> None:
        values, weights = torch.cat((values, self._one))[self._places]
        weighted = values * weights
        if not self._names:
            self._names = self._sorted
            self._sums, self._low, self._high = weighted, values, values
        else:
            assert self._sorted == self._names, "a step has other statistics than the one before"
            self._sums = self._sums + weighted
            self._low = torch.minimum(self._low, values)
            self._high = torch.maximum(self._high, values)
        self._added += 1

    def refuse_not_finite(self, world: World, progress: Progress) -> None:
        """Raise TrainingStopped where a value of these steps was not finite; in all processes."""
        good = [round(value) for value in world.minimum(self._good_steps.clone()).tolist()]
        first = min(good)
        if first < self.steps:
            name = CHECKED[good.index(first)]
            step, epoch = progress.step - self.steps + first + 1, progress.epochs_done + 1
            raise TrainingStopped(f"step {step} (epoch {epoch}): the {name} is not finite")

    def read(self, world: World) -> dict[str, float]:
        """The values so far, over all processes, in one exchange with the device; then restart."""
        values: dict[str, float] = {}
        if self._names:
            count = self._sums.new_tensor([self._added])
            *totals, parts = world.sum(torch.cat((self._sums, count))).tolist()
            extremes = world.minimum(torch.stack((self._low, -self._high))).tolist()
            sums, low, minus_high = (
                dict(zip(self._names, row, strict=True)) for row in (totals, *extremes)
            )
            for name in self._names:
                weight = sums.get(_weight_of(name), parts)
                if name.endswith("_min"):
                    values[name] = low[name]
                elif name.endswith("_max"):
                    values[name] = -minus_high[name]
                else:
                    values[name] = sums[name] / weight if weight else 0.0
        values["steps"] = self.steps
        self._restart()
        return values

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint between two rows keeps, once `refuse_not_finite` found nothing."""
        values = {
            name: tensor.tolist()  # float32 as Python's floats: exact, and back again
            for name, tensor in (("sums", self._sums), ("low", self._low), ("high", self._high))
        }
        return {"steps": self.steps, "added": self._added, "names": self._names, **values}

    def load_state_dicts(self, states: Sequence[dict[str, Any]], sharing: int = 1) -> None:
        """Continue from what `state_dict` gave in several processes, which made the same steps.

        Args:
            states: of the processes.
            sharing: how many processes load the same states; each takes on an equal part.
        """
        self._restart()
        self.steps = states[0]["steps"]
        self._good_steps = self._good_steps + self.steps
        states = [state for state in states if state["names"]]
        if not states:
            return
        self._names = list(states[0]["names"])
        sums, low, high = (
            torch.tensor([state[key] for state in states], dtype=torch.float32, device=self._device)
            for key in ("sums", "low", "high")
        )
        self._sums, self._low, self._high = sums.sum(0) / sharing, low.amin(0), high.amax(0)
        self._added = sum(state["added"] for state in states) / sharing


def _weight_of(name: str) -> str:
    """The name of the share of samples or steps over which a value is a mean, or ""."""
    if name == _PER_FINITE_STEP:
        return "finite_share"
    layer, _, leaf = name.rpartition("/")
    return f"{layer}/easy_share" if leaf in _PER_EASY_SAMPLE else ""


class StepTimer:
    """Seconds of each step, and those of them spent waiting for data.

    On a GPU the host runs ahead of the device, so only the time between two exchanges with it
    says how long a step takes; on a CPU each step is timed, and the median is robust.
    """

    def __init__(self, device: torch.device) -> None:
        self._each_step = device.type == "cpu"
        self._steps: list[float] = []
        self._waits: list[float] = []
        self._start = self._last = time.perf_counter()

    def batches(self, batches: Iterable[_Batch]) -> Iterator[_Batch]:
        """Pass batches on and time the wait for each.

        What the loop does between `step_done` and the next batch is not counted.
        """
        for batch in batches:
            self._waits.append(time.perf_counter() - self._last)
            yield batch
            now = time.perf_counter()
            self._start += now - self._last  # an evaluation, a checkpoint
            self._last = now

    def step_done(self) -> None:
        """The step's work has been given to the device."""
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._last = now

    def read(self, images_per_step: int) -> dict[str, float]:
        """Medians since the last call, right after an exchange with the device; then restart."""
        now = time.perf_counter()
        mean = (now - self._start) / len(self._steps)
        result = {
            "step_seconds": statistics.median(self._steps) if self._each_step else mean,
            "data_seconds": statistics.median(self._waits),
            "images_per_second": images_per_step / mean,
        }
        self._steps, self._waits = [], []
        self._start = self._last = now
        return result


class MetricsWriter:
    """Writes rows of values to `metrics.jsonl` and shows them in TensorBoard.

    A resumed run keeps the first `rows` rows, which its checkpoint counted; the steps of later
    ones will be repeated. TensorBoard's events are then written anew from the rows, since a killed
    process may have written too few or too many.
    """

    def __init__(self, folder: Path, rows: int, tensorboard: bool) -> None:
        path = folder / METRICS_FILE
        kept = read_metrics(folder)[:rows]
        self.rows = len(kept)
        self._kept = kept
        write_atomically(path, "".join(_json_line(row) for row in kept).encode())
        self._file = path.open("a", encoding="utf-8")
        self._board: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = folder / TENSORBOARD_FOLDER
            for file in events.glob("events.out.tfevents.*"):
                file.unlink()
            self._board = SummaryWriter(str(events))
            for row in kept:
                self._show(row)

    def write(self, split: str, progress: Progress, values: dict[str, float]) -> None:
        """Add one row, of the current epoch (counted from 1)."""
        epoch, step = progress.epochs_done + 1, progress.step
        row = {"split": split, "epoch": epoch, "step": step, "time": time.time(), **values}
        self._file.write(_json_line(row))
        self._file.flush()
        self.rows += 1
        if self._kept and self._kept[-1]["epoch"] != epoch:
            self._kept = []
        self._kept.append(row)
        self._show(row)

    def training_rows(self, epoch: int) -> list[dict[str, Any]]:
        """The rows of the training in the current epoch (counted from 1)."""
        return [row for row in self._kept if (row["split"], row["epoch"]) == ("train", epoch)]

    def flush_to_disk(self) -> None:
        """Have the rows on the disk before a checkpoint counts them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish writing."""
        self._file.close()
        if self._board is not None:
            self._board.close()

    def _show(self, row: dict[str, Any]) -> None:
        if self._board is None:
            return
        for name, value in row.items():
            if name not in _PLACE_OF_A_ROW:
                shown = math.nan if value is None else value
                self._board.add_scalar(f"{row['split']}/{name}", shown, row["step"], row["time"])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a last line that a crash cut off is left out."""
    path = folder / METRICS_FILE
    if not path.exists():
        return []
    rows = []
    lines = path.read_text(encoding="utf-8").splitlines()
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            if number < len(lines):
                raise DataError(
                    f"{path}, line {number}: is not JSON, so the file was damaged or edited; the "
                    "rows after it cannot be trusted: set it aside to continue without them"
                ) from None
    return rows


def mean_of_rows(rows: Iterable[dict[str, Any]]) -> dict[str, float]:
    """Means over rows, weighted by steps; means over easy samples by the easy samples as well."""
    totals: dict[str, tuple[float, float]] = {}
    for row in rows:
        for name, value in row.items():
            if isinstance(value, int | float):
                weight = row["steps"] * row.get(_weight_of(name), 1.0)
                total, weights = totals.get(name, (0, 0))
                totals[name] = (total + weight * value, weights + weight)
    return {name: total / weights if weights else 0.0 for name, (total, weights) in totals.items()}


def _json_line(row: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite) + "\n"
