"""The paper's tables beside ours: in Markdown, for a terminal, and inside the documents.

Every figure comes from a record; nothing here is typed by hand.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from experiments.documents import markdown as markdown_blocks
from experiments.documents.markdown import Makers, aligned_table, fill_blocks
from experiments.errors import DataError
from experiments.provenance import ROOT
from experiments.reproduce import records
from experiments.reproduce.records import Result, SeedResult, TableRecord, Training
from experiments.reproduce.terminal import Terminal
from experiments.study import page as studies_page
from experiments.zoo.manifest import Manifest

HEAD = ("data set", "method", "published", "ours", "difference", "images", "status")
TRAINING_HEAD = ("data set", "method", "published", "trained here", "seeds", "epochs")
RIGHT = (2, 3, 4, 5)
_COLOURS = {records.REPRODUCED: "green", records.DIFFERS: "red", records.PARTIAL: "yellow"}


def cells(result: Result) -> list[str]:
    """A row's cells, in the order of HEAD."""
    return [
        result.dataset,
        result.method,
        _percent(result.published),
        _percent(result.ours),
        "–" if result.difference is None else f"{result.difference:+.2f}".replace("-", "−"),
        "–" if result.images is None else f"{result.images:,}",
        result.status,
    ]


def training_cells(training: Training) -> list[str]:
    """A row's cells, in the order of TRAINING_HEAD."""
    epochs = sorted({seed.epochs for seed in training.seeds})
    mean = _percent(training.mean)
    return [
        training.dataset,
        training.method,
        _percent(training.published),
        mean if training.std is None else f"{mean} ± {training.std:.2f}",
        ", ".join(str(seed.seed) for seed in training.seeds),
        ", ".join(map(str, epochs)),
    ]


def markdown_table(record: TableRecord) -> str:
    """The table in Markdown, without anything around it."""
    return aligned_table(HEAD, [cells(row) for row in record.rows.values()], RIGHT)


def markdown_training(record: TableRecord) -> str:
    """The table of the trainings in Markdown."""
    rows = [training_cells(training) for training in record.training.values()]
    return aligned_table(TRAINING_HEAD, rows, (2, 3))


def markdown(record_list: list[TableRecord]) -> str:
    """A whole page in Markdown: tables, reasons, and where the figures come from."""
    parts = []
    for record in record_list:
        parts.append(f"# {record.title}\n\nTop-1 in per cent. {explanation()}\n")
        parts.append(markdown_table(record))
        remarks = [f"- {text}" for text in remarks_of(record)]
        if remarks:
            parts.append("\n".join(remarks) + "\n")
        if record.training:
            parts.append(
                "## Trained here\n\nMean ± standard deviation over the seeds, after the "
                "last epoch.\n"
            )
            parts.append(markdown_training(record))
        sources = sources_of(record)
        if sources:
            parts.append("## Where the figures come from\n")
            parts.append("\n".join(f"- {text}" for text in sources) + "\n")
    return "\n".join(parts)


def explanation() -> str:
    """What the mark of a row means."""
    return (
        f"Reproduced: within {records.TOLERANCE} points of the published figure, on all images of "
        "the validation split."
    )


def remarks_of(record: TableRecord) -> list[str]:
    """What there is to say of single rows: why one was skipped, whose a figure is."""
    remarks = []
    for row in record.rows.values():
        said = [text for text in (row.note, row.reason) if text]
        if said:
            remarks.append(f"{row.dataset}, {row.method}: {'; '.join(said)}")
    return remarks


def sources_of(record: TableRecord) -> list[str]:
    """Hardware, versions, commit, command and time of the figures, equal ones once."""
    found: dict[tuple[str, ...], list[str]] = {}
    entries: list[tuple[str, Result | SeedResult]] = [
        (f"{r.dataset}, {r.method}", r) for r in record.rows.values() if r.ours is not None
    ]
    entries += [
        (f"{t.dataset}, {t.method}, seed {s.seed}", s)
        for t in record.training.values()
        for s in t.seeds
    ]
    for name, entry in entries:
        versions = ", ".join(f"{key} {value}" for key, value in entry.versions.items())
        day = (entry.time or "").partition("T")[0]
        facts = (
            day,
            entry.hardware or "",
            versions,
            entry.commit or "no commit",
            entry.command or "",
        )
        found.setdefault(facts, []).append(name)
    return [
        f"{'; '.join(names)}: {day}, {hardware}, {versions}, commit {commit}, `{command}`"
        for (day, hardware, versions, commit, command), names in found.items()
    ]


def print_record(record: TableRecord, terminal: Terminal) -> None:
    """Write the tables to a terminal."""
    rows = list(record.rows.values())
    terminal.line()
    terminal.line(record.title, "bold")
    terminal.table(
        [list(HEAD), *(cells(row) for row in rows)],
        right=RIGHT,
        colours=[_COLOURS.get(row.status) for row in rows],
    )
    if record.training:
        terminal.line()
        terminal.table(
            [list(TRAINING_HEAD), *(training_cells(t) for t in record.training.values())],
            right=(2, 3),
        )


def zoo_table(manifest: Manifest) -> str:
    """The zoo's checkpoints in Markdown."""
    rows = [
        [
            f"`{entry.name}`",
            f"`{entry.file}`",
            entry.dataset,
            entry.method,
            _percent(entry.published_top1),
            f"[{'Google Drive' if entry.drive else 'link'}]({entry.link})",
        ]
        for entry in manifest.checkpoints.values()
    ]
    return aligned_table(
        ("name", "file", "data set", "method", "published top-1", "from"), rows, (4,)
    )


def regenerated(text: str, manifest: Manifest, results: Path) -> str:
    """A document with the blocks that are generated made anew: `table cifar`, `training cifar`,
    `zoo all`, `study digits`.

    Raises:
        DataError: a block asks for what there is not.
    """
    return fill_blocks(text, makers(manifest, results))


def makers(manifest: Manifest, results: Path) -> Makers:
    """What makes the blocks of the paper's tables, the zoo and the studies."""

    def of_record(make: Callable[[TableRecord], str], kind: str, name: str) -> str:
        if name not in manifest.tables:
            raise DataError(
                f"generated: got {kind} {name}; allowed: {kind} of {', '.join(manifest.tables)}"
            )
        return make(_told(records.read_record(results, manifest, name)))

    return {
        "zoo": lambda _: zoo_table(manifest),
        "study": lambda name: studies_page.block(name, results, ROOT),
        "table": lambda name: of_record(markdown_table, "table", name),
        "training": lambda name: of_record(markdown_training, "training", name),
    }


def _told(record: TableRecord) -> TableRecord:
    """A record without the rows that could not be evaluated on some machine."""
    rows = {
        name: replace(row, status=records.NOT_YET) if row.status == records.SKIPPED else row
        for name, row in record.rows.items()
    }
    return replace(record, rows=rows)


def update_documents(root: Path, manifest: Manifest, results: Path) -> list[Path]:
    """Make the generated blocks of all documents anew; gives the files that changed."""
    return markdown_blocks.update_documents(root, makers(manifest, results))


def _percent(value: float | None) -> str:
    return "–" if value is None else f"{value:.2f}"
