"""Inputs of the functional benchmarks: saliency of several kinds.

Dimensions: B batch, T patch tokens.
"""

import torch
from torch import Tensor

RHO = 0.001
"""With it tokens move in every kind of saliency below."""

KINDS = {
    "smooth": "softmax of normal logits × 0.3",
    "usual": "softmax of normal logits × 1",
    "peaked": "softmax of normal logits × 3",
    "mixed": "softmax of normal logits × a factor from 0.3 to 4 of each sample's own",
}
"""What the rows of a saliency are, from nearly equal tokens to a few that have nearly all."""

_FACTORS = {"smooth": 0.3, "usual": 1.0, "peaked": 3.0}


def saliency(kind: str, batch: int, patches: int) -> Tensor:
    """(B, T), rows that sum to one, always the same."""
    generator = torch.Generator().manual_seed(batch + patches)
    logits = torch.randn(batch, patches, generator=generator)
    if kind == "mixed":
        logits = logits * torch.linspace(0.3, 4, batch).unsqueeze(1)
        logits = logits[torch.randperm(batch, generator=generator)]
    else:
        logits = logits * _FACTORS[kind]
    return logits.softmax(-1)


def easy_samples(batch: int, share: float) -> Tensor:
    """(B,) bool, so large a share of them, at random places; always the same."""
    generator = torch.Generator().manual_seed(batch)
    easy = torch.zeros(batch, dtype=torch.bool)
    easy[torch.randperm(batch, generator=generator)[: round(share * batch)]] = True
    return easy
