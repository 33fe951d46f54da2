"""The table that compares runs, from what they recorded."""

import json
import statistics
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from experiments.documents.markdown import aligned_table
from experiments.errors import DataError
from experiments.files import write_atomically
from experiments.training.folder import CHECKPOINT_FOLDER, FINAL_WEIGHTS
from experiments.training.metrics import (
    METRICS_FILE,
    TENSORBOARD_FOLDER,
    mean_of_rows,
    read_metrics,
)

_LEGEND = (
    "Samples mixed and tokens mixed are means over the whole run (a study's page takes the last "
    "epoch); tokens mixed counts the tokens replaced in an easy sample."
)


@dataclass(frozen=True)
class Row:
    """What a run came to."""

    name: str
    folder: str
    top1: float
    """Per cent of the validation images, after the last epoch."""
    step_seconds: float
    """Median over the training, the first rows of metrics left out where there are others."""
    relative_step_time: float
    """`step_seconds` over that of the first run."""
    mixed_share: float | None
    """Share of the training samples that HTM mixed, mean over steps and layers."""
    tokens_mixed: float | None
    """Tokens that HTM replaced, mean over the easy samples and the layers."""
    tokens_remembered: float | None
    """Tokens that a VTM layer attended to beside its own, mean over its layers."""
    epochs: int
    steps: int


def read_row(folder: Path, first: "Row | None" = None) -> Row:
    """Read a run's metrics.

    Args:
        folder: the run folder.
        first: the run whose step time is the unit, or None where it is this one.

    Raises:
        DataError: the folder holds no evaluated run.
    """
    try:
        rows = read_metrics(folder)
    except ValueError as error:
        raise DataError(str(error)) from None
    train = [row for row in rows if row["split"] == "train"]
    validation = [row for row in rows if row["split"] == "validation"]
    if not train or not validation:
        raise DataError(
            f"{folder}: holds no run that was trained and evaluated (looked for {METRICS_FILE}); "
            "give run folders that experiments.train has written"
        )
    step_seconds = statistics.median(row["step_seconds"] for row in (train[1:] or train))
    means = mean_of_rows(train)
    return Row(
        name=folder.resolve().name,
        folder=str(folder),
        top1=validation[-1]["top1"],
        step_seconds=step_seconds,
        relative_step_time=step_seconds / (first.step_seconds if first else step_seconds),
        mixed_share=mean_over_layers(means, "mixed_share"),
        tokens_mixed=mean_over_layers(means, "tokens_mixed"),
        tokens_remembered=mean_over_layers(means, "remembered_tokens"),
        epochs=train[-1]["epoch"],
        steps=train[-1]["step"],
    )


def read_rows(folders: list[Path]) -> list[Row]:
    """Read several runs; the first one's step time is the unit."""
    rows: list[Row] = []
    for folder in folders:
        rows.append(read_row(folder, rows[0] if rows else None))
    return rows


def markdown(rows: list[Row]) -> str:
    """The table in Markdown, aligned, so that it reads well on a terminal too."""
    head = ["run", "top-1", "time a step", "samples mixed", "tokens mixed", "tokens remembered"]
    cells = [
        [
            row.name,
            f"{row.top1:.2f}%",
            f"{row.relative_step_time:.2f} x",
            "-" if row.mixed_share is None else f"{100 * row.mixed_share:.1f}%",
            "-" if row.tokens_mixed is None else f"{row.tokens_mixed:.1f}",
            "-" if row.tokens_remembered is None else f"{row.tokens_remembered:.0f}",
        ]
        for row in rows
    ]
    legend = "" if all(row.mixed_share is None for row in rows) else f"\n{_LEGEND}\n"
    return aligned_table(head, cells, range(1, len(head))) + legend


def paths_text(rows: list[Row]) -> str:
    """Where each run's checkpoints, weights and TensorBoard logs are."""
    lines = []
    for row in rows:
        folder = Path(row.folder)
        lines.append(f"{row.name}:")
        for title, path in (
            ("checkpoints", folder / CHECKPOINT_FOLDER),
            ("final weights", folder / FINAL_WEIGHTS),
            ("TensorBoard logs", folder / TENSORBOARD_FOLDER),
        ):
            if path.exists():
                lines.append(f"  {title:<17}{path}")
    return "\n".join(lines) + "\n"


def write_table(rows: list[Row], folder: Path) -> tuple[Path, Path]:
    """Write the table as JSON and as Markdown; gives both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, markdown_path = folder / "comparison.json", folder / "comparison.md"
    content = json.dumps([asdict(row) for row in rows], indent=2) + "\n"
    write_atomically(json_path, content.encode())
    write_atomically(markdown_path, markdown(rows).encode())
    return json_path, markdown_path


def mean_over_layers(means: dict[str, Any], leaf: str) -> float | None:
    """Mean of a statistic over the layers that have it, None where none has."""
    values = [value for name, value in means.items() if name.rpartition("/")[2] == leaf]
    return sum(values) / len(values) if values else None
