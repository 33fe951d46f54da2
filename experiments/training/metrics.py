"""What a run measures: running statistics without stalls, and where they are written.

Dimensions: B batch, C classes.
"""

import json
import math
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.errors import DataError
from experiments.files import write_atomically
from experiments.training.distributed import World

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

CLOCK_VALUES = ("time", "step_seconds", "data_seconds", "images_per_second")
"""Values of a row that a clock gives; all others are the same whenever a run is repeated."""
_PLACE_OF_A_ROW = ("split", "epoch", "step", "time")

# tokenmixup gives these as means over the easy samples of a batch
_PER_EASY_SAMPLE = ("tokens_mixed", "saliency_difference_mean")
# steps of fp16 whose gradient overflowed have no norm
_PER_FINITE_STEP = "gradient_norm"


class RunningStatistics:
    """Means, minima and maxima of 0-d tensors over steps, kept on their device.

    A name that ends in `_min` or `_max` gives the smallest or largest value of any step; a mean
    over easy samples counts each step by its share of easy samples, the norm of the gradient by
    whether it was finite, where that is told; all others give the mean.

    Whether there are names is the same in all processes, and decides whether they exchange values.
    """

    def __init__(self) -> None:
        self.steps = 0
        self._names: list[str] = []
        self._sums = self._low = self._high = torch.empty(0)

    def add(self, values: dict[str, Tensor]) -> None:
        """Take in the values of one step; every step has the same names."""
        names = sorted(values)
        stacked = torch.stack([values[name].float() for name in names])
        one = torch.ones((), device=stacked.device)
        scaled = stacked * torch.stack([values.get(_weight_of(name), one) for name in names])
        if not self._names:
            self._names = names
            self._sums, self._low, self._high = scaled, stacked, stacked
        else:
            assert names == self._names, "a step has other statistics than the one before"
            self._sums = self._sums + scaled
            self._low = torch.minimum(self._low, stacked)
            self._high = torch.maximum(self._high, stacked)
        self.steps += 1

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint in the middle of an interval keeps of it."""
        values = {
            name: rows.tolist()  # float32 as Python's floats: exact, and back again
            for name, rows in (("sums", self._sums), ("low", self._low), ("high", self._high))
        }
        return {"steps": self.steps, "names": self._names, **values}

    def load_state_dicts(
        self, states: list[dict[str, Any]], device: torch.device, mine: bool = True
    ) -> None:
        """Go on from what `state_dict` gave, in one process or in several together.

        Args:
            states: of the processes.
            device: where the values go.
            mine: whether to count them here; else the names alone are taken over.
        """
        states = [state for state in states if state["names"]]
        self.steps = sum(state["steps"] for state in states) if mine else 0
        self._names = []
        if not states:
            return
        self._names = list(states[0]["names"])
        sums, low, high = (
            torch.tensor([state[name] for state in states], dtype=torch.float32, device=device)
            for name in ("sums", "low", "high")
        )
        self._sums, self._low, self._high = sums.sum(0), low.amin(0), high.amax(0)
        if not mine:
            self._sums = torch.zeros_like(self._sums)
            self._low = torch.full_like(self._low, math.inf)
            self._high = -self._low

    def read(self, world: World) -> dict[str, float]:
        """The values so far, over all processes, in one exchange with the device; then anew."""
        if not self._names:
            return {}
        count = self._sums.new_tensor([self.steps])
        *totals, steps = world.sum(torch.cat((self._sums, count))).tolist()
        extremes = world.minimum(torch.stack((self._low, -self._high))).tolist()
        sums, low, minus_high = (
            dict(zip(self._names, row, strict=True)) for row in (totals, *extremes)
        )
        result = {}
        for name in self._names:
            if name.endswith("_min"):
                result[name] = low[name]
            elif name.endswith("_max"):
                result[name] = -minus_high[name]
            elif _weight_of(name) in sums:
                weight = sums[_weight_of(name)]
                result[name] = sums[name] / weight if weight else 0.0
            else:
                result[name] = sums[name] / steps
        self.steps, self._names = 0, []
        return result


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

    def got_data(self) -> None:
        """The batch of the next step has arrived."""
        self._waits.append(time.perf_counter() - self._last)

    def step_done(self) -> None:
        """The step's work has been given to the device."""
        now = time.perf_counter()
        self._steps.append(now - self._last)
        self._last = now

    def restart(self) -> None:
        """Leave out what happened since the last step, such as an evaluation or a checkpoint."""
        now = time.perf_counter()
        self._start += now - self._last
        self._last = now

    def read(self, images_per_step: int) -> dict[str, float]:
        """Medians of the interval, right after an exchange with the device; then start anew."""
        now = time.perf_counter()
        if not self._steps:
            return {}
        mean = (now - self._start) / len(self._steps)
        step = statistics.median(self._steps) if self._each_step else mean
        result = {
            "step_seconds": step,
            "data_seconds": statistics.median(self._waits),
            "images_per_second": images_per_step / mean,
        }
        self._steps, self._waits = [], []
        self._start = self._last = now
        return result


class Recorder:
    """Writes rows of values to `metrics.jsonl`, and shows the same in TensorBoard.

    A run that goes on keeps the first `rows` rows, which its checkpoint counted; later ones are
    what was done after it, and is about to be done again. TensorBoard's events are made anew from
    the rows then: those of a killed process may be missing, those of undone steps too many.
    """

    def __init__(self, folder: Path, rows: int, tensorboard: bool) -> None:
        self.path = folder / METRICS_FILE
        kept = read_metrics(folder)[:rows]
        self.missing = rows - len(kept)
        """Rows that the checkpoint counted and the file does not have."""
        self.rows = len(kept)
        write_atomically(self.path, "".join(_json_line(row) for row in kept).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            events = folder / TENSORBOARD_FOLDER
            for file in events.glob("events.out.tfevents.*"):
                file.unlink()
            self._writer = SummaryWriter(str(events))
            for row in kept:
                self._show(row)

    def write(self, split: str, epoch: int, step: int, values: dict[str, float]) -> None:
        """Add one row: after `step` optimiser steps, within `epoch` (both counted from 1)."""
        row = {"split": split, "epoch": epoch, "step": step, "time": time.time(), **values}
        self._file.write(_json_line(row))
        self._file.flush()
        self.rows += 1
        self._show(row)

    def to_disk(self) -> None:
        """Have the rows on the disk before a checkpoint counts them."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Finish writing."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()

    def _show(self, row: dict[str, Any]) -> None:
        if self._writer is None:
            return
        for name, value in row.items():
            if name not in _PLACE_OF_A_ROW:
                shown = math.nan if value is None else value
                self._writer.add_scalar(f"{row['split']}/{name}", shown, row["step"], row["time"])


def read_metrics(folder: Path) -> list[dict[str, Any]]:
    """The rows of a run's `metrics.jsonl`; a last line that was cut off is left out."""
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
                    "rows after it cannot be trusted: set it aside to go on without them"
                ) from None
    return rows


def mean_of_rows(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over rows, each counted by its number of steps; means over easy samples by these."""
    names = {name: None for row in rows for name, value in row.items() if _is_number(value)}
    result = {}
    for name in names:
        having = [row for row in rows if _is_number(row.get(name))]
        weights = [row["steps"] * row.get(_weight_of(name), 1.0) for row in having]
        total = sum(weight * row[name] for weight, row in zip(weights, having, strict=True))
        result[name] = total / sum(weights) if sum(weights) else 0.0
    return result


def _is_number(value: object) -> bool:
    return isinstance(value, int | float)


def _json_line(row: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite) + "\n"
