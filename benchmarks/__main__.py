"""Measure all CPU rows, or the named ones: `python -m benchmarks [ROW ...] [--quick]`.

Each row runs in its own process, so that no row finds another one's data in memory.
"""

import subprocess
import sys
from collections.abc import Sequence

from benchmarks import report, row
from benchmarks.gpu import parts as gpu
from experiments import cli
from experiments.errors import ConfigError, DataError, nearest
from experiments.provenance import ROOT


def main(argv: Sequence[str]) -> None:
    """Measure rows, then regenerate the documents from the default records."""
    names = [one.name for one in report.ROWS if one not in gpu.ROWS]
    parser = row.parser("python -m benchmarks", __doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=", ".join(names))
    options = parser.parse_args(argv)
    for name in options.rows:
        if name not in names:
            raise ConfigError(f"command line: {name!r} is not a row; {nearest(name, names)}")
    words = ["--quick"] if options.quick else []
    for option in ("threads", "rounds", "results"):
        value = getattr(options, option)
        if value is not None:
            words += [f"--{option}", str(value.resolve() if option == "results" else value)]
    failed = []
    for name in options.rows or names:
        print(f"== {name}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *words], cwd=ROOT, check=False
        )
        failed += [name] if done.returncode else []
    if options.results is None and not options.quick:
        report.main([])
    if failed:
        raise DataError(f"benchmarks that failed: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
