"""Row 1: pairing and mixing, against the direct formulation; growth with the batch.

Dimensions: B batch, T patch tokens, D width, E easy samples.
"""

import gc
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import direct, row
from benchmarks.row import Row, Settings, Target
from benchmarks.timing import (
    Timing,
    added,
    interleaved,
    mebibytes,
    milliseconds,
    ratio,
    recorded,
    times,
)
from experiments.documents.markdown import aligned_table
from tokenmixup.functional import assign_partners, decide_mixing, horizontal_mixup, saliency_gain

RHO = 0.001
"""With it, tokens are mixed in every kind of saliency below."""
KINDS = {
    "smooth": "softmax of normal logits × 0.3",
    "usual": "softmax of normal logits × 1",
    "peaked": "softmax of normal logits × 3",
    "sharp": "softmax of normal logits × 5",
    "sharpest": "softmax of normal logits × 8",
    "mixed": "softmax of normal logits × one factor per sample, from 0.3 to 4",
    "one-hot": "one token has all",
    "rank one": "softmax of the same normal logits × one number per sample, from 0 to 1",
}
"""The rows of a saliency, from nearly equal tokens to a few tokens that hold nearly all of it."""
_FACTORS = {"smooth": 0.3, "usual": 1.0, "peaked": 3.0, "sharp": 5.0, "sharpest": 8.0}

CASES = {"CCT, CIFAR": (128, 256, 256), "ViT-B/16, ImageNet": (504, 196, 768)}
"""B, T, D: the paper's batches, the second one summed over all of its processes."""
BATCHES = (64, 128, 256, 512, 1024, 2048)
LARGEST_DIRECT = 512
"""Above it, the direct formulation's temporaries take more than a GiB."""
FILTERED = 0.5
"""Share of easy samples in the second curve."""
TYPICAL = "usual"
SPEED_UPS = {"CCT, CIFAR": 15, "ViT-B/16, ImageNet": 25}
"""Of the typical saliency; no kind may be slower than the direct formulation, nor a smoke run."""
EXTRA_MIB = 4
MIXUP_RATIO = 1.3
_SAMPLE_SECONDS = 0.01


def saliency(kind: str, batch: int, patches: int) -> Tensor:
    """(B, T), rows that sum to one, or to less for rank one; the same on every call."""
    generator = torch.Generator().manual_seed(batch + patches)
    if kind == "one-hot":
        return torch.eye(patches)[torch.randint(patches, (batch,), generator=generator)]
    if kind == "rank one":
        row = torch.randn(patches, generator=generator).softmax(-1)
        return torch.rand(batch, 1, generator=generator) * row
    logits = torch.randn(batch, patches, generator=generator)
    if kind == "mixed":
        logits = logits * torch.linspace(0.3, 4, batch).unsqueeze(1)
        logits = logits[torch.randperm(batch, generator=generator)]
    else:
        logits = logits * _FACTORS[kind]
    return logits.softmax(-1)


def easy_samples(batch: int, share: float) -> Tensor:
    """(B,) bool with this share of easy samples at random places; the same on every call."""
    generator = torch.Generator().manual_seed(batch)
    easy = torch.zeros(batch, dtype=torch.bool)
    easy[torch.randperm(batch, generator=generator)[: round(share * batch)]] = True
    return easy


_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_ALLOCATOR = {
    # map blocks from 64 KiB on one by one, and unmap them when they are freed
    "MALLOC_MMAP_THRESHOLD_": "65536",
    "MALLOC_TRIM_THRESHOLD_": "65536",
    "MALLOC_TOP_PAD_": "0",
}


def peak_extra_bytes(make_action: Callable[..., Callable[[], object]], *args: Any) -> int | None:
    """Peak resident memory of an action above the memory before it; None if it is unknown.

    A new process runs the action twice to warm up, has the kernel reset the high-water mark of its
    resident memory, runs the action again and reads the mark, three times. The median counts
    everything: tensors, NumPy's arrays, a solver's own allocations, and the result. The C library
    returns large blocks to the kernel at once there, since otherwise a warm process would reuse its
    old temporaries and seem to need none. About 0.2 MiB is noise.

    Args:
        make_action: makes the action in the new process, from `args`; a module's function.
        args: arguments that can be pickled.
    """
    if not _CLEAR.exists():
        return None  # not Linux
    before = dict(os.environ)
    os.environ.update(_ALLOCATOR)
    try:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            return pool.submit(_peak_here, make_action, args).result()
    finally:
        os.environ.clear()
        os.environ.update(before)


def _peak_here(make_action: Callable[..., Callable[[], object]], args: tuple[Any, ...]) -> int:
    action = make_action(*args)
    action()
    action()
    found = []
    for _ in range(3):
        gc.collect()
        _CLEAR.write_text("5")
        before = _status("VmRSS")
        result = action()
        found.append(max(0, _status("VmHWM") - before))
        del result
    return int(statistics.median(found))


