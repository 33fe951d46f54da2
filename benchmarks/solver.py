"""Row 1, the assignment alone: the library's solver against lapx, on the same gains.

Times are the processor's: both solvers use one core, and wait for nothing.

Dimensions: B batch, T patch tokens.
"""

import functools
import sys
import time
from typing import Any

import lap
import numpy as np
import timm
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import Tensor

from benchmarks import pairing, row
from benchmarks.pairing import RHO, easy_samples, timed
from benchmarks.row import Row, Settings, Target
from benchmarks.saliency import attention_saliency_of
from benchmarks.timing import milliseconds, ratio, recorded, times
from experiments.documents.markdown import aligned_table
from tokenmixup import HorizontalConfig, attach
from tokenmixup.functional import assign_partners, saliency_gain

BATCHES, PATCHES = (126, 504, 1024), 196
TRAINED = {
    "trained, class token": "a ViT of width 64 after three epochs on handwritten digits",
    "trained, mean": "the same without a class token",
}
KINDS = {**pairing.KINDS, **TRAINED, "integers": "gains from 0 to 3, without a saliency"}
LEAST = 1 / 1.2
"""As fast as lapx, or nearly, where its first pass finds all partners."""


def measure(settings: Settings) -> dict[str, Any]:
    """The assignment for each kind of gains, all samples easy."""
    batches = (16,) if settings.quick else BATCHES
    return {
        "rho": RHO,
        "kinds": KINDS,
        "cases": [_case(settings, kind, batch) for batch in batches for kind in KINDS],
    }


def gains(kind: str, batch: int, quick: bool = False) -> Tensor:
    """(B, B), the same on every call."""
    if kind == "integers":
        generator = torch.Generator().manual_seed(batch)
        return torch.randint(0, 4, (batch, batch), generator=generator).float()
    if kind in TRAINED:
        values = trained_saliency("class token" in kind, quick)[:batch]
    else:
        values = pairing.saliency(kind, batch, PATCHES)
    return saliency_gain(values, easy_samples(batch, 1), RHO)


@functools.cache
def trained_saliency(class_token: bool, quick: bool) -> Tensor:
    """Saliency (B, T) of digits at the second layer of a small ViT that was trained on them."""
    digits, labels = load_digits(return_X_y=True)
    images = F.interpolate(torch.from_numpy(digits).float().view(-1, 1, 8, 8) / 8 - 1, size=56)
    targets = F.one_hot(torch.from_numpy(labels)).float()
    number, epochs = (64, 1) if quick else (len(images), 3)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        options: dict[str, Any] = {"img_size": 56, "patch_size": 4, "in_chans": 1}
        options |= {"num_classes": 10, "embed_dim": 64, "depth": 3, "num_heads": 4}
        if not class_token:
            options |= {"class_token": False, "global_pool": "avg"}
        host = timm.create_model("vit_tiny_patch16_224", **options)
        model = attach(host, horizontal=HorizontalConfig(layers=(1,), rho=RHO, tau=0.05))
        optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        for _ in range(epochs):
            for chosen in torch.randperm(number).split(32):
                loss = model(images[chosen], targets[chosen]).loss()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
    return attention_saliency_of(model.eval(), images[: max(BATCHES)])()


def _case(settings: Settings, kind: str, batch: int) -> dict[str, Any]:
    gain = gains(kind, batch, settings.quick)
    # lapx minimises float64 costs: it gets them ready-made, so that its time is its own
    cost = -gain.to(torch.float64).numpy()
    ours, theirs = assign_partners(gain), torch.from_numpy(_by_lapx(cost))
    assert torch.isclose(_total(gain, ours), _total(gain, theirs)), "both are exact"
    timings = timed(
        {"ours": lambda: assign_partners(gain), "lapx": lambda: _by_lapx(cost)},
        settings,
        41,
        time.process_time,
    )
    return {
        "saliency": kind,
        "batch": batch,
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
    """One line per case, and the kinds."""
    rows = [
        [
            f"{case['batch']:,}",
            case["saliency"],
            milliseconds(case["assignment"]["lapx"]),
            milliseconds(case["assignment"]["ours"]),
            times(case["speed_up"], 1),
        ]
        for case in values["cases"]
    ]
    head = ("B", "saliency", "lapx (ms)", "ours (ms)", "times faster (95%)")
    kinds = "; ".join(f"*{name}* is {text}" for name, text in values["kinds"].items())
    return f"{aligned_table(head, rows, (0, 2, 3, 4))}\nSaliency: {kinds}; rho = {values['rho']}.\n"


def targets(values: dict[str, Any]) -> list[Target]:
    """Per size, nearly as fast as lapx or faster on every kind of gains."""
    found = []
    for batch in dict.fromkeys(case["batch"] for case in values["cases"]):
        cases = [case for case in values["cases"] if case["batch"] == batch]
        speed_ups = {case["saliency"]: case["speed_up"]["ratio"] for case in cases}
        slowest = min(speed_ups, key=speed_ups.__getitem__)
        found.append(
            Target(
                f"1. assignment, B={batch}",
                f"≥ {LEAST:.2f} × as fast as lapx",
                f"{speed_ups[slowest]:.1f} × ({slowest}) to {max(speed_ups.values()):.1f} ×",
                speed_ups[slowest] >= LEAST,
            )
        )
    return found


ROW = Row("solver", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(row.main(ROW))
