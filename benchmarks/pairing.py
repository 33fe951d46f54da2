"""Row 1: pairing and mixing, against the direct formulation; growth with the batch.

Dimensions: B batch, T patch tokens, D width, E easy samples.
"""

import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch

from benchmarks import direct, harness
from benchmarks.harness import Row, Settings, Target
from benchmarks.inputs import KINDS, RHO, easy_samples, saliency
from benchmarks.memory import peak_extra_bytes
from benchmarks.timing import Timing, added, interleaved, ratio
from experiments.documents.markdown import aligned_table
from tokenmixup._assignment import by_lap
from tokenmixup.functional import assign_partners, decide_mixing, horizontal_mixup, saliency_gain

CASES = {"CCT, CIFAR": (128, 256, 256), "ViT-B/16, ImageNet": (504, 196, 768)}
"""B, T, D: the paper's batches, the second one over all of its processes."""
BATCHES = (64, 128, 256, 512, 1024, 2048)
LARGEST_DIRECT = 512
"""Beyond it the direct formulation's temporaries take more than a GiB."""
FILTERED = 0.5
"""Share of easy samples on the second curve."""
MEMORY_KIND = "usual"
EXTRA_MIB = 4
SPEED_UP, MIXUP_RATIO = 30, 1.3
_SAMPLE_SECONDS = 0.01


def make_pairing(form: str, kind: str, batch: int, patches: int) -> Callable[[], object]:
    """The pairing of a batch whose samples are all easy, in our form or the direct one."""
    values, easy = saliency(kind, batch, patches), easy_samples(batch, 1)
    if form == "direct":
        return lambda: direct.pairing(values, easy, RHO)
    return lambda: assign_partners(saliency_gain(values, easy, RHO))


def measure(settings: Settings) -> dict[str, Any]:
    """Pairing, the whole of horizontal_mixup, extra memory and the curve over B."""
    cases = {"tiny": (16, 25, 8)} if settings.quick else CASES
    batches = (8, 16) if settings.quick else BATCHES
    return {
        "rho": RHO,
        "kinds": KINDS,
        "filtered_share": FILTERED,
        "cases": [
            _case(settings, name, kind, *sizes) for name, sizes in cases.items() for kind in KINDS
        ],
        "curve": [_point(settings, batch, 25 if settings.quick else 256) for batch in batches],
    }


def _timed(
    actions: Mapping[str, Callable[[], object]], settings: Settings, rounds: int
) -> dict[str, Timing]:
    return interleaved(
        actions,
        settings.rounds(rounds),
        # the very first call takes so long that a value would be one call, from cold caches
        warm_up=2,
        least_seconds=0.0 if settings.quick else _SAMPLE_SECONDS,
    )


def _case(
    settings: Settings, name: str, kind: str, batch: int, patches: int, width: int
) -> dict[str, Any]:
    values, easy = saliency(kind, batch, patches), easy_samples(batch, 1)
    timings = _timed(
        {form: make_pairing(form, kind, batch, patches) for form in ("ours", "direct")},
        settings,
        21,
    )
    gain = saliency_gain(values, easy, RHO)
    solvers = _timed(
        {"ours": lambda: assign_partners(gain), "lapx": lambda: by_lap(gain)},
        settings,
        21,
    )
    tokens = torch.randn(batch, patches, width)
    targets = torch.eye(10)[torch.arange(batch) % 10]
    decision = decide_mixing(values, targets, easy, RHO)
    partner, mask = decision.partner, decision.mask
    mixing = _timed(
        {
            "whole": lambda: horizontal_mixup(tokens, targets, values, easy, RHO),
            "pairing": make_pairing("ours", kind, batch, patches),
            "where": lambda: torch.where(mask.unsqueeze(-1), tokens[partner], tokens),
        },
        settings,
        21,
    )
    parts = added(mixing["pairing"], mixing["where"])
    return {
        "case": name,
        "saliency": kind,
        "batch": batch,
        "patches": patches,
        "width": width,
        "tokens_mixed_share": mask.float().mean().item(),
        "pairing": {form: timing.record() for form, timing in timings.items()},
        "speed_up": ratio(timings["direct"], timings["ours"]),
        "solver": {name: timing.record() for name, timing in solvers.items()},
        "solver_speed_up": ratio(solvers["lapx"], solvers["ours"]),
        "extra_bytes": {
            form: peak_extra_bytes(make_pairing, form, kind, batch, patches)
            for form in ("ours", "direct")
            if kind == MEMORY_KIND and not settings.quick  # it does not depend on the values
        },
        "mixup": {part: timing.record() for part, timing in mixing.items()},
        "mixup_ratio": ratio(mixing["whole"], parts),
    }


