"""Run folders side by side: a table, and training curves with bands over seeds.

Dimensions: P points of a curve, R runs.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from experiments.checkpoint import deciding_keys
from experiments.config.reading import load_config
from experiments.config.schema import as_plain
from experiments.documents import figures as style
from experiments.documents.figures import DASHES, GRID, SERIES
from experiments.documents.markdown import aligned_table
from experiments.errors import DataError
from experiments.files import write_atomically
from experiments.training.folder import CHECKPOINT_FOLDER, CONFIG_FILE, FINAL_WEIGHTS
from experiments.training.metrics import (
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    mean_of_rows,
    read_metrics,
)

CURVES, TABLE = "training_curves", "comparison"
_FREE_KEYS = ("seed", "device", "output")  # may differ between runs of one band
_COLUMNS, _ROW_INCHES = 3, 2.35
_POINTS_TO_MAGNIFY = 3
_LEGEND = (
    "Samples mixed and tokens mixed are means over the whole run as far as HTM is on (a study's "
    "page takes the last epoch); tokens mixed counts the tokens replaced in an easy sample."
)


@dataclass(frozen=True)
class History:
    """What one run has recorded in at least one evaluated epoch."""

    folder: Path
    seed: int
    experiment: str
    """Equal for runs that differ by their seed alone."""
    rows: list[dict[str, Any]]
    """The content of `metrics.jsonl`."""

    def split(self, name: str) -> list[dict[str, Any]]:
        """The rows of `train` or `validation`."""
        return [row for row in self.rows if row["split"] == name]


def read_history(folder: Path) -> History:
    """Read a run folder.

    Raises:
        DataError: it holds no run with a finished and evaluated epoch.
    """
    if not (folder / CONFIG_FILE).is_file():
        raise DataError(
            f"{folder}: holds no run (looked for {CONFIG_FILE}); give run folders that "
            "experiments.train has written"
        )
    config = as_plain(load_config(folder / CONFIG_FILE))
    keys = {k: v for k, v in deciding_keys(config).items() if k not in _FREE_KEYS}
    history = History(folder, config["seed"], repr(sorted(keys.items())), read_metrics(folder))
    if not history.split("train") or not history.split("validation"):
        raise DataError(
            f"{folder}: no epoch was finished and evaluated yet (looked for {METRICS_FILE}); train "
            "on, or leave it out"
        )
    return history


def names_of(folders: Sequence[Path]) -> list[str]:
    """Names that tell run folders apart: `HTM` and `VTM` of `.../HTM/seed1` and `.../VTM/seed1`.

    All folders differ.
    """
    paths = [folder.resolve() for folder in folders]
    names = [path.name for path in paths]
    if len(set(names)) == len(names):
        return names
    base = os.path.commonpath([path.parent for path in paths])
    parts = [path.relative_to(base).parts for path in paths]
    if len({len(part) for part in parts}) == 1:
        while len({part[-1] for part in parts}) == 1:
            parts = [part[:-1] for part in parts]
    return ["/".join(part) for part in parts]


def mean_over_layers(row: Mapping[str, Any], leaf: str) -> float | None:
    """Mean of a value over the layers that have it, such as `htm/layer3/LEAF`; None without."""
    named = (value for name, value in row.items() if name.rpartition("/")[2] == leaf)
    values = [value for value in named if value is not None]
    return sum(values) / len(values) if values else None


# The table


def compare(histories: list[History]) -> list[dict[str, Any]]:
    """The rows of `comparison.json`, one per run.

    `top1` is in per cent, after the last epoch. What HTM and VTM did are means over steps and
    layers, None in a run without. Times are not compared: the runs were trained at different times.
    """
    table: list[dict[str, Any]] = []
    names = names_of([history.folder for history in histories])
    for name, history in zip(names, histories, strict=True):
        train = history.split("train")
        means = mean_of_rows(train)
        table.append(
            {
                "name": name,
                "folder": str(history.folder),
                "top1": history.split("validation")[-1]["top1"],
                "mixed_share": mean_over_layers(means, "mixed_share"),
                "tokens_mixed": mean_over_layers(means, "tokens_mixed"),
                "tokens_remembered": mean_over_layers(means, "remembered_tokens"),
                "epochs": train[-1]["epoch"],
                "steps": train[-1]["step"],
            }
        )
    return table


def markdown(table: list[dict[str, Any]]) -> str:
    """The table in Markdown, aligned, so that it reads well on a terminal too."""
    columns = {  # title: key, format
        "top-1": ("top1", "{:.2f}%"),
        "samples mixed": ("mixed_share", "{:.1%}"),
        "tokens mixed": ("tokens_mixed", "{:.1f}"),
        "tokens remembered": ("tokens_remembered", "{:.0f}"),
    }
    cells = [
        ["-" if row[key] is None else form.format(row[key]) for key, form in columns.values()]
        for row in table
    ]
    rows = [[row["name"], *line] for row, line in zip(table, cells, strict=True)]
    legend = "" if all(row["mixed_share"] is None for row in table) else f"\n{_LEGEND}\n"
    return aligned_table(["run", *columns], rows, range(1, 1 + len(columns))) + legend


def paths_text(folders: list[Path]) -> str:
    """Where each run's checkpoints, weights and TensorBoard logs are."""
    lines = []
    for name, folder in zip(names_of(folders), folders, strict=True):
        lines.append(f"{name}:\n")
        for title, path in (
            ("checkpoints", folder / CHECKPOINT_FOLDER),
            ("final weights", folder / FINAL_WEIGHTS),
            ("TensorBoard logs", folder / TENSORBOARD_FOLDER),
        ):
            lines += [f"  {title:<17}{path}\n"] if path.exists() else []
    return "".join(lines)


