"""A study's picture: top-1 of every seed, and the differences with their intervals."""

from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from experiments.documents import figures
from experiments.documents.figures import BLACK, BLUE, REST, VERMILION
from experiments.study.statistics import Comparison, Standing, layers_of

_INCHES_PER_VARIANT = 0.42
_INCHES_PER_SETTING = 0.2  # of a search, which has many
_SHARES = {
    "share": ("of the label", VERMILION, "s"),
    "share_by_tokens": ("of the tokens", BLUE, "D"),
    "share_seen": ("as a judge sees it", BLACK, "o"),
    "share_seen_random": ("as it sees as many tokens at random places", REST, "o"),
}


def draw(comparison: Comparison, stem: Path) -> list[Path]:
    """Write `STEM.png` and `STEM.svg`, and return their paths; a search has no differences."""
    standings, study = comparison.standings, comparison.study
    title = study.title
    if not comparison.complete:
        title += f" ({len(comparison.records)} of {comparison.wanted} trainings)"
    with figures.house_style():
        if study.arms:
            figure = figures.make_figure(1.7 + _INCHES_PER_SETTING * len(standings))
            panels = [figure.subplots()]
        else:
            figure = figures.make_figure(1.7 + _INCHES_PER_VARIANT * len(standings))
            panels = list(figure.subplots(1, 2, sharey=True, width_ratios=(1.1, 1)))
            _draw_all_differences(panels[1], comparison)
        _draw_all_top1(panels[0], standings)
        for axes in panels:
            axes.grid(axis="x", color=figures.GRID, linewidth=0.6)
            axes.set_axisbelow(True)
            axes.spines["left"].set_visible(False)
            axes.tick_params(axis="y", length=0)
        figures.title(figure, title)
        words = "top-1 per seed" if study.arms else "top-1 per seed, and differences"
        return figures.write(figure, stem, f"{title}: {words}")


def _draw_all_top1(axes: Axes, standings: list[Standing]) -> None:
    for height, standing in enumerate(standings):
        _draw_top1(axes, height, standing)
    several = any(s.top1 is not None and s.top1.count > 1 for s in standings)
    axes.set_xlabel(
        "top-1 (%):\neach seed (small, grey), mean ± standard deviation (large, black)"
        if several
        else "top-1 (%), one seed"
    )
    axes.set_yticks(range(len(standings)), [_label(standing) for standing in standings])
    axes.set_ylim(len(standings) - 0.4, -0.6)


def _draw_all_differences(axes: Axes, comparison: Comparison) -> None:
    standings, claims = comparison.standings, comparison.study.claims
    for height, standing in enumerate(standings):
        _draw_differences(
            axes, height, standing, comparison.has_others, every_seed=claims is not None
        )
    intervals = any(s.to_plain and s.to_plain.half_width is not None for s in standings)
    words = "difference in top-1 (points),\n95% interval, paired over seeds"
    if claims is not None:
        words += f"; small: each seed;\nband: equal within ±{claims.margin:g}"
        axes.axvspan(-claims.margin, claims.margin, color=figures.GRID, zorder=0)
    axes.set_xlabel(words if intervals else "difference in top-1 (points), one seed")
    axes.axvline(0, color=BLACK, linewidth=1)
    handles = [_handle(BLUE, "o", f"to {comparison.study.plain}")]
    others = sorted({s.other for s in standings if s.other is not None})
    if others:
        words = ", ".join(others) if len(others) < 3 else "its own reference"
        handles.append(_handle(VERMILION, "s", f"to {words}"))
    axes.legend(handles=handles, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2)


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


def draw_saliency(comparison: Comparison, stem: Path) -> list[Path]:
    """Attention sinks: by layer in the final weights, and over the training where HTM mixes."""
    title = f"{comparison.study.title}: attention sinks"
    layers = layers_of(comparison)
    with figures.house_style():
        figure = figures.make_figure(3.2)
        mixing = any(standing.by_epoch for standing in comparison.standings)
        panels = figure.subplots(1, 3 + mixing, sharey=True)
        for axes, name, words in (
            (panels[0], "largest_share", "saliency of the most\nsalient token"),
            (panels[1], "same_place_share", "images in which it is at\nthe most frequent place"),
            (panels[2], "border_share", "images in which it is\nat the border"),
        ):
            for number, standing in enumerate(comparison.standings):
                if standing.measures:
                    found = [standing.measures[f"layer{layer}/{name}"] for layer in layers]
                    axes.errorbar(
                        [layer + 0.06 * (number - 3) for layer in layers],
                        [100 * summary.mean for summary in found],
                        yerr=[100 * (summary.std or 0) for summary in found],
                        label=standing.variant.name,
                        **_line(number),
                    )
            axes.set_title(words)
            axes.set_xticks(layers)
            axes.set_xlabel("layer")
        if mixing:
            for number, standing in enumerate(comparison.standings):
                epochs = [epoch for epoch in standing.by_epoch if epoch != "all"]
                values = [100 * standing.by_epoch[e]["largest_saliency_share"] for e in epochs]
                panels[3].plot([int(epoch) for epoch in epochs], values, **_line(number))
            panels[3].set_title("saliency of the most salient\ntoken where HTM mixes")
            panels[3].set_xlabel("epoch")
        panels[0].set_ylabel("per cent")
        panels[0].set_ylim(0, 100)
        for axes in panels:
            axes.grid(axis="y", color=figures.GRID, linewidth=0.6)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside lower center", ncols=len(labels))
        figures.title(figure, title)
        return figures.write(figure, stem, title)


def draw_labels(comparison: Comparison, stem: Path) -> list[Path]:
    """The partner's share of the mixed samples: by the labels, and as a judge sees it."""
    title = f"{comparison.study.title}: labels and pictures"
    standings = [standing for standing in comparison.standings if standing.agreement]
    values = sorted({rho for standing in standings for rho in standing.agreement})
    with figures.house_style():
        figure = figures.make_figure(1.9 + _INCHES_PER_VARIANT * len(standings))
        panels = figure.subplots(1, len(values), sharex=True, sharey=True, squeeze=False)[0]
        for axes, rho in zip(panels, values, strict=True):
            for name, (_, colour, marker) in _SHARES.items():
                for height, standing in enumerate(standings):
                    share = standing.agreement.get(rho, {}).get(name)
                    if share is not None:
                        std = None if share.std is None else 100 * share.std
                        style = {"fmt": marker, "color": colour, "markersize": 5}
                        _error_bar(axes, 100 * share.mean, height, std, **style)
            axes.set_title(f"ρ = {rho:g}")
            axes.set_xlabel("partner's share (%)")
            axes.set_yticks(range(len(standings)), [s.variant.name for s in standings])
            axes.set_ylim(len(standings) - 0.4, -0.6)
            axes.set_xlim(left=0)
            axes.grid(axis="x", color=figures.GRID, linewidth=0.6)
        handles = [_handle(colour, marker, label) for label, colour, marker in _SHARES.values()]
        figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
        figures.title(figure, title)
        return figures.write(figure, stem, title)


def _line(number: int) -> dict[str, Any]:
    colour = figures.SERIES[number % len(figures.SERIES)]
    return {"color": colour, "marker": "o", "markersize": 3, "linewidth": 1}
