"""What TokenMixup decides for a batch, layer by layer, for pictures and analysis.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, H heads, C classes, E easy samples,
K kappa, L layers below a VTM layer (of its stage, where a host has stages).
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from tokenmixup import TokenMixupModel
from tokenmixup.functional import saliency_gain
from tokenmixup.horizontal import horizontal_step, scorenet_loss
from tokenmixup.hosts import unwrapped
from tokenmixup.hosts.base import input_saliency
from tokenmixup.vertical import remembering


@dataclass(frozen=True)
class HorizontalRecord:
    """The decision of one HTM layer."""

    layer: int
    saliency: np.ndarray
    """(B, T)."""
    difficulty: np.ndarray | None
    """(B,), or None without a ScoreNet."""
    easy: np.ndarray
    """(B,) bool."""
    gain: np.ndarray
    """(E, B): what each easy sample would gain from each sample, in the unit of the saliency."""
    partner: np.ndarray
    """(B,), a sample's own index where it is not mixed."""
    mask: np.ndarray
    """(B, T) bool: tokens that come from the partner."""
    targets: np.ndarray
    """(B, C) after mixing."""
    parts: np.ndarray
    """(B, B): of each sample's label after mixing, the share that each sample of the batch gave,
    here or at an earlier HTM layer; rows sum to 1."""


@dataclass(frozen=True)
class VerticalRecord:
    """What one layer below a VTM layer remembers."""

    layer: int
    saliency: np.ndarray
    """(B, T)."""
    positions: np.ndarray
    """(B, K) patch tokens, most salient first."""


@dataclass(frozen=True)
class AttentionRecord:
    """Where the attention of one VTM layer goes."""

    layer: int
    """Its index."""
    shares: np.ndarray
    """(B, H, N, 1 + L): the share of each query's attention that goes to the layer's own N tokens,
    then to the K that each lower layer remembers; these sum to 1."""


@dataclass(frozen=True)
class Recording:
    """What happened to a batch in one training pass, by layer, lowest first."""

    horizontal: list[HorizontalRecord] = field(default_factory=list)
    vertical: list[VerticalRecord] = field(default_factory=list)
    attention: list[AttentionRecord] = field(default_factory=list)

    def origin(self, layer: int) -> np.ndarray:
        """(B, T): the sample whose image stands where a token stands, after HTM up to a layer.

        A sample takes from a partner what the partner holds then, which may be a third sample's.
        T is that of the last HTM layer up to this one: a token that a host merged of several
        stands for the one at its centre.
        """
        batch, tokens = (self.horizontal or self.vertical)[0].saliency.shape
        origin = np.repeat(np.arange(batch)[:, None], tokens, axis=1)
        for record in self.horizontal:
            if record.layer <= layer:
                origin = resized(origin, record.mask.shape[1])
                origin = np.where(record.mask, origin[record.partner], origin)
        return origin

    def foreign(self, layer: int) -> np.ndarray:
        """(B, T): the tokens in whose place another sample's stand, after HTM up to a layer."""
        origin = self.origin(layer)
        return origin != np.arange(len(origin))[:, None]

    def mixed_at(self, layer: int) -> list[int]:
        """The HTM layers up to a layer that mixed anything."""
        return [one.layer for one in self.horizontal if one.layer <= layer and one.mask.any()]

    def mixed_text(self, layer: int) -> str:
        """The same for a caption, "" where there is none."""
        layers = self.mixed_at(layer)
        return f"layer{'s' * (len(layers) > 1)} {' and '.join(map(str, layers))}" * bool(layers)


def resized(values: np.ndarray, tokens: int) -> np.ndarray:
    """Values (B, T) of a square grid on another one, (B, tokens): the nearest one."""
    if values.shape[1] == tokens:
        return values
    old, new = math.isqrt(values.shape[1]), math.isqrt(tokens)
    assert (old * old, new * new) == (values.shape[1], tokens), "square grids"
    along = (2 * np.arange(new) + 1) * old // (2 * new)
    return values[:, (along[:, None] * old + along).ravel()]


class _Call(NamedTuple):
    """The tokens (B, N, D) that enter a layer, and the arguments of its call."""

    tokens: Tensor
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


