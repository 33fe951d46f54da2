"""One page that stands alone: tables and plots, for light and dark, for a phone and a desk.

It has no script and asks for nothing from anywhere.
"""

import html

from experiments.reproduce import records
from experiments.reproduce import table as report
from experiments.reproduce.records import Result, TableRecord
from experiments.reproduce.svg_plots import difference_plot, top1_plot

_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b1f24; --soft: #57606a;
  --line: #d0d7de; --card: #f6f8fa; --ours: #0072b2; --published: #b35c00; --seed: #007a5a;
  --good: #12703c; --good-back: #dcf5e5; --bad: #a8071a; --bad-back: #fde4e4;
  --fair: #7a4d00; --fair-back: #fff1d0; }
@media (prefers-color-scheme: dark) { :root { --paper: #0f1419; --ink: #e6edf3; --soft: #9aa5b1;
  --line: #323b45; --card: #171d24; --ours: #5bb8f0; --published: #f0a050; --seed: #4fcfa5;
  --good: #7ee2a0; --good-back: #12331f; --bad: #ff9aa2; --bad-back: #431a1e;
  --fair: #f2c265; --fair-back: #3a2c0c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 68rem; padding: 1.25rem 1rem 3rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0; }
h2 { font-size: 1.25rem; margin: 2.5rem 0 .5rem; border-top: 1px solid var(--line);
  padding-top: 1.5rem; }
h3 { font-size: 1rem; margin: 1.5rem 0 .5rem; }
p, li { color: var(--soft); margin: .4rem 0; }
ul { padding-left: 1.2rem; }
code { font-size: .85em; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
caption { text-align: left; color: var(--soft); padding-bottom: .5rem; }
th, td { text-align: left; padding: .45rem .6rem; border-bottom: 1px solid var(--line); }
th { font-size: .85rem; color: var(--soft); font-weight: 600; }
th.number, td.number { text-align: right; }
.mark { display: inline-block; padding: .05rem .55rem; border-radius: 1rem; font-size: .85rem;
  background: var(--line); color: var(--soft); white-space: nowrap; }
.good { color: var(--good); background: var(--good-back); }
.bad { color: var(--bad); background: var(--bad-back); }
.fair { color: var(--fair); background: var(--fair-back); }
.plots { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 1.5rem; margin: 1.5rem 0; }
figure { margin: 0; padding: .75rem; background: var(--card); border: 1px solid var(--line);
  border-radius: .6rem; }
figcaption { font-size: .85rem; color: var(--soft); margin-bottom: .4rem; }
svg { display: block; width: 100%; height: auto; }
svg text { font: 12px system-ui, sans-serif; fill: var(--soft); }
svg .name { text-anchor: end; fill: var(--ink); }
svg .tick, svg .unit { text-anchor: middle; }
svg .grid { stroke: var(--line); stroke-width: 1; }
svg .zero { stroke: var(--soft); stroke-width: 1; }
svg .band { fill: var(--good-back); }
svg .link { stroke: var(--soft); stroke-width: 1.5; }
svg .ours { fill: var(--ours); }
svg .published { fill: none; stroke: var(--published); stroke-width: 2; }
svg .seed { stroke: var(--seed); stroke-width: 2.5; }
.key { display: inline-block; margin-right: .9rem; white-space: nowrap; }
.key svg { display: inline-block; width: 14px; height: 14px; vertical-align: -2px; }
@media (max-width: 44rem) {
  thead { position: absolute; clip-path: inset(50%); height: 1px; width: 1px; overflow: hidden; }
  table, tbody { display: block; }
  caption { display: block; }
  tr { display: grid; grid-template-columns: 1fr 1fr; padding: .6rem .75rem; margin: .6rem 0;
    background: var(--card); border: 1px solid var(--line); border-radius: .6rem; }
  td, td.number { display: flex; justify-content: space-between; gap: .5rem; border: 0;
    padding: .2rem .3rem; text-align: right; }
  td::before { content: attr(data-label); color: var(--soft); font-size: .85rem;
    white-space: nowrap; }
  td.wide { grid-column: 1 / -1; }
  td:nth-child(-n+2) { font-weight: 600; }
  td:nth-child(-n+2)::before { content: none; }
  td:nth-child(2) { justify-content: end; }
}
@media print { figure, tr { break-inside: avoid; } }
"""
_MARKS = {records.REPRODUCED: "good", records.DIFFERS: "bad", records.PARTIAL: "fair"}
_KEYS = (
    ("published", '<path class="published" d="M1 7L7 1L13 7L7 13Z"/>'),
    ("ours", '<circle class="ours" cx="7" cy="7" r="4"/>'),
    ("trained here, a line a seed", '<line class="seed" x1="7" x2="7" y1="0" y2="14"/>'),
)


def page(record_list: list[TableRecord]) -> str:
    """The whole page."""
    sections = "\n".join(_section(record) for record in record_list)
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<link rel="icon" href="data:,">
<title>TokenMixup: the paper's tables, reproduced</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>TokenMixup: the paper's tables, reproduced</h1>
<p>{html.escape(summary(record_list))}</p>
{sections}
</body>
</html>
"""


def summary(record_list: list[TableRecord]) -> str:
    """How many rows came out as published, in a sentence."""
    rows = [row for record in record_list for row in record.rows.values()]
    with_figure = [row for row in rows if row.published is not None]
    count = {s: sum(row.status == s for row in with_figure) for s in (*_MARKS, records.EVALUATED)}
    evaluated = sum(count.values())
    text = (
        f"{count[records.REPRODUCED]} of {evaluated} evaluated rows reproduced "
        f"({len(with_figure)} have a published figure). {report.explanation()}"
    )
    trainings = sum(len(t.seeds) for record in record_list for t in record.training.values())
    return text + (f" {trainings} trainings were run here." if trainings else "")


def _section(record: TableRecord) -> str:
    parts = [f"<section>\n<h2>{html.escape(record.title)}</h2>", _table(record)]
    datasets = dict.fromkeys(row.dataset for row in record.rows.values())
    plots = [
        (f"Top-1 on {html.escape(name)}. {_legend(record)}", top1_plot(record, name))
        for name in datasets
    ]
    band = f"Difference to the published figure. Band: ±{records.TOLERANCE} points, reproduced."
    plots.append((band, difference_plot(record)))
    drawn = [f"<figure><figcaption>{c}</figcaption>{plot}</figure>" for c, plot in plots if plot]
    if drawn:
        parts.append(f'<div class="plots">{"".join(drawn)}</div>')
    if record.training:
        parts.append(_training(record))
    parts.append(_list("Remarks", report.remarks_of(record)))
    parts.append(_list("Where the figures come from", report.sources_of(record)))
    return "\n".join([*filter(None, parts), "</section>"])


def _table(record: TableRecord) -> str:
    rows = [(report.cells(row), _mark(row), row.name) for row in record.rows.values()]
    body = []
    for cells, mark, name in rows:
        line = _cells(report.HEAD[:-1], cells[:-1], report.RIGHT)
        line += f'<td class="wide" data-label="{report.HEAD[-1]}">{mark}</td>'
        body.append(f'<tr data-row="{html.escape(name)}">{line}</tr>')
    return _grid("Top-1 in per cent", report.HEAD, report.RIGHT, body)


def _training(record: TableRecord) -> str:
    body = [
        f'<tr data-training="{html.escape(training.name)}">'
        f"{_cells(report.TRAINING_HEAD, report.training_cells(training), (2, 3), wide=(2, 3))}</tr>"
        for training in record.training.values()
    ]
    caption = "Trained here: top-1 after the last epoch, mean ± standard deviation over the seeds"
    return _grid(caption, report.TRAINING_HEAD, (2, 3), body)


def _grid(caption: str, head: tuple[str, ...], right: tuple[int, ...], body: list[str]) -> str:
    names = "".join(
        f'<th scope="col"{_classes(column, right)}>{name}</th>' for column, name in enumerate(head)
    )
    return (
        f"<table>\n<caption>{caption}</caption>\n<thead><tr>{names}</tr></thead>\n<tbody>\n"
        + "\n".join(body)
        + "\n</tbody>\n</table>"
    )


def _cells(
    head: tuple[str, ...], cells: list[str], right: tuple[int, ...], wide: tuple[int, ...] = ()
) -> str:
    return "".join(
        f'<td{_classes(column, right, wide)} data-label="{name}">{html.escape(cell)}</td>'
        for column, (name, cell) in enumerate(zip(head, cells, strict=True))
    )


def _classes(column: int, right: tuple[int, ...], wide: tuple[int, ...] = ()) -> str:
    """The classes of a cell: numbers are aligned to the right, wide ones fill a phone's card."""
    names = [name for name, columns in (("number", right), ("wide", wide)) if column in columns]
    return f' class="{" ".join(names)}"' if names else ""


def _mark(row: Result) -> str:
    return f'<span class="mark {_MARKS.get(row.status, "")}">{html.escape(row.status)}</span>'


def _legend(record: TableRecord) -> str:
    keys = _KEYS if record.training else _KEYS[:2]
    return "".join(
        f'<span class="key"><svg viewBox="0 0 14 14" aria-hidden="true">{drawing}</svg> '
        f"{name}</span>"
        for name, drawing in keys
    )


def _list(title: str, lines: list[str]) -> str:
    if not lines:
        return ""
    items = "".join(f"<li>{_code(html.escape(line))}</li>" for line in lines)
    return f"<h3>{title}</h3>\n<ul>{items}</ul>"


def _code(text: str) -> str:
    """What stands between back-ticks as code."""
    parts = text.split("`")
    return "".join(
        f"<code>{part}</code>" if number % 2 else part for number, part in enumerate(parts)
    )
