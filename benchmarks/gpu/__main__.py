"""Rows 7 to 10, on a CUDA GPU, one part per command: `python -m benchmarks.gpu PART`.

A part records each figure as soon as it is measured: one that is interrupted or runs out of time
keeps what it has. Training steps are the training's own, in bfloat16.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks import row
from benchmarks.gpu.parts import FILES, SECONDS, make_row, parts
from experiments import cli
from experiments.errors import ConfigError


def main(argv: Sequence[str]) -> None:
    """Read the command line; refuse a machine without CUDA except for a smoke run on the CPU."""
    parser = row.parser("python -m benchmarks.gpu", __doc__)
    parser.add_argument("part", choices=[*parts()], metavar="PART", help=", ".join(parts()))
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --quick"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit; default: 480")
    parser.add_argument("--files", type=Path, default=FILES, help="folder of the traces")
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.quick:
        raise ConfigError(
            "command line: --device: got 'cpu'; allowed without --quick: cuda, since figures from "
            "a CPU would mean nothing here"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "benchmarks.gpu: torch finds no CUDA device on this machine, and these rows need one; "
            "--device cpu --quick tries the script itself"
        )
    if not options.seconds > 0:
        raise ConfigError(f"command line: --seconds: got {options.seconds}; allowed: above 0")
    one = make_row(options.part, parts(options.files)[options.part], options.seconds)
    command = ["python -m benchmarks.gpu", *argv]
    row.run(one, options, command, device=torch.device(options.device))


if __name__ == "__main__":
    sys.exit(cli.run(main))