@torch.no_grad()
def record(model: TokenMixupModel, images: Tensor, targets: Tensor) -> Recording:
    """Run one training pass with dropout off, and record what TokenMixup decides in it.

    The model's own rules decide again, from the tokens that enter each layer. The model is left as
    it came. Of a host that orders its tokens otherwise, they are recorded row by row.

    Args:
        model: with HTM, VTM or both.
        images: (B, 3, H, W).
        targets: soft targets, (B, C).
    """
    layers, rules = model.adapter.layers(model.backbone), model.rules
    recording = Recording()
    parts = torch.eye(len(targets), dtype=torch.float64, device=targets.device)
    memory: dict[int, list[tuple[Tensor, Tensor]]] = {}  # by stage
    for index, call in enumerate(_calls(model, layers, images, targets)):
        layer, htm, vtm = layers[index], model.horizontal, model.vertical
        raster = model.adapter.raster(unwrapped(model.backbone), index)
        order = slice(None) if raster is None else raster.numpy()
        layout = model.layouts[index]
        prefix, near = layout.num_prefix_tokens, memory.setdefault(layout.stage, [])
        if htm is not None and index in htm.layers:
            difficulty = None
            if htm.scorenet is not None:
                scorenet: Any = model.scorenets[str(index)]
                difficulty, _ = scorenet_loss(scorenet, call.tokens, targets, htm)
            measured = input_saliency(model.adapter, layout, layer, *call)
            step = horizontal_step(rules, index, targets, measured, difficulty, htm)
            saliency, decision, targets = step.saliency, step.decision, step.targets
            parts = rules.relabel(parts, step.weights, decision)
            call = call._replace(tokens=rules.mix(call.tokens, decision, prefix))
            recording.horizontal.append(
                HorizontalRecord(
                    layer=index,
                    saliency=_array(saliency)[:, order],
                    difficulty=None if difficulty is None else _array(difficulty),
                    easy=_array(step.easy),
                    gain=_array(saliency_gain(saliency, step.easy, htm.rho)),
                    partner=_array(decision.partner),
                    mask=_array(decision.mask)[:, order],
                    targets=_array(targets),
                    parts=_array(parts),
                )
            )
        if vtm is not None and index in vtm.layers:
            shares = _array(_attention_shares(model, layer, call, near))
            shares[:, :, prefix:] = shares[:, :, prefix:][:, :, order]
            recording.attention.append(AttentionRecord(index, shares))
        if vtm is not None and remembering(model.layouts, vtm, index):
            saliency = input_saliency(model.adapter, layout, layer, *call)
            positions = rules.choose(index, saliency, vtm.kappa)
            places = np.argsort(np.arange(saliency.shape[1])[order])
            recording.vertical.append(
                VerticalRecord(index, _array(saliency)[:, order], places[_array(positions)])
            )
            near.append((call.tokens, positions + prefix))
    return recording


def _calls(
    model: TokenMixupModel, layers: Sequence[nn.Module], images: Tensor, targets: Tensor
) -> list[_Call]:
    """What each layer is called with in a training pass, before TokenMixup's own hooks."""
    calls: list[_Call] = []

    def keep(_: nn.Module, args: Any, kwargs: Any) -> None:
        # a copy: a host may change its tokens in place
        calls.append(_Call(model.adapter.tokens(args, kwargs).clone(), args, kwargs))

    handles = [
        layer.register_forward_pre_hook(keep, prepend=True, with_kwargs=True) for layer in layers
    ]
    was_training = model.training
    for part in model.children():
        part.eval()  # dropout off
    model.training = True  # and TokenMixup on
    try:
        model(images, targets)
    finally:
        model.train(was_training)
        for handle in handles:
            handle.remove()
    return calls


def _attention_shares(
    model: TokenMixupModel, layer: nn.Module, call: _Call, memory: list[tuple[Tensor, Tensor]]
) -> Tensor:
    """Shares of a VTM layer's attention, (B, H, N, 1 + L).

    A remembered token has the key that this layer would give it at the token's own position,
    including position embedding and bias of the scores. So this computes keys of all tokens of a
    lower layer, and selects the remembered ones.

    `memory` holds, for each lower layer, its tokens (B, N, D) and the indices of the remembered
    ones (B, K).
    """
    adapter, rest = model.adapter, (call.args, call.kwargs, False)
    query, key, scale = adapter.query_key(layer, call.tokens, *rest)  # (B, H, N, d)
    bias = adapter.score_bias(layer, *rest)  # (B or 1, H, N, N)
    keys, biases = [key], [bias]
    for tokens, places in memory:
        _, key, _ = adapter.query_key(layer, tokens, *rest)
        keys.append(key.take_along_dim(places[:, None, :, None], dim=2))
        biases.append(None if bias is None else bias.take_along_dim(places[:, None, None], dim=3))
    sizes = [key.shape[2] for key in keys]
    shares = []
    for head in range(query.shape[1]):  # one at a time: the whole map may be large
        parts = []
        for key, extra in zip(keys, biases, strict=True):
            scores = (query[:, head] * scale) @ key[:, head].transpose(-2, -1)
            parts.append(scores if extra is None else scores + extra[:, head])
        attention = torch.cat(parts, dim=-1).softmax(-1, dtype=torch.float32)  # (B, N, N + L K)
        shares.append(torch.stack([part.sum(-1) for part in attention.split(sizes, -1)], -1))
    return torch.stack(shares, dim=1)


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.cpu().numpy()
