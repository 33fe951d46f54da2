"""Row 5: how long Python takes to import the library, and the training's help to appear."""

import subprocess
import sys
import time
from typing import Any

from benchmarks import harness
from benchmarks.harness import Row, Settings, Target
from benchmarks.timing import Timing
from experiments.documents.markdown import aligned_table
from experiments.provenance import ROOT

IMPORT_SECONDS, HELP_SECONDS = 0.3, 3.0
_IMPORTS = """
import time
start = time.perf_counter()
import torch
torch_there = time.perf_counter()
import tokenmixup
print(torch_there - start, time.perf_counter() - torch_there)
"""
_HELP = ("-m", "experiments.train", "--help")


def measure(settings: Settings) -> dict[str, Any]:
    """Fresh processes one after the other, bytecode and disk caches warm."""
    torch_seconds, library_seconds, help_seconds = [], [], []
    _python(*_HELP)
    for _ in range(settings.rounds(7)):
        of_torch, of_library = map(float, _python("-c", _IMPORTS).split())
        torch_seconds.append(of_torch)
        library_seconds.append(of_library)
        start = time.perf_counter()
        _python(*_HELP)
        help_seconds.append(time.perf_counter() - start)
    return {
        "import torch": Timing(tuple(torch_seconds)).record(),
        "import tokenmixup": Timing(tuple(library_seconds)).record(),
        "experiments.train --help": Timing(tuple(help_seconds)).record(),
    }


def _python(*words: str) -> str:
    done = subprocess.run(
        [sys.executable, *words], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return done.stdout


def tables(values: dict[str, Any]) -> str:
    """Seconds, with quartiles."""
    rows = [
        [
            name,
            f"{timing['seconds']:.3f}",
            f"{timing['lower_quartile']:.3f}–{timing['upper_quartile']:.3f}",
        ]
        for name, timing in values.items()
    ]
    return aligned_table(("what", "median (s)", "quartiles (s)"), rows, (1, 2))


def targets(values: dict[str, Any]) -> list[Target]:
    """Import and help."""
    return [
        Target(f"5. {what}", f"≤ {limit} s", f"{values[name]['seconds']:.2f} s", reached)
        for what, name, limit, reached in (
            (
                "`import tokenmixup` beyond `import torch`",
                "import tokenmixup",
                IMPORT_SECONDS,
                values["import tokenmixup"]["seconds"] <= IMPORT_SECONDS,
            ),
            (
                "`python -m experiments.train --help`",
                "experiments.train --help",
                HELP_SECONDS,
                values["experiments.train --help"]["seconds"] <= HELP_SECONDS,
            ),
        )
    ]


ROW = Row("startup", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(harness.main(ROW))
