"""What TokenMixup did to a batch: its decisions, layer by layer, for pictures and analysis.

Dimensions: B batch, N tokens, T patch tokens, C classes, K kappa.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tokenmixup import TokenMixupModel
from tokenmixup.functional import (
    horizontal_mixup,
    query_key_saliency,
    salient_positions,
    sample_difficulty,
)


@dataclass(frozen=True)
class HorizontalRecord:
    """One HTM layer's decision."""

    layer: int
    saliency: Tensor
    """(B, T)."""
    difficulty: Tensor | None
    """(B,), or None without a ScoreNet."""
    easy: Tensor
    """(B,) bool."""
    partner: Tensor
    """(B,), a sample's own index where it is not mixed."""
    mask: Tensor
    """(B, T) bool: tokens that were taken from the partner."""
    targets: Tensor
    """(B, C) after the mixing."""


@dataclass(frozen=True)
class VerticalRecord:
    """What one layer below a VTM layer remembers."""

    layer: int
    saliency: Tensor
    """(B, T)."""
    positions: Tensor
    """(B, K) patch tokens, most salient first."""


@dataclass(frozen=True)
class Recording:
    """What happened to a batch in one training pass."""

    horizontal: list[HorizontalRecord]
    vertical: list[VerticalRecord]


@torch.no_grad()
def record(model: TokenMixupModel, images: Tensor, targets: Tensor) -> Recording:
    """Run a training pass with dropout off, and tell what TokenMixup decided in it.

    The decisions are computed once more from the tokens that entered each layer, by the same
    functions of `tokenmixup.functional`. The model is left as it came.

    Args:
        model: with HTM, VTM or both.
        images: (B, 3, H, W).
        targets: soft targets, (B, C).
    """
    layers = model.adapter.layers(model.backbone)
    raw: dict[int, Tensor] = {}
    mixed: dict[int, Tensor] = {}
    was_training = model.training
    model.eval()  # dropout off everywhere inside
    model.training = True  # and TokenMixup on
    try:
        with _layer_inputs(model, layers, raw, mixed):
            model(images, targets)
    finally:
        model.train(was_training)
    model_horizontal, model_vertical = model.horizontal, model.vertical
    horizontal, vertical = [], []
    for index in model_horizontal.layers if model_horizontal else ():
        assert model_horizontal is not None
        result = _horizontal(model, index, layers[index], raw[index], targets)
        targets = result.targets  # what the next HTM layer starts from
        horizontal.append(result)
    if model_vertical is not None:
        for index in range(model_vertical.layers[-1]):
            saliency = _saliency(model, layers[index], mixed[index])
            positions = salient_positions(saliency, model_vertical.kappa)
            vertical.append(VerticalRecord(index, saliency, positions))
    return Recording(horizontal, vertical)


def _horizontal(
    model: TokenMixupModel, index: int, layer: nn.Module, tokens: Tensor, targets: Tensor
) -> HorizontalRecord:
    config = model.horizontal
    assert config is not None
    saliency = _saliency(model, layer, tokens)
    difficulty = None
    easy = torch.ones(len(tokens), dtype=torch.bool, device=tokens.device)
    if config.scorenet is not None:
        assert config.tau is not None
        difficulty = sample_difficulty(model.scorenets[str(index)](tokens), targets)
        easy = difficulty <= config.tau
    result = horizontal_mixup(
        tokens, targets, saliency, easy, config.rho, model.layout.num_prefix_tokens
    )
    return HorizontalRecord(
        index, saliency, difficulty, easy, result.partner, result.mask, result.targets
    )


def _saliency(model: TokenMixupModel, layer: nn.Module, tokens: Tensor) -> Tensor:
    layout = model.layout
    query, key, scale = model.adapter.query_key(layer, tokens, (tokens,), {}, layout.class_token)
    return query_key_saliency(
        query, key, scale, layout.num_prefix_tokens, class_token=layout.class_token
    )


@contextmanager
def _layer_inputs(
    model: TokenMixupModel, layers: Any, raw: dict[int, Tensor], mixed: dict[int, Tensor]
) -> Iterator[None]:
    """Keep the tokens that enter each layer, before and after TokenMixup's own hooks."""

    def keeper(kept: dict[int, Tensor], index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            kept[index] = model.adapter.tokens(args, kwargs).clone()

        return hook

    handles = []
    for index, layer in enumerate(layers):
        first = layer.register_forward_pre_hook(keeper(raw, index), prepend=True, with_kwargs=True)
        last = layer.register_forward_pre_hook(keeper(mixed, index), with_kwargs=True)
        handles += [first, last]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
