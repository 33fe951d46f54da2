"""What a run measures: running statistics without stalls, and where they are written.

Dimensions: B batch, C classes.
"""

import json
import math
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from experiments.distributed import World
from experiments.files import write_atomically

METRICS_FILE = "metrics.jsonl"
TENSORBOARD_FOLDER = "tensorboard"

# tokenmixup gives these as means over the easy samples of a batch
_PER_EASY_SAMPLE = ("tokens_mixed", "saliency_difference_mean")


class RunningStatistics:
    """Means, minima and maxima of 0-d tensors over steps, kept on their device.

    A name that ends in `_min` or `_max` gives the smallest or largest value of any step; a mean
    over easy samples counts each step by its share of easy samples; all others give the mean.
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
        if not self.steps:
            self._names = names
            self._sums, self._low, self._high = scaled, stacked, stacked
        else:
            assert names == self._names, "a step has other statistics than the one before"
            self._sums = self._sums + scaled
            self._low = torch.minimum(self._low, stacked)
            self._high = torch.maximum(self._high, stacked)
        self.steps += 1

    def read(self, world: World) -> dict[str, float]:
        """The values so far, over all processes, in one exchange with the device; then anew."""
        if not self.steps:
            return {}
        total = world.sum(self._sums.clone())
        extremes = world.minimum(torch.stack((self._low, -self._high)))
        rows = torch.cat((total.unsqueeze(0), extremes)).tolist()
        sums, low, minus_high = (dict(zip(self._names, row, strict=True)) for row in rows)
        result = {}
        for name in self._names:
            if name.endswith("_min"):
                result[name] = low[name]
            elif name.endswith("_max"):
                result[name] = -minus_high[name]
            elif _weight_of(name) in sums:
                easy = sums[_weight_of(name)]
                result[name] = sums[name] / easy if easy else 0.0
            else:
                result[name] = sums[name] / (self.steps * world.size)
        self.steps = 0
        return result


def _weight_of(name: str) -> str:
    """The name of the share of samples over which a value is a mean, or ""."""
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
        """Leave out what happened since the last step, such as an evaluation."""
        self._start = self._last = time.perf_counter()

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
    """Writes rows of values to `metrics.jsonl` and to TensorBoard.

    Rows later than `resume_step` are what an interrupted run did after its last checkpoint: they
    are taken out, since the same steps are about to be run again.
    """

    def __init__(self, folder: Path, resume_step: int, tensorboard: bool) -> None:
        self.path = folder / METRICS_FILE
        rows = [row for row in read_metrics(folder) if row["step"] <= resume_step]
        write_atomically(self.path, "".join(_json_line(row) for row in rows).encode())
        self._file = self.path.open("a", encoding="utf-8")
        self._writer: Any = None
        if tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # steps from the purge on are hidden where an earlier writer has them already
            self._writer = SummaryWriter(
                str(folder / TENSORBOARD_FOLDER), purge_step=resume_step + 1
            )

    def write(self, split: str, epoch: int, step: int, values: dict[str, float]) -> None:
        """Add one row: after `step` optimiser steps, within `epoch` (both counted from 1)."""
        self._file.write(_json_line({"split": split, "epoch": epoch, "step": step, **values}))
        self._file.flush()
        if self._writer is not None:
            for name, value in values.items():
                self._writer.add_scalar(f"{split}/{name}", value, step)

    def close(self) -> None:
        """Finish writing."""
        self._file.close()
        if self._writer is not None:
            self._writer.close()


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
                raise ValueError(f"{path}, line {number}: is not JSON") from None
    return rows


def mean_of_rows(rows: list[dict[str, Any]]) -> dict[str, float]:
    """Means over rows, each counted by its number of steps; means over easy samples by these."""
    names = [name for name, value in rows[0].items() if isinstance(value, int | float)]
    result = {}
    for name in names:
        weights = [row["steps"] * row.get(_weight_of(name), 1.0) for row in rows]
        total = sum(weight * row[name] for weight, row in zip(weights, rows, strict=True))
        result[name] = total / sum(weights) if sum(weights) else 0.0
    return result


def _json_line(row: dict[str, Any]) -> str:
    # JSON has no NaN and no infinity
    finite = {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }
    return json.dumps(finite) + "\n"
