"""Training curves as numbers: what runs recorded, and its spread over seeds.

Dimensions: P points of a curve, R runs.
"""

import dataclasses
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from experiments.checkpoint import deciding_keys
from experiments.config import as_plain, load_config
from experiments.errors import DataError
from experiments.training.folder import CONFIG_FILE
from experiments.training.metrics import METRICS_FILE, read_metrics
from experiments.visualize.tables import mean_over_layers

TOP1 = "validation top-1"
_PLACE_OF_A_RUN = ("seed", "device")  # what may differ between runs of one band


@dataclass(frozen=True)
class Quantity:
    """What a curve shows."""

    title: str
    unit: str
    split: str
    read: Callable[[dict[str, Any]], float | None]
    """Its value in a row of metrics, None where the row has none."""


def _of(name: str) -> Callable[[dict[str, Any]], float | None]:
    return lambda row: row.get(name)


def _over_layers(leaf: str, factor: float = 1.0) -> Callable[[dict[str, Any]], float | None]:
    def read(row: dict[str, Any]) -> float | None:
        values = {name: value for name, value in row.items() if value is not None}
        mean = mean_over_layers(values, leaf)
        return None if mean is None else factor * mean

    return read


def _tokens_mixed(row: dict[str, Any]) -> float | None:
    """None where no sample was mixed, of which there is no mean."""
    mixed = _over_layers("mixed_share")(row)
    return _over_layers("tokens_mixed")(row) if mixed else None


QUANTITIES = (
    Quantity("training loss", "cross-entropy (nats)", "train", _of("loss")),
    Quantity("validation loss", "cross-entropy (nats)", "validation", _of("loss")),
    Quantity(TOP1, "correct images (%)", "validation", _of("top1")),
    Quantity(
        "samples mixed by HTM", "training samples (%)", "train", _over_layers("mixed_share", 100)
    ),
    Quantity("tokens mixed by HTM", "tokens per easy sample", "train", _tokens_mixed),
)


@dataclass(frozen=True)
class Run:
    """One run folder."""

    folder: Path
    seed: int
    rows: list[dict[str, Any]]
    steps_per_epoch: float


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone."""

    label: str
    runs: list[Run]


@dataclass(frozen=True)
class Band:
    """A quantity over training, where all runs of a group have it."""

    epochs: np.ndarray
    """(P,), with fractions within an epoch."""
    mean: np.ndarray
    """(P,)."""
    deviation: np.ndarray | None
    """(P,) standard deviation over seeds (R - 1 in the denominator), None of a single run."""


def read_groups(folders: list[Path]) -> list[Group]:
    """Read runs, and put those together that differ only by their seed, in order of appearance.

    Raises:
        DataError: a folder holds no run with a finished and evaluated epoch, or two runs are the
            same experiment with the same seed.
    """
    runs: dict[str, list[Run]] = {}
    for folder in folders:
        config = as_plain(_config(folder))
        keys = deciding_keys(config)
        key = repr(sorted((k, v) for k, v in keys.items() if k not in _PLACE_OF_A_RUN))
        run = _read_run(folder, config["seed"])
        for other in runs.setdefault(key, []):
            if other.seed == run.seed:
                raise DataError(
                    f"{folder} and {other.folder} are the same experiment with the same seed "
                    f"{run.seed}; a band needs runs of different seeds: give one of the two"
                )
        runs[key].append(run)
    labels = [_label(members) for members in runs.values()]
    groups = []
    for label, members in zip(labels, runs.values(), strict=True):
        name = label if labels.count(label) == 1 else str(members[0].folder)
        count = f" ({len(members)} seeds)" if len(members) > 1 else ""
        groups.append(Group(name + count, members))
    return groups


def band(group: Group, quantity: Quantity) -> Band | None:
    """Mean and deviation of a quantity at the steps that every run of a group has; None without."""
    found = []
    for run in group.runs:
        values = {}
        for row in run.rows:
            value = quantity.read(row) if row["split"] == quantity.split else None
            if value is not None:
                values[row["step"]] = value
        found.append(values)
    steps = sorted(set.intersection(*(set(values) for values in found)))
    if not steps:
        return None
    table = np.array([[values[step] for step in steps] for values in found])  # (R, P)
    deviation = table.std(axis=0, ddof=1) if len(table) > 1 else None
    epochs = np.array(steps) / group.runs[0].steps_per_epoch
    return Band(epochs, table.mean(axis=0), deviation)


def _config(folder: Path) -> Any:
    path = folder / CONFIG_FILE
    if not path.is_file():
        raise DataError(
            f"{folder}: holds no run (looked for {CONFIG_FILE}); give run folders that "
            "experiments.train has written"
        )
    return dataclasses.replace(load_config(path), output=None)


def _read_run(folder: Path, seed: int) -> Run:
    rows = read_metrics(folder)
    evaluated = [row for row in rows if row["split"] == "validation"]
    if not evaluated:
        raise DataError(
            f"{folder}: no epoch was finished and evaluated yet (looked for {METRICS_FILE}); train "
            "on, or leave it out"
        )
    last = evaluated[-1]
    return Run(folder, seed, rows, last["step"] / last["epoch"])


def _label(runs: list[Run]) -> str:
    """The name of the first folder, without what tells one seed from another."""
    name = runs[0].folder.resolve().name
    if len(runs) == 1:
        return name
    return re.sub(rf"[-_. ]?(seed|s)?[-_. ]?{runs[0].seed}$", "", name) or name
