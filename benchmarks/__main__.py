"""All rows for a CPU, or those named: `python -m benchmarks [ROW ...] [--quick]`.

Each row runs in a process of its own, so that none finds what another has left in memory.
"""

import subprocess
import sys
from collections.abc import Sequence

from benchmarks import harness, records, report
from benchmarks.rows import CPU_ROWS
from experiments import cli
from experiments.config import nearest
from experiments.errors import ConfigError, DataError
from experiments.provenance import ROOT


def main(argv: Sequence[str]) -> None:
    """Measure rows, then make the documents anew from what the default folder holds."""
    names = [row.name for row in CPU_ROWS]
    parser = harness.parser("python -m benchmarks", __doc__)
    parser.add_argument("rows", nargs="*", metavar="ROW", help=f"of {', '.join(names)}")
    options = parser.parse_args(argv)
    for name in options.rows:
        if name not in names:
            raise ConfigError(f"command line: {name!r} is no row; {nearest(name, names)}")
    words = harness.words_of(options)
    words += ["--results", str(options.results.resolve())] if options.results is not None else []
    failed = []
    for name in options.rows or names:
        print(f"== {name}", flush=True)
        done = subprocess.run(
            [sys.executable, "-m", f"benchmarks.{name}", *words], cwd=ROOT, check=False
        )
        failed += [name] if done.returncode else []
    if options.results is None and not options.quick:
        for path in report.update(ROOT / "docs", records.RESULTS):
            print(f"updated {path.relative_to(ROOT)}")
    if failed:
        raise DataError(f"benchmarks that ended with an error: {', '.join(failed)}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
