"""One page that stands alone: tables and plots, for light and dark, for a phone and a desk."""

import base64
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.figure import Figure

from experiments.documents import figures
from experiments.reproduce import table as tables
from experiments.reproduce.table import Line, PaperTable

_MARKS = {tables.REPRODUCED: "good", tables.DIFFERS: "bad", tables.PARTIAL: "fair"}
_TEMPLATE = "page.html.j2"
_WIDTH = 3.6
"""Inches of a plot: on a phone of 390 pixels its letters of 8 points are 10 pixels high."""


def page(paper: list[PaperTable]) -> str:
    """The whole page."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined
    )
    return environment.get_template(_TEMPLATE).render(
        ground=figures.GROUND,
        summary=summary(paper),
        head=tables.HEAD,
        right=tables.RIGHT,
        training_head=tables.TRAINING_HEAD,
        training_right=tables.TRAINING_RIGHT,
        sections=[_section(table) for table in paper],
    )


def summary(paper: list[PaperTable]) -> str:
    """How many rows were reproduced, in a sentence."""
    published = [
        line for table in paper for line in table.lines if line.row.published_top1 is not None
    ]
    evaluated = [line for line in published if line.ours is not None]
    reproduced = sum(line.status == tables.REPRODUCED for line in evaluated)
    trainings = sum(len(line.seeds) for table in paper for line in table.trained)
    text = (
        f"{reproduced} of {len(evaluated)} evaluated rows reproduced ({len(published)} have a "
        f"published figure). {tables.explanation()}"
    )
    return text + (f" {trainings} trainings were run here." if trainings else "")


def _section(table: PaperTable) -> dict[str, Any]:
    return {
        "title": table.title,
        "rows": [
            (line.row.name, line.cells(), _MARKS.get(line.status, "plain")) for line in table.lines
        ],
        "training": [(line.row.name, line.training_cells(), "") for line in table.trained],
        "figures": list(_figures(table)),
        "remarks": tables.remarks_of(table),
        "sources": tables.sources_of(table),
    }


def _figures(table: PaperTable) -> Iterator[tuple[str, str]]:
    """Each figure as SVG in base64, with its words."""
    with figures.house_style():
        for dataset in dict.fromkeys(line.row.dataset.name for line in table.lines):
            lines = [line for line in table.lines if line.row.dataset.name == dataset]
            lines = [line for line in lines if _values(line)]
            if lines:
                text = f"Top-1 on {dataset}, published and ours"
                yield _svg(_draw_top1(lines, text), text), text
        lines = [line for line in table.lines if line.difference is not None]
        if lines:
            text = f"Difference to the published top-1, {table.title}"
            yield _svg(_draw_differences(lines), text), text


def _values(line: Line) -> list[float]:
    found = [line.row.published_top1, line.ours, *(seed.top1 for seed in line.seeds)]
    return [value for value in found if value is not None]


def _draw_top1(lines: list[Line], text: str) -> Figure:
    figure, axes = _rows([line.row.method for line in lines])
    for height, line in enumerate(lines):
        published, ours = line.row.published_top1, line.ours
        if published is not None and ours is not None:
            axes.plot([published, ours], [height] * 2, color=figures.SOFT, linewidth=1, zorder=1)
        for seed in line.seeds:
            axes.plot(seed.top1, height, "|", color=figures.GREEN, markersize=14, label="seed")
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
    _title(figure, text)
    handles, labels = axes.get_legend_handles_labels()
    words = {"seed": "trained here, one per seed"}
    unique = {
        words.get(label, label): handle for label, handle in zip(labels, handles, strict=True)
    }
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


def _draw_differences(lines: list[Line]) -> Figure:
    figure, axes = _rows([f"{line.row.dataset.name} {line.row.method}" for line in lines])
    band = tables.TOLERANCE
    axes.axvspan(-band, band, color=figures.GREEN, alpha=0.18, linewidth=0)
    axes.axvline(0, color=figures.SOFT, linewidth=1)
    differences = [line.difference for line in lines]
    axes.plot(differences, range(len(lines)), "o", color=figures.BLUE)
    reach = 1.16 * max(2 * band, *(abs(value) for value in differences if value is not None))
    axes.set_xlim(-reach, reach)
    axes.set_xlabel("ours − published (points)")
    _title(figure, f"Difference to the published figure (band: ±{band})")
    return figure


def _title(figure: Figure, text: str) -> None:
    figure.suptitle(text, fontsize=8, x=0.02, ha="left")


def _rows(labels: list[str]) -> tuple[Figure, Any]:
    """A figure with one row per label."""
    figure = figures.make_figure(1.1 + 0.3 * len(labels), _WIDTH)
    axes = figure.subplots()
    axes.set_yticks(range(len(labels)), labels)
    axes.set_ylim(len(labels) - 0.4, -0.6)
    axes.tick_params(labelsize=8)
    axes.tick_params(axis="y", length=0)
    axes.locator_params(axis="x", nbins=5)
    axes.grid(axis="x", color=figures.GRID, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines["left"].set_visible(False)
    return figure, axes


def _svg(figure: Figure, text: str) -> str:
    content = io.BytesIO()
    metadata = {"Date": None, "Creator": None, "Title": text}
    figure.savefig(content, format="svg", metadata=metadata)
    return base64.b64encode(content.getvalue()).decode()