def _status(name: str) -> int:
    line = next(line for line in _STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def make_pairing(form: str, kind: str, batch: int, patches: int) -> Callable[[], object]:
    """The pairing of a batch of easy samples, in the library's form or the direct one."""
    values, easy = saliency(kind, batch, patches), easy_samples(batch, 1)
    if form == "direct":
        return lambda: direct.pairing(values, easy, RHO)
    return lambda: assign_partners(saliency_gain(values, easy, RHO))


def measure(settings: Settings) -> dict[str, Any]:
    """Pairing, horizontal_mixup as a whole, extra memory, and the curve over B."""
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


def timed(
    actions: Mapping[str, Callable[[], object]],
    settings: Settings,
    rounds: int,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Timing]:
    """`interleaved`, with several calls per value of what takes less than ten milliseconds."""
    return interleaved(
        actions,
        settings.rounds(rounds),
        # after one round alone, the slow first call would allow one call per value
        warm_up=2,
        least_seconds=0.0 if settings.quick else _SAMPLE_SECONDS,
        clock=clock,
    )


def _case(
    settings: Settings, name: str, kind: str, batch: int, patches: int, width: int
) -> dict[str, Any]:
    values, easy = saliency(kind, batch, patches), easy_samples(batch, 1)
    timings = timed(
        {form: make_pairing(form, kind, batch, patches) for form in ("ours", "direct")},
        settings,
        21,
    )
    tokens = torch.randn(batch, patches, width)
    targets = torch.eye(10)[torch.arange(batch) % 10]
    decision = decide_mixing(values, targets, easy, RHO)
    partner, mask = decision.partner, decision.mask
    mixing = timed(
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
        "pairing": recorded(timings),
        "speed_up": ratio(timings["direct"], timings["ours"]),
        "extra_bytes": {
            form: peak_extra_bytes(make_pairing, form, kind, batch, patches)
            for form in ("ours", "direct")
            if kind == TYPICAL and not settings.quick  # memory does not depend on the values
        },
        "mixup": recorded(mixing),
        "mixup_ratio": ratio(mixing["whole"], parts),
    }


def _point(settings: Settings, batch: int, patches: int) -> dict[str, Any]:
    values = saliency("usual", batch, patches)
    everyone, some = easy_samples(batch, 1), easy_samples(batch, FILTERED)
    gain = saliency_gain(values, everyone, RHO)
    actions: dict[str, Callable[[], object]] = {
        "gain": lambda: saliency_gain(values, everyone, RHO),
        "assignment": lambda: assign_partners(gain),
        "ours": lambda: assign_partners(saliency_gain(values, everyone, RHO)),
        "ours_filtered": lambda: assign_partners(saliency_gain(values, some, RHO)),
    }
    if batch <= LARGEST_DIRECT:
        actions["direct"] = lambda: direct.pairing(values, everyone, RHO)
        actions["direct_filtered"] = lambda: direct.pairing(values, some, RHO)
    timings = timed(actions, settings, 9 if batch <= LARGEST_DIRECT else 5)
    return {"batch": batch, "patches": patches, "timings": recorded(timings)}


def tables(values: dict[str, Any]) -> str:
    """The cases, then the curve with its figure."""
    head = (
        *("case", "saliency", "direct (ms)", "ours (ms)", "times faster"),
        *("extra memory, direct (MiB)", "ours (MiB)", "whole / (pairing + where)"),
    )
    cases = [
        [
            f"{case['case']}: B={case['batch']}, T={case['patches']}",
            case["saliency"],
            milliseconds(case["pairing"]["direct"]),
            milliseconds(case["pairing"]["ours"]),
            times(case["speed_up"], 1),
            mebibytes(case["extra_bytes"].get("direct")),
            mebibytes(case["extra_bytes"].get("ours")),
            times(case["mixup_ratio"]),
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
                milliseconds(point["timings"][name]) if name in point["timings"] else "–"
                for name in names
            ),
        ]
        for point in values["curve"]
    ]
    kinds = "; ".join(f"*{name}* is {text}" for name, text in values["kinds"].items())
    return (
        f"{aligned_table(head, cases, range(2, 8))}\nSaliency: {kinds}; rho = {values['rho']}.\n\n"
        f"{aligned_table(curve_head, curve, range(7))}{_growth(values['curve'])}"
        "\n![Time of pairing over the batch](figures/performance_pairing.svg)\n"
    )


def _growth(curve: Sequence[Mapping[str, Any]]) -> str:
    """How pairing grows with the batch, in words."""
    seconds = {point["batch"]: point["timings"]["ours"]["seconds"] for point in curve}
    small, large = (
        min(seconds, key=lambda b: abs(b - 128)),
        min(seconds, key=lambda b: abs(b - 512)),
    )
    return (
        f"\n{large} images of {curve[0]['patches']} tokens take "
        f"{seconds[large] / seconds[small]:.0f} times as long as {small}.\n"
    )


def targets(values: dict[str, Any]) -> list[Target]:
    """Per case, the typical saliency and the one with the worst result."""
    found = []
    for name in dict.fromkeys(case["case"] for case in values["cases"]):
        cases = [case for case in values["cases"] if case["case"] == name]
        sizes = f"B={cases[0]['batch']}, T={cases[0]['patches']}"
        speed_ups = {case["saliency"]: case["speed_up"]["ratio"] for case in cases}
        slowest, wanted = min(speed_ups, key=speed_ups.__getitem__), SPEED_UPS.get(name, 1)
        measured = (
            f"{speed_ups[TYPICAL]:.1f} ×; {speed_ups[slowest]:.1f} × ({slowest}) to "
            f"{max(speed_ups.values()):.1f} ×"
        )
        extra = max((case["extra_bytes"].get("ours") or 0) / 2**20 for case in cases)
        worst = max(case["mixup_ratio"]["ratio"] for case in cases)
        whole, of = f"1. horizontal_mixup, {sizes}", f"≤ {MIXUP_RATIO} × (pairing + where)"
        memory = f"1. extra memory, {sizes}"
        found += [
            Target(
                f"1. pairing, {sizes}",
                f"{TYPICAL} ≥ {wanted} × faster, all ≥ 1 ×",
                measured,
                speed_ups[TYPICAL] >= wanted and speed_ups[slowest] >= 1,
            ),
            Target(memory, f"≤ {EXTRA_MIB} MiB", f"{extra:.1f} MiB", extra <= EXTRA_MIB),
            Target(whole, of, f"{worst:.2f} ×", worst <= MIXUP_RATIO),
        ]
    return found


ROW = Row("pairing", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(row.main(ROW))
