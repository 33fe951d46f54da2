"""A study's picture: top-1 of every seed, and the differences with their intervals."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.documents import figures
from experiments.documents.figures import BLACK, BLUE, REST, VERMILION
from experiments.study.statistics import Comparison, Standing

_INCHES_PER_VARIANT = 0.42


def draw(comparison: Comparison, stem: Path) -> list[Path]:
    """Write `STEM.png` and `STEM.svg`, and return their paths."""
    standings = comparison.standings
    title = comparison.study.title
    claims = comparison.study.claims
    if not comparison.complete:
        title += f" ({len(comparison.records)} of {comparison.wanted} trainings)"
    with figures.house_style():
        figure = figures.make_figure(1.7 + _INCHES_PER_VARIANT * len(standings))
        left, right = figure.subplots(1, 2, sharey=True, width_ratios=(1.1, 1))
        for height, standing in enumerate(standings):
            _draw_top1(left, height, standing)
            _draw_differences(
                right, height, standing, comparison.has_others, every_seed=claims is not None
            )
        several = any(s.top1 is not None and s.top1.count > 1 for s in standings)
        left.set_xlabel(
            "top-1 (%):\neach seed (small, grey), mean ± standard deviation (large, black)"
            if several
            else "top-1 (%), one seed"
        )
        left.set_yticks(range(len(standings)), [_label(standing) for standing in standings])
        left.set_ylim(len(standings) - 0.4, -0.6)
        intervals = any(s.to_plain and s.to_plain.half_width is not None for s in standings)
        words = "difference in top-1 (points),\n95% interval, paired over seeds"
        if claims is not None:
            words += f"; small: each seed;\nband: equal within ±{claims.margin:g}"
            right.axvspan(-claims.margin, claims.margin, color=figures.GRID, zorder=0)
        right.set_xlabel(words if intervals else "difference in top-1 (points), one seed")
        right.axvline(0, color=BLACK, linewidth=1)
        handles = [_handle(BLUE, "o", f"to {comparison.study.plain}")]
        others = sorted({s.other for s in standings if s.other is not None})
        if others:
            handles.append(_handle(VERMILION, "s", f"to {', '.join(others)}"))
        right.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)
        for axes in (left, right):
            axes.grid(axis="x", color=figures.GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        figures.title(figure, title)
        return figures.write(figure, stem, f"{title}: top-1 per seed, and differences")


def _label(standing: Standing) -> str:
    return f"{standing.variant.name}  (n = {standing.top1.count if standing.top1 else 0})"


def _handle(colour: str, marker: str, label: str) -> Line2D:
    return Line2D([], [], color=colour, marker=marker, label=label)


def _draw_top1(axes: Axes, height: int, standing: Standing) -> None:
    values = list(standing.by_seed.values())
    # equal values stand below each other, so that every seed is seen
    heights = [height + 0.12 + 0.11 * values[:n].count(value) for n, value in enumerate(values)]
    axes.plot(values, heights, "o", color=REST, markersize=2.6, markeredgewidth=0)
    if standing.top1 is not None:
        _error_bar(axes, standing.top1.mean, height - 0.08, standing.top1.std, fmt="o", color=BLACK)


def _draw_differences(
    axes: Axes, height: int, standing: Standing, has_others: bool, every_seed: bool
) -> None:
    shift = 0.14 if has_others and standing.to_other is not None else 0
    for difference, colour, marker, move in (
        (standing.to_plain, BLUE, "o", -shift),
        (standing.to_other, VERMILION, "s", shift),
    ):
        if difference is not None:
            if every_seed:
                values = list(difference.by_seed.values())
                heights = [height + move + 0.12] * len(values)
                axes.plot(values, heights, marker, color=colour, markersize=2.2, alpha=0.6)
            _error_bar(
                axes,
                difference.mean,
                height + move,
                difference.half_width,
                fmt=marker,
                color=colour,
                markersize=5,
            )


def _error_bar(axes: Axes, value: float, height: float, half: float | None, **style: Any) -> None:
    axes.errorbar(value, height, xerr=half, capsize=3, **style)