def write_table(table: list[dict[str, Any]], output: Path) -> list[Path]:
    """Write the table as JSON and Markdown, and give both paths."""
    output.mkdir(parents=True, exist_ok=True)
    written = [output / f"{TABLE}.json", output / f"{TABLE}.md"]
    write_atomically(written[0], (json.dumps(table, indent=2) + "\n").encode())
    write_atomically(written[1], markdown(table).encode())
    return written


# Curves


@dataclass(frozen=True)
class Quantity:
    """What a curve shows."""

    title: str
    unit: str
    split: str
    leaf: str
    """Its name in a row of metrics, without a layer."""
    factor: float = 1.0

    def read(self, row: Mapping[str, Any]) -> float | None:
        """Its value in a row of metrics, mean over layers; None where the row has none."""
        if self.leaf == "tokens_mixed" and not mean_over_layers(row, "mixed_share"):
            return None  # no sample was mixed, so there is no mean
        mean = mean_over_layers(row, self.leaf)
        return None if mean is None else self.factor * mean


LOSS_UNIT = "cross-entropy (nats)"
TOP1 = Quantity("validation top-1", "correct images (%)", "validation", "top1")
QUANTITIES = (
    Quantity("training loss", LOSS_UNIT, "train", "loss"),
    Quantity("validation loss", LOSS_UNIT, "validation", "loss"),
    TOP1,
    Quantity("samples mixed by HTM", "training samples (%)", "train", "mixed_share", 100),
    Quantity("tokens mixed by HTM", "tokens per easy sample", "train", "tokens_mixed"),
)


@dataclass(frozen=True)
class Group:
    """Runs that differ by their seed alone."""

    label: str
    runs: list[History]


@dataclass(frozen=True)
class Band:
    """A quantity over training, at the steps that all runs of a group have."""

    epochs: np.ndarray
    """(P,), with fractions within an epoch."""
    mean: np.ndarray
    """(P,)."""
    deviation: np.ndarray | None
    """(P,) standard deviation over seeds (R - 1 in the denominator), None for a single run."""


def group_by_seed(histories: list[History]) -> list[Group]:
    """Group runs that differ by their seed alone, in the order in which they are given.

    Raises:
        DataError: two runs are the same experiment with the same seed.
    """
    experiments: dict[str, list[History]] = {}
    for history in histories:
        members = experiments.setdefault(history.experiment, [])
        for other in members:
            if other.seed == history.seed:
                raise DataError(
                    f"{history.folder} and {other.folder} are the same experiment with the same "
                    f"seed {history.seed}; give one of them"
                )
        members.append(history)
    folders = [history.folder for history in histories]
    names = dict(zip(folders, names_of(folders), strict=True))
    labels = [_label(members, names[members[0].folder]) for members in experiments.values()]
    groups = []
    for label, members in zip(labels, experiments.values(), strict=True):
        name = label if labels.count(label) == 1 else str(members[0].folder)
        count = f" ({len(members)} seeds)" if len(members) > 1 else ""
        groups.append(Group(name + count, members))
    return groups


def _label(runs: list[History], name: str) -> str:
    """The name of the first of them; without the seed where there are several."""
    if len(runs) == 1:
        return name
    return re.sub(rf"[-_. /]?(seed|s)?[-_. ]?{runs[0].seed}$", "", name) or name


