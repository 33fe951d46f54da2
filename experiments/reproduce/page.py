"""One page that stands alone: tables and plots, for light and dark, for a phone and a desk."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from experiments.documents import figures
from experiments.reproduce import table as tables
from experiments.reproduce.table import Line, PaperTable

_MARKS = {tables.REPRODUCED: "good", tables.DIFFERS: "bad", tables.PARTIAL: "fair"}
_WIDTH = 3.6
"""Inches of a plot: on a phone of 390 pixels its letters of 8 points are 10 pixels high."""


def page(table: PaperTable) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template("page.html.j2").render(
        ground=figures.GROUND,
        title=table.title,
        summary=summary(table),
        head=tables.HEAD,
        right=tables.RIGHT,
        rows=[(x.row.name, x.cells(), _MARKS.get(x.status, "plain")) for x in table.lines],
        training_head=tables.TRAINING_HEAD,
        training_right=tables.TRAINING_RIGHT,
        training=[(line.row.name, line.training_cells(), "") for line in table.trained],
        figures=list(_figures(table)),
        remarks=tables.remarks_of(table),
        sources=tables.sources_of(table),
    )


def summary(table: PaperTable) -> str:
    """How many rows were reproduced, in a sentence."""
    published = [line for line in table.lines if line.row.published_top1 is not None]
    evaluated = [line for line in published if line.ours is not None]
    reproduced = sum(line.status == tables.REPRODUCED for line in evaluated)
    trainings = sum(len(line.seeds) for line in table.trained)
    text = (
        f"{reproduced} of {len(evaluated)} evaluated rows reproduced ({len(published)} have a "
        f"published figure). {tables.EXPLANATION}"
    )
    return text + (f" {trainings} trainings were run here." if trainings else "")


def _figures(table: PaperTable) -> Iterator[tuple[str, str]]:
    """One figure per data set as SVG in base64, with its words."""
    with figures.house_style():
        for dataset in dict.fromkeys(line.row.dataset.name for line in table.lines):
            lines = [x for x in table.lines if x.row.dataset.name == dataset and _values(x)]
            if lines:
                text = f"Top-1 on {dataset}, published and ours"
                yield _svg(_draw_top1(lines, text), text), text


def _values(line: Line) -> list[float]:
    found = [line.row.published_top1, line.ours, *(seed.top1 for seed in line.seeds)]
    return [value for value in found if value is not None]


def _draw_top1(lines: list[Line], text: str) -> Figure:
    figure = figures.make_figure(1.1 + 0.3 * len(lines), _WIDTH)
    axes = figure.subplots()
    for height, line in enumerate(lines):
        published, ours = line.row.published_top1, line.ours
        if published is not None and ours is not None:
            axes.plot([published, ours], [height] * 2, color=figures.SOFT, linewidth=1, zorder=1)
        for seed in line.seeds:
            label = "trained here, one per seed"
            axes.plot(seed.top1, height, "|", color=figures.GREEN, markersize=14, label=label)
        if published is not None:
            axes.plot(
                published, height, "D", color=figures.VERMILION, mfc="none", label="published"
            )
        if ours is not None:
            axes.plot(ours, height, "o", color=figures.BLUE, label="ours")
    values = [value for line in lines for value in _values(line)]
    middle, span = (min(values) + max(values)) / 2, max(0.5, max(values) - min(values))
    axes.set_xlim(middle - 0.58 * span, middle + 0.58 * span)
    axes.set_xlabel("top-1 (%)")
    axes.set_yticks(range(len(lines)), [line.row.method for line in lines])
    axes.set_ylim(len(lines) - 0.4, -0.6)
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color=figures.GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    figure.suptitle(text, fontsize=8, x=0.02, ha="left")
    handles, labels = axes.get_legend_handles_labels()
    unique = dict(zip(labels, handles, strict=True))
    figure.legend(
        unique.values(),
        unique.keys(),
        loc="outside lower center",
        ncols=3,
        handlelength=1,
        handletextpad=0.4,
        columnspacing=1,
    )
    return figure


def _svg(figure: Figure, text: str) -> str:
    content = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Title": text}
    figure.savefig(content, format="svg", metadata=metadata)
    return base64.b64encode(content.getvalue()).decode()
