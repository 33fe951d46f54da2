"""Row 5: seconds to import the library, and to print the training's help."""

import subprocess
import sys
import time
from typing import Any

from benchmarks import row
from benchmarks.row import Row, Settings, Target
from benchmarks.timing import Timing
from experiments.documents.markdown import aligned_table
from experiments.provenance import ROOT

LIMITS = {
    "import tokenmixup": ("`tokenmixup.attach` after `import torch`", 0.3),
    "experiments.train --help": ("`python -m experiments.train --help`", 3.0),
}
"""Name and largest seconds, by the key of the figures."""
_IMPORTS = """
import time
start = time.perf_counter()
import torch
torch_imported = time.perf_counter()
import tokenmixup
tokenmixup.attach  # a name is imported at its first use
print(torch_imported - start, time.perf_counter() - torch_imported)
"""
_HELP = ("-m", "experiments.train", "--help")


def measure(settings: Settings) -> dict[str, Any]:
    """Fresh processes one after the other, with warm bytecode and disk caches."""
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
    found = []
    for name, (title, limit) in LIMITS.items():
        seconds = values[name]["seconds"]
        found.append(Target(f"5. {title}", f"≤ {limit} s", f"{seconds:.2f} s", seconds <= limit))
    return found


ROW = Row("startup", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(row.main(ROW))
