"""Row 12: the operations of a training step on a GPU, counted on one that is only pretended.

Forward, backward and fused AdamW in bf16, eager; an operation launches a kernel or more. The counts
depend on versions alone, not on the machine.
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import row
from benchmarks.pretended import Case, counted
from benchmarks.row import Row, Settings, Target
from benchmarks.steps import FAMILIES
from experiments.documents.markdown import aligned_table

OVER_PLAIN = {
    "CCT-7/3×1": {"HTM": 1.18, "HVTM": 1.30},
    "ViT-B/16": {"HTM": 1.08, "HVTM": 1.16},
}


def measure(settings: Settings) -> dict[str, Any]:
    """Count the steps of each model and variant."""
    models = list(FAMILIES)[: 1 if settings.quick else None]
    variants = {m: ("plain", "HVTM") if settings.quick else FAMILIES[m].variants for m in models}
    cases = [Case(model, variant) for model in models for variant in variants[model]]
    with tempfile.TemporaryDirectory() as folder:
        found = dict(zip(cases, counted(cases, Path(folder)), strict=True))
    return {
        "models": [
            {
                "model": model,
                "batch": FAMILIES[model].gpu_batch,
                "variants": {
                    variant: {
                        "operations": counts.total,
                        "statistics": counts.statistics,
                        "exchanges": len(counts.exchanges),
                        "elsewhere": sum(counts.elsewhere.values()),
                    }
                    for variant in variants[model]
                    for counts in [found[Case(model, variant)]]
                },
            }
            for model in models
        ]
    }


def _over_plain(model: dict[str, Any], variant: str) -> float:
    counts = model["variants"]
    return counts[variant]["operations"] / counts["plain"]["operations"]


def tables(values: dict[str, Any]) -> str:
    """One line per model and variant."""
    rows = [
        [
            f"{model['model']}, B={model['batch']}",
            variant,
            str(counts["operations"]),
            "1" if variant == "plain" else f"{_over_plain(model, variant):.3f}",
            str(counts["statistics"]),
            str(counts["exchanges"]),
            str(counts["elsewhere"]),
        ]
        for model in values["models"]
        for variant, counts in model["variants"].items()
    ]
    head = (
        *("model", "step", "operations on the GPU", "over plain", "more to read all statistics"),
        *("exchanges with the host", "operations on the CPU"),
    )
    return aligned_table(head, rows, range(2, 7))


def targets(values: dict[str, Any]) -> list[Target]:
    """Operations over those of the plain step."""
    found = []
    for model in values["models"]:
        for variant, most in OVER_PLAIN.get(model["model"], {}).items():
            if variant in model["variants"]:
                over = _over_plain(model, variant)
                name = f"12. launches, {model['model']}, B={model['batch']}, {variant}"
                found.append(Target(name, f"≤ {most:.2f} × plain", f"{over:.3f}", over <= most))
    return found


ROW = Row("launches", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(row.main(ROW))
