"""Row 1, the assignment alone: the library's solver against lapx, on the same gains.

Dimensions: B batch, T patch tokens.
"""

import sys
from typing import Any

import lap
import numpy as np
import torch
from torch import Tensor

from benchmarks import row
from benchmarks.pairing import CASES, KINDS, RHO, easy_samples, saliency, timed
from benchmarks.row import Row, Settings, Target
from benchmarks.timing import milliseconds, ratio, recorded, times
from experiments.documents.markdown import aligned_table
from tokenmixup.functional import assign_partners, saliency_gain


def measure(settings: Settings) -> dict[str, Any]:
    """The assignment for the gains of each kind of saliency, all samples easy."""
    cases = {"tiny": (16, 25, 8)} if settings.quick else CASES
    return {
        "rho": RHO,
        "cases": [
            _case(settings, name, kind, batch, patches)
            for name, (batch, patches, _) in cases.items()
            for kind in KINDS
        ],
    }


def _case(settings: Settings, name: str, kind: str, batch: int, patches: int) -> dict[str, Any]:
    gain = saliency_gain(saliency(kind, batch, patches), easy_samples(batch, 1), RHO)
    # lapx minimises float64 costs: it gets them ready-made, so that its time is its own
    cost = -gain.to(torch.float64).numpy()
    ours, theirs = assign_partners(gain), torch.from_numpy(_by_lapx(cost))
    assert torch.isclose(_total(gain, ours), _total(gain, theirs)), "both are exact"
    timings = timed(
        {"ours": lambda: assign_partners(gain), "lapx": lambda: _by_lapx(cost)}, settings, 41
    )
    return {
        "case": name,
        "saliency": kind,
        "batch": batch,
        "patches": patches,
        "assignment": recorded(timings),
        "speed_up": ratio(timings["lapx"], timings["ours"]),
    }


def _by_lapx(cost: np.ndarray) -> np.ndarray:
    """Column of each row, in int64: `lapjvr` is the fastest solver of lapx here (docs/log.md)."""
    _, columns = lap.lapjvr(cost, return_cost=False)
    return np.asarray(columns, dtype=np.int64)


def _total(gain: Tensor, columns: Tensor) -> Tensor:
    return gain.double().gather(1, columns.unsqueeze(1)).sum()


def tables(values: dict[str, Any]) -> str:
    """One line per case."""
    rows = [
        [
            f"{case['case']}: B={case['batch']}, T={case['patches']}",
            case["saliency"],
            milliseconds(case["assignment"]["lapx"]),
            milliseconds(case["assignment"]["ours"]),
            times(case["speed_up"], 1),
        ]
        for case in values["cases"]
    ]
    head = ("case", "saliency", "lapx (ms)", "ours (ms)", "times faster (95%)")
    return aligned_table(head, rows, (2, 3, 4))


def targets(values: dict[str, Any]) -> list[Target]:
    """Per size, at least as fast as lapx on every kind of gains."""
    found = []
    for name in dict.fromkeys(case["case"] for case in values["cases"]):
        cases = [case for case in values["cases"] if case["case"] == name]
        speed_ups = {case["saliency"]: case["speed_up"]["ratio"] for case in cases}
        slowest = min(speed_ups, key=speed_ups.__getitem__)
        found.append(
            Target(
                f"1. assignment, B={cases[0]['batch']}, T={cases[0]['patches']}",
                "≥ 1 × as fast as lapx",
                f"{speed_ups[slowest]:.1f} × ({slowest}) to {max(speed_ups.values()):.1f} ×",
                speed_ups[slowest] >= 1,
            )
        )
    return found


ROW = Row("solver", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(row.main(ROW))