def band(group: Group, quantity: Quantity) -> Band | None:
    """Mean and deviation of a quantity over a group; None where its runs share no step."""
    found = [
        {
            row["step"]: value
            for row in run.split(quantity.split)
            if (value := quantity.read(row)) is not None
        }
        for run in group.runs
    ]
    steps = sorted(set.intersection(*(set(values) for values in found)))
    if not steps:
        return None
    table = np.array([[values[step] for step in steps] for values in found])  # (R, P)
    deviation = table.std(axis=0, ddof=1) if len(table) > 1 else None
    last = group.runs[0].split("validation")[-1]
    epochs = np.array(steps) * last["epoch"] / last["step"]
    return Band(epochs, table.mean(axis=0), deviation)


def write_curves(groups: list[Group], output: Path) -> list[Path]:
    """Write the curves as PNG and SVG, and give both paths."""
    with style.house_style():
        return style.write(draw_curves(groups), output / CURVES, "training curves")


def draw_curves(groups: list[Group]) -> Figure:
    """One panel per quantity that any of the runs has."""
    panels = []
    for quantity in QUANTITIES:
        bands = [(number, band(group, quantity)) for number, group in enumerate(groups)]
        found = [(number, one) for number, one in bands if one is not None]
        if found:
            panels.append((quantity, found))
    rows = -(-len(panels) // _COLUMNS)
    figure = style.make_figure(_ROW_INCHES * rows + 1.05)
    axes = list(figure.subplots(rows, _COLUMNS, squeeze=False).flat)
    for axis, (quantity, found) in zip(axes, panels, strict=False):
        for number, one in found:
            _line(axis, one, number, groups[number].label)
        axis.set_title(quantity.title, fontsize=9, fontweight="bold", loc="left")
        axis.set(ylabel=quantity.unit, xlabel="epoch")
        axis.set_xlim(left=0)
        axis.xaxis.set_major_locator(MaxNLocator(5, integer=axis.get_xlim()[1] > 2))
        axis.grid(color=GRID, linewidth=0.6)
        axis.set_axisbelow(True)
        if quantity is TOP1:
            _magnify_the_end(axis, found)
    lines = {line.get_label(): line for axis in axes for line in axis.lines}
    handles = [lines[group.label] for group in groups]
    names = [f"{group.label}\n{last_top1(group)}" for group in groups]
    spare = axes[len(panels) :]
    for axis in spare:
        axis.axis("off")
    if spare:
        spare[0].legend(
            handles, names, loc="center left", fontsize=8.5, handlelength=3.2, labelspacing=0.9
        )
    else:
        axes[0].legend(handles, names, handlelength=3.2)
    several = any(len(group.runs) > 1 for group in groups)
    about = "Bands: mean ± one standard deviation over seeds. " if several else ""
    if len(panels) > 3:
        about += (
            "Tokens mixed: mean over the easy samples and the HTM layers. With HTM the training "
            "loss is that of mixed labels, so compare validation."
        )
    style.title(figure, "Training")
    style.small_print(figure, about.strip())
    return figure


def last_top1(group: Group) -> str:
    """Top-1 of a group after its last common epoch, in words."""
    one = band(group, TOP1)
    if one is None:
        return "no top-1 in common"
    spread = "" if one.deviation is None else f" ± {one.deviation[-1]:.2f}"
    return f"top-1 {one.mean[-1]:.2f}{spread}% after epoch {one.epochs[-1]:g}"


def _magnify_the_end(axis: Axes, found: list[tuple[int, Band]]) -> None:
    """The last third in a small panel: late differences are small beside the early descent."""
    last = max(one.epochs[-1] for _, one in found)
    if any((one.epochs >= 2 / 3 * last).sum() < _POINTS_TO_MAGNIFY for _, one in found):
        return
    inset = axis.inset_axes((0.52, 0.14, 0.47, 0.46))
    for number, one in found:
        _line(inset, one, number, start=2 / 3 * last)
    inset.tick_params(labelsize=6.5, length=2)
    inset.xaxis.set_major_locator(MaxNLocator(3, integer=True))
    inset.yaxis.set_major_locator(MaxNLocator(4))
    inset.grid(color=GRID, linewidth=0.6)


def _line(axis: Axes, one: Band, number: int, label: str = "", start: float = 0.0) -> None:
    """The part of a band from an epoch on."""
    colour, dash = SERIES[number % len(SERIES)], DASHES[number % len(DASHES)]
    kept = one.epochs >= start
    epochs, mean = one.epochs[kept], one.mean[kept]
    marker = "o" if len(epochs) == 1 else ""  # a line needs two
    axis.plot(epochs, mean, dash, marker=marker, color=colour, linewidth=1.5, label=label)
    if one.deviation is not None:
        edges = mean - one.deviation[kept], mean + one.deviation[kept]
        axis.fill_between(epochs, *edges, color=colour, alpha=0.22, linewidth=0)