def _point(settings: Settings, batch: int, patches: int) -> dict[str, Any]:
    values = saliency("usual", batch, patches)
    targets = torch.eye(10)[torch.arange(batch) % 10]
    everyone, some = easy_samples(batch, 1), easy_samples(batch, FILTERED)
    gain = saliency_gain(values, everyone, RHO)
    actions: dict[str, Callable[[], object]] = {
        "gain": lambda: saliency_gain(values, everyone, RHO),
        "assignment": lambda: assign_partners(gain),
        "ours": lambda: assign_partners(saliency_gain(values, everyone, RHO)),
        "ours_filtered": lambda: assign_partners(saliency_gain(values, some, RHO)),
        "decision": lambda: decide_mixing(values, targets, everyone, RHO),
        "decision_filtered": lambda: decide_mixing(values, targets, some, RHO),
    }
    if batch <= LARGEST_DIRECT:
        actions["direct"] = lambda: direct.pairing(values, everyone, RHO)
        actions["direct_filtered"] = lambda: direct.pairing(values, some, RHO)
    timings = _timed(actions, settings, 9 if batch <= LARGEST_DIRECT else 5)
    return {
        "batch": batch,
        "patches": patches,
        "timings": {name: timing.record() for name, timing in timings.items()},
    }


def tables(values: dict[str, Any]) -> str:
    """The cases, then the curve."""
    head = (
        *("case", "saliency", "direct (ms)", "ours (ms)", "times faster"),
        *("extra memory, direct (MiB)", "ours (MiB)", "whole / (pairing + where)"),
        *("assignment by lapx (ms)", "ours (ms)", "times faster"),
    )
    cases = [
        [
            f"{case['case']}: B={case['batch']}, T={case['patches']}",
            case["saliency"],
            harness.milliseconds(case["pairing"]["direct"]),
            harness.milliseconds(case["pairing"]["ours"]),
            harness.times(case["speed_up"], 1),
            harness.mebibytes(case["extra_bytes"].get("direct")),
            harness.mebibytes(case["extra_bytes"].get("ours")),
            harness.times(case["mixup_ratio"]),
            harness.milliseconds(case["solver"]["lapx"]),
            harness.milliseconds(case["solver"]["ours"]),
            harness.times(case["solver_speed_up"], 1),
        ]
        for case in values["cases"]
    ]
    names = ("gain", "assignment", "ours", "ours_filtered", "direct", "direct_filtered")
    filtered = f"{100 * values['filtered_share']:.0f}% easy"
    curve_head = (
        *("B", "gain (ms)", "assignment (ms)", "ours (ms)", f"ours, {filtered}"),
        *("direct (ms)", f"direct, {filtered}"),
    )
    curve = [
        [
            f"{point['batch']:,}",
            *(
                harness.milliseconds(point["timings"][name]) if name in point["timings"] else "–"
                for name in names
            ),
        ]
        for point in values["curve"]
    ]
    kinds = "; ".join(f"*{name}* is {text}" for name, text in values["kinds"].items())
    return (
        f"{aligned_table(head, cases, range(2, 11))}\nSaliency: {kinds}; rho = {values['rho']}.\n\n"
        f"{aligned_table(curve_head, curve, range(7))}"
    )


def targets(values: dict[str, Any]) -> list[Target]:
    """Of each case the kind of saliency that came out worst."""
    found = []
    for name in dict.fromkeys(case["case"] for case in values["cases"]):
        cases = [case for case in values["cases"] if case["case"] == name]
        sizes = f"B={cases[0]['batch']}, T={cases[0]['patches']}"
        slowest = min(cases, key=lambda case: case["speed_up"]["ratio"])
        speed_up = slowest["speed_up"]["ratio"]
        extra = max((case["extra_bytes"].get("ours") or 0) / 2**20 for case in cases)
        worst = max(case["mixup_ratio"]["ratio"] for case in cases)
        fastest = max(case["speed_up"]["ratio"] for case in cases)
        found += [
            Target(
                f"1. pairing, {sizes}",
                f"≥ {SPEED_UP} × faster",
                f"{speed_up:.1f} × ({slowest['saliency']}) to {fastest:.1f} ×",
                speed_up >= SPEED_UP,
            ),
            Target(
                f"1. extra memory, {sizes}",
                f"≤ {EXTRA_MIB} MiB",
                f"{extra:.1f} MiB",
                extra <= EXTRA_MIB,
            ),
            Target(
                f"1. horizontal_mixup, {sizes}",
                f"≤ {MIXUP_RATIO} × (pairing + where)",
                f"{worst:.2f} ×",
                worst <= MIXUP_RATIO,
            ),
        ]
    return found


ROW = Row("pairing", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(harness.main(ROW))
