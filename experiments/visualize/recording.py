"""What TokenMixup did to a batch: its decisions, layer by layer, for pictures and analysis.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, H heads, C classes, E easy samples,
K kappa, L layers below a VTM layer.
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
    saliency_gain,
    salient_positions,
    sample_difficulty,
)
from tokenmixup.hosts.base import input_saliency


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
    gain: Tensor
    """(E, B): what each easy sample would gain from each sample, in the unit of the saliency."""
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
class AttentionRecord:
    """Where the attention of one VTM layer goes."""

    layer: int
    sources: tuple[int, ...]
    """The L layers below it, lowest first."""
    shares: Tensor
    """(B, H, N, 1 + L): of the attention of each query, the share that goes to the layer's own
    tokens, then to those that each lower layer remembers; these sum to 1."""
    tokens: tuple[int, ...]
    """(1 + L): how many tokens each of these shares is spread over."""


@dataclass(frozen=True)
class Recording:
    """What happened to a batch in one training pass."""

    horizontal: list[HorizontalRecord]
    vertical: list[VerticalRecord]
    attention: list[AttentionRecord]


@dataclass(frozen=True)
class _Call:
    """What a layer was called with; its tokens are a copy."""

    tokens: Tensor
    args: Any
    kwargs: Any


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
    raw: dict[int, _Call] = {}
    mixed: dict[int, _Call] = {}
    was_training = model.training
    model.eval()  # dropout off everywhere inside
    model.training = True  # and TokenMixup on
    try:
        with _layer_inputs(model, layers, raw, mixed):
            model(images, targets)
    finally:
        model.train(was_training)
    horizontal, vertical, attention = [], [], []
    for index in model.horizontal.layers if model.horizontal else ():
        result = _horizontal(model, index, layers[index], raw[index], targets)
        targets = result.targets  # what the next HTM layer starts from
        horizontal.append(result)
    if model.vertical is not None:
        for index in range(model.vertical.layers[-1]):
            saliency = _saliency(model, layers[index], mixed[index])
            positions = salient_positions(saliency, model.vertical.kappa)
            vertical.append(VerticalRecord(index, saliency, positions))
        attention = [
            _attention(model, index, layers[index], mixed, vertical[:index])
            for index in model.vertical.layers
        ]
    return Recording(horizontal, vertical, attention)


def _horizontal(
    model: TokenMixupModel, index: int, layer: nn.Module, call: _Call, targets: Tensor
) -> HorizontalRecord:
    config = model.horizontal
    assert config is not None
    tokens, saliency = call.tokens, _saliency(model, layer, call)
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
        layer=index,
        saliency=saliency,
        difficulty=difficulty,
        easy=easy,
        gain=saliency_gain(saliency, easy, config.rho),
        partner=result.partner,
        mask=result.mask,
        targets=result.targets,
    )


def _saliency(model: TokenMixupModel, layer: nn.Module, call: _Call) -> Tensor:
    place = model.adapter, model.layout, layer
    return input_saliency(*place, call.tokens, call.args, call.kwargs)


def _attention(
    model: TokenMixupModel,
    index: int,
    layer: nn.Module,
    calls: dict[int, _Call],
    below: list[VerticalRecord],
) -> AttentionRecord:
    """The attention of a VTM layer, one head at a time, summed over each group of keys.

    A remembered token has the key that this layer would give it at its own place, position
    embedding and bias of the scores included. So all tokens of the lower layer get keys here, and
    those that were chosen are picked out.
    """
    own, adapter = calls[index], model.adapter
    given = (own.args, own.kwargs, False)
    query, own_key, scale = adapter.query_key(layer, own.tokens, *given)
    bias = adapter.score_bias(layer, *given)  # (B or 1, H, N, N)
    keys = [own_key]
    biases = [] if bias is None else [bias]
    for record in below:
        places = record.positions + model.layout.num_prefix_tokens  # (B, K)
        _, key, _ = adapter.query_key(layer, calls[record.layer].tokens, *given)
        rows = places[:, None, :, None].expand(-1, key.shape[1], -1, key.shape[-1])
        keys.append(key.gather(2, rows))
        if bias is not None:
            whole = bias.expand(len(places), -1, -1, -1)
            columns = places[:, None, None, :].expand(-1, *whole.shape[1:3], -1)
            biases.append(whole.gather(3, columns))
    tokens = tuple(key.shape[2] for key in keys)
    shares = []
    for head in range(query.shape[1]):
        scores = [(query[:, head] * scale) @ key[:, head].transpose(-2, -1) for key in keys]
        if biases:
            scores = [part + more[:, head] for part, more in zip(scores, biases, strict=True)]
        attention = torch.cat(scores, dim=-1).softmax(-1, dtype=torch.float32)  # (B, N, N + L K)
        shares.append(torch.stack([part.sum(-1) for part in attention.split(tokens, -1)], -1))
    sources = tuple(record.layer for record in below)
    return AttentionRecord(index, sources, torch.stack(shares, dim=1), tokens)


@contextmanager
def _layer_inputs(
    model: TokenMixupModel, layers: Any, raw: dict[int, _Call], mixed: dict[int, _Call]
) -> Iterator[None]:
    """Keep what each layer is called with, before and after TokenMixup's own hooks."""

    def keeper(kept: dict[int, _Call], index: int) -> Any:
        def hook(_: nn.Module, args: Any, kwargs: Any) -> None:
            kept[index] = _Call(model.adapter.tokens(args, kwargs).clone(), args, kwargs)

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
