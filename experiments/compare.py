"""Compare runs: `python -m experiments.compare RUN...` prints a table and draws figures."""

import sys
from collections.abc import Sequence
from pathlib import Path

from experiments import cli
from experiments.errors import ConfigError

USAGE = """usage: python -m experiments.compare RUN... [--output DIR]

Print a table of run folders (the first one is the unit of time), and write it as JSON and
Markdown, with figures of their training and of what HTM and VTM did to a few validation images.

options:
  --output DIR   folder of the table and the figures (default: output/comparison)
"""


def main(argv: Sequence[str]) -> None:
    """Read the command line, then read, print, write and draw."""
    if any(word in ("-h", "--help") for word in argv):
        print(USAGE, end="")
        return
    options, words = cli.split_options(argv, {"output": cli.Option("folder of what is written")})
    if not words:
        raise ConfigError("command line: no run folders were given; --help shows the usage")
    folders = [Path(word) for word in words]
    output = Path(options.get("output", "output/comparison"))

    from experiments.visualize.tables import markdown, paths_text, read_rows, write_table

    rows = read_rows(folders)
    print(markdown(rows))
    print(paths_text(rows), end="")
    written = list(write_table(rows, output))

    from experiments.visualize.pages import draw_runs
    from experiments.visualize.training import write_curves

    written += [*write_curves(folders, output), *draw_runs(folders, output)]
    print("comparison:")
    for path in written:
        print(f"  {path}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
