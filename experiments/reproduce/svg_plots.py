"""Plots of a table as SVG inside a page: they take their colours from the page's style.

Lengths are in the units of the drawing, of which a phone shows about one a pixel.
"""

import html
import math
from dataclasses import dataclass

from experiments.reproduce import records
from experiments.reproduce.records import TableRecord

WIDTH = 360
_RIGHT, _ROW, _TOP, _FOOT = 14, 26, 8, 40
_LETTER = 8  # width of a letter of a label: capitals of a wide typeface
_TICKS = 5


@dataclass(frozen=True)
class Axis:
    """A horizontal axis with round numbers at its ticks.

    Attributes:
        left: where it begins in the drawing.
        low: the value there.
        high: the value at its other end.
        ticks: round values.
        decimals: of their labels.
    """

    left: float
    low: float
    high: float
    ticks: tuple[float, ...]
    decimals: int

    def x(self, value: float) -> float:
        """Where a value lies in the drawing."""
        share = (value - self.low) / (self.high - self.low)
        return self.left + share * (WIDTH - self.left - _RIGHT)


def make_axis(values: list[float], least_span: float, labels: list[str]) -> Axis:
    """An axis that holds all values with some room, beside labels, with round ticks."""
    low, high = min(values), max(values)
    missing = max(0.0, least_span - (high - low))
    room = missing / 2 + 0.08 * (high - low + missing)
    low, high = low - room, high + room
    rough = (high - low) / _TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= rough)
    first, last = math.ceil(low / step), math.floor(high / step)
    ticks = tuple(number * step for number in range(first, last + 1))
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    left = 12 + _LETTER * max(map(len, labels))
    return Axis(min(left, WIDTH / 2), low, high, ticks, decimals)


def top1_plot(record: TableRecord, dataset: str) -> str:
    """Published and our top-1 on a data set, and each seed trained here; "" without any."""
    seeds = {name: [s.top1 for s in training.seeds] for name, training in record.training.items()}
    rows = [
        (row, [v for v in (row.published, row.ours, *seeds.get(row.name, [])) if v is not None])
        for row in record.rows.values()
        if row.dataset == dataset
    ]
    rows = [(row, values) for row, values in rows if values]
    if not rows:
        return ""
    axis = make_axis([v for _, values in rows for v in values], 0.5, [r.method for r, _ in rows])
    body = []
    for number, (row, _) in enumerate(rows):
        y = _row_y(number)
        body.append(_label(axis, row.method, y))
        if row.published is not None and row.ours is not None:
            body.append(
                f'<line class="link" x1="{axis.x(row.published):.1f}" x2="{axis.x(row.ours):.1f}" '
                f'y1="{y}" y2="{y}"/>'
            )
        body += [
            _tick(axis.x(value), y, f"trained here {value:.2f}%")
            for value in seeds.get(row.name, [])
        ]
        if row.published is not None:
            body.append(_diamond(axis.x(row.published), y, f"published {row.published:.2f}%"))
        if row.ours is not None:
            body.append(_dot(axis.x(row.ours), y, f"ours {row.ours:.2f}%"))
    return _drawing(f"Top-1 on {dataset}, published and ours", "top-1 (%)", axis, len(rows), body)


def difference_plot(record: TableRecord) -> str:
    """Ours minus published, with the band within which a row counts as reproduced."""
    rows = [
        (f"{row.dataset} {row.method}", row.difference)
        for row in record.rows.values()
        if row.difference is not None
    ]
    if not rows:
        return ""
    band = records.TOLERANCE
    labels, differences = [label for label, _ in rows], [value for _, value in rows]
    axis = make_axis([*differences, -band, band], 4 * band, labels)
    bottom = _TOP + len(rows) * _ROW
    body = [
        f'<rect class="band" x="{axis.x(-band):.1f}" y="{_TOP}" '
        f'width="{axis.x(band) - axis.x(-band):.1f}" height="{bottom - _TOP}"/>',
        f'<line class="zero" x1="{axis.x(0):.1f}" x2="{axis.x(0):.1f}" y1="{_TOP}" y2="{bottom}"/>',
    ]
    for number, (label, value) in enumerate(rows):
        y = _row_y(number)
        body += [_label(axis, label, y), _dot(axis.x(value), y, f"{value:+.2f} points")]
    title = f"Difference to the published top-1, {record.title}"
    return _drawing(title, "ours − published (points)", axis, len(rows), body)


def _row_y(number: int) -> float:
    return _TOP + (number + 0.5) * _ROW


def _label(axis: Axis, text: str, y: float) -> str:
    room = axis.left - 10
    # one that is too long for half of the drawing is squeezed
    fit = (
        f' textLength="{room:.0f}" lengthAdjust="spacingAndGlyphs"'
        if _LETTER * len(text) > room + 2
        else ""
    )
    return f'<text class="name" x="{axis.left - 8:.1f}" y="{y + 4}"{fit}>{html.escape(text)}</text>'


def _dot(x: float, y: float, title: str) -> str:
    return f'<circle class="ours" cx="{x:.1f}" cy="{y}" r="4"><title>{title}</title></circle>'


def _diamond(x: float, y: float, title: str) -> str:
    return (
        f'<path class="published" d="M{x - 7:.1f} {y}L{x:.1f} {y - 7}L{x + 7:.1f} {y}'
        f'L{x:.1f} {y + 7}Z"><title>{title}</title></path>'
    )


def _tick(x: float, y: float, title: str) -> str:
    return (
        f'<line class="seed" x1="{x:.1f}" x2="{x:.1f}" y1="{y - 10}" y2="{y + 10}">'
        f"<title>{title}</title></line>"
    )


def _drawing(title: str, unit: str, axis: Axis, rows: int, body: list[str]) -> str:
    bottom = _TOP + rows * _ROW
    grid = []
    for tick in axis.ticks:
        x = axis.x(tick)
        text = f"{tick:.{axis.decimals}f}".replace("-", "−")
        grid.append(f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>')
        grid.append(f'<text class="tick" x="{x:.1f}" y="{bottom + 15}">{text}</text>')
    middle = (axis.left + WIDTH - _RIGHT) / 2
    return (
        f'<svg viewBox="0 0 {WIDTH} {bottom + _FOOT}" role="img" aria-label="{html.escape(title)}">'
        f"<title>{html.escape(title)}</title>{''.join(grid)}{''.join(body)}"
        f'<text class="unit" x="{middle:.1f}" y="{bottom + 33}">{unit}</text></svg>'
    )
