"""A study's picture: top-1 of every seed, and the differences with their intervals."""

from pathlib import Path
from typing import Any

import matplotlib

from experiments.files import atomic_file
from experiments.study.comparison import Comparison, other_of

matplotlib.use("Agg")  # files only: no window, no display

from matplotlib import pyplot as plt
from matplotlib.lines import Line2D

# Okabe and Ito's colours, which stay apart for colour-blind readers; shapes tell them apart as well
_SEED, _MEAN, _TO_PLAIN, _TO_OTHER = "#999999", "#000000", "#0072B2", "#D55E00"
_LINE_INCHES = 0.42
_WIDTH_INCHES = 9.5
_SETTINGS: Any = {"svg.hashsalt": "study", "svg.fonttype": "path", "font.size": 9}


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """Draw it as SVG and as PNG into a folder; gives both paths."""
    lines = comparison.lines
    height = 1.7 + _LINE_INCHES * len(lines)
    with plt.rc_context(_SETTINGS):
        figure, (left, right) = plt.subplots(
            1,
            2,
            sharey=True,
            figsize=(_WIDTH_INCHES, height),
            layout="constrained",
            width_ratios=(1.1, 1),
        )
        try:
            figure.patch.set_facecolor("white")  # legible on a dark page as well
            _draw_top1(left, comparison)
            _draw_differences(right, comparison)
            left.set_yticks(range(len(lines)), [_label(comparison, n) for n in range(len(lines))])
            left.set_ylim(len(lines) - 0.4, -0.6)
            figure.suptitle(_title(comparison), fontsize=11)
            paths = []
            for ending, metadata in (("svg", {"Date": None}), ("png", {"Software": None})):
                path = folder / f"study.{ending}"
                with atomic_file(path) as file:
                    figure.savefig(file, format=ending, dpi=130, metadata=metadata)
                paths.append(path)
        finally:
            plt.close(figure)
    return paths


def _title(comparison: Comparison) -> str:
    title = comparison.study.title
    done, wanted = len(comparison.records), comparison.wanted
    return title if done == wanted else f"{title} ({done} of {wanted} trainings)"


def _label(comparison: Comparison, number: int) -> str:
    line = comparison.lines[number]
    return f"{line.variant.name}  (n = {line.top1.count if line.top1 else 0})"


def _draw_top1(axes: Any, comparison: Comparison) -> None:
    for height, line in enumerate(comparison.lines):
        values = list(line.by_seed.values())
        # equal values stand below each other, so that every seed is seen
        heights = [height + 0.12 + 0.11 * values[:n].count(v) for n, v in enumerate(values)]
        axes.plot(values, heights, "o", color=_SEED, markersize=2.6, markeredgewidth=0)
        if line.top1 is not None:
            axes.errorbar(
                line.top1.mean, height - 0.08, xerr=line.top1.std, fmt="o", color=_MEAN, capsize=3
            )
    several = any(line.top1 is not None and line.top1.count > 1 for line in comparison.lines)
    axes.set_xlabel(
        "top-1 (%):\neach seed (small, grey), mean ± standard deviation (large, black)"
        if several
        else "top-1 (%), one seed"
    )
    _grid(axes)


def _draw_differences(axes: Any, comparison: Comparison) -> None:
    others = comparison.has_others
    plain = comparison.study.plain
    axes.axvline(0, color=_MEAN, linewidth=1)
    for height, line in enumerate(comparison.lines):
        shift = 0.14 if others and line.to_other is not None else 0
        for difference, colour, shape, move in (
            (line.to_plain, _TO_PLAIN, "o", -shift),
            (line.to_other, _TO_OTHER, "s", shift),
        ):
            if difference is not None:
                axes.errorbar(
                    difference.mean,
                    height + move,
                    xerr=difference.half_width,
                    fmt=shape,
                    color=colour,
                    capsize=3,
                    markersize=5,
                )
    paired = [line.to_plain for line in comparison.lines if line.to_plain is not None]
    axes.set_xlabel(
        "difference in top-1 (points),\n95% interval, paired over seeds"
        if any(difference.half_width is not None for difference in paired)
        else "difference in top-1 (points), one seed"
    )
    handles = [Line2D([], [], color=_TO_PLAIN, marker="o", label=f"to {plain}")]
    names = {other_of(comparison.study, line.variant) for line in comparison.lines} - {None}
    if others:
        label = "to " + ", ".join(sorted(str(name) for name in names))
        handles.append(Line2D([], [], color=_TO_OTHER, marker="s", label=label))
    axes.legend(
        handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2, frameon=False
    )
    _grid(axes)


def _grid(axes: Any) -> None:
    axes.grid(axis="x", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    axes.tick_params(axis="y", length=0)
