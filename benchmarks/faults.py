"""Measure what is promised of faults: `python -m benchmarks.faults`.

Real trainings of the quickstart's small model are killed, stopped, damaged and resumed. Each
part is written to `results/reliability/DATE.json` when it is done, and `docs/reliability.md` shows
the newest; parts may be measured one by one. The whole takes about half an hour on two cores.

    python -m benchmarks.faults                         everything
    python -m benchmarks.faults --parts damages,soak    some
    python -m benchmarks.faults --quick --parts kills-1 --results DIR
                                                        few repetitions, to see that it works
"""

import json
import math
import os
import shlex
import sys
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from benchmarks.faults_page import DOCUMENT, RESULTS, newest_result, shown
from benchmarks.faults_processes import measure_kills, measure_stops
from benchmarks.faults_within import measure_cost, measure_damages, measure_soak
from experiments import cli, provenance
from experiments.errors import ConfigError
from experiments.files import write_atomically

PARTS = ("kills-1", "kills-2", "damages", "stops", "cost", "soak")
OPTIONS = {
    "parts": cli.Option(f"some of {','.join(PARTS)}"),
    "seed": cli.Option("of all random places and moments"),
    "results": cli.Option("folder for the figures; the document is written for the usual one only"),
    "quick": cli.Option("few repetitions", takes_value=False),
    "render": cli.Option("only make the document anew from the newest figures", takes_value=False),
}


def makers(folder: Path, seed: int, quick: bool) -> dict[str, Callable[[], Any]]:
    """What measures each part."""
    kills, runs = (3, 1) if quick else (21, 3)
    return {
        "kills-1": lambda: asdict(measure_kills(folder, 1, kills, runs, seed)),
        "kills-2": lambda: asdict(measure_kills(folder, 2, kills, runs, seed)),
        "damages": lambda: asdict(measure_damages(folder, 10 if quick else 120, seed)),
        "stops": lambda: asdict(measure_stops(folder, 1 if quick else 6, seed)),
        "cost": lambda: _cost(folder, 2 if quick else 6),
        "soak": lambda: asdict(measure_soak(folder, 20 if quick else 2000, 10)),
    }


def _cost(folder: Path, epochs: int) -> dict[str, Any]:
    cost = measure_cost(folder, epochs)
    return {**asdict(cost), "percent": cost.percent}


def good(part: str, figures: Mapping[str, Any]) -> bool:
    """Whether a part's figures are what is promised."""
    if part.startswith("kills"):
        return figures["survived"] == figures["total"] and all(figures["phases"].values())
    if part == "damages":
        every = figures["detected"] == figures["recovered"] == figures["total"]
        return every and figures["continued"] == 2
    if part == "stops":
        return figures["same"] and max(figures["to_saved"], default=math.inf) < 2
    if part == "cost":
        return figures["percent"] < 2
    first, last = figures["resident_mib"]
    same = figures["files"][0] == figures["files"][1]
    return last < 1.02 * first and same and figures["threads"][0] == figures["threads"][1]


def main(argv: Sequence[str]) -> None:
    """Read the command line and measure."""
    if "-h" in argv or "--help" in argv:
        print(__doc__)
        return
    given, words = cli.split_options(argv, OPTIONS)
    parts = given["parts"].split(",") if "parts" in given else list(PARTS)
    unknown = [*words, *(part for part in parts if part not in PARTS)]
    if unknown or not given.get("seed", "0").isdigit():
        raise ConfigError(f"command line: {' '.join(unknown) or '--seed'}: see --help")
    results = Path(given.get("results", RESULTS))
    if "render" not in given:
        _measure(parts, int(given.get("seed", "0")), "quick" in given, results, argv)
    if results == RESULTS:
        write_atomically(DOCUMENT, shown(DOCUMENT.read_text(), newest_result(RESULTS)).encode())


def _measure(
    parts: Sequence[str], seed: int, quick: bool, results: Path, argv: Sequence[str]
) -> None:
    torch.set_num_threads(1)  # as the processes that are started
    broken = []
    results.mkdir(parents=True, exist_ok=True)
    work = provenance.ROOT / "output"  # on a disk, unlike many a folder for temporary files
    work.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=work, prefix="faults-") as folder:
        measurements = makers(Path(folder), seed, quick)
        for part in parts:
            load = os.getloadavg()[0]
            print(f"{part}:", flush=True)
            figures = measurements[part]()
            entry = {
                "part": part,
                "good": good(part, figures),
                **figures,
                "seed": seed,
                "quick": quick,
                "load": [round(load, 1), round(os.getloadavg()[0], 1)],
                "command": shlex.join(["python", "-m", "benchmarks.faults", *argv]),
                **provenance.provenance(torch.device("cpu")),
            }
            broken += [] if entry["good"] else [part]
            _keep(results, part, entry)
    if broken:
        print(f"not as promised: {', '.join(broken)}", file=sys.stderr)
        sys.exit(1)


def _keep(results: Path, part: str, entry: dict[str, Any]) -> None:
    """Put a part's figures beside those of the other parts measured on the same day."""
    path = results / f"{entry['time'].partition('T')[0]}.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    content[part] = entry
    ordered = {name: content[name] for name in PARTS if name in content}
    write_atomically(path, (json.dumps(ordered, indent=2) + "\n").encode())


if __name__ == "__main__":
    sys.exit(cli.run(main))
