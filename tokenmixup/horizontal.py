"""Horizontal TokenMixup: one layer's step, and the paper's wrapper layer around it.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, D width, H heads, C classes.
"""

import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmixup._precision import without_autocast_cache
from tokenmixup._session import in_backward
from tokenmixup._statistics import Statistics
from tokenmixup._targets import soft_targets
from tokenmixup._watch import Watch
from tokenmixup.config import HorizontalConfig, ScoreNetType
from tokenmixup.functional import (
    DIFFICULTY_SCALE,
    MixingDecision,
    attention_saliency,
    expected_log_likelihood,
    label_share,
)
from tokenmixup.rules import Rules
from tokenmixup.scorenet import ScoreNet

logger = logging.getLogger(__name__)
_PAPER = Rules()
_MOST_OFF = 1.5
"""Greatest factor between the aspect ratios of a grid and of its image, or of a pooled grid."""


@dataclass
class HorizontalStep:
    """The result of Horizontal TokenMixup at one layer, for one batch.

    Attributes:
        saliency: by which it was decided, (B, T).
        easy: (B,) bool.
        decision: partners (B,) and token mask (B, T).
        weights: of the tokens in the mixed labels, (B, T): saliency or ones, by the settings.
        targets: relabelled targets, (B, C).
        stats: 0-d tensors on the model's device, by name; computed when they are read.
    """

    saliency: Tensor
    easy: Tensor
    decision: MixingDecision
    weights: Tensor
    targets: Tensor
    stats: Mapping[str, Tensor]


def scorenet_loss(
    scorenet: ScoreNet, tokens: Tensor, targets: Tensor, config: HorizontalConfig
) -> tuple[Tensor, Tensor]:
    """Difficulty ``d = CE(ScoreNet(x), y) / 10``, without gradient, and the loss ``lambda * CE``.

    Both are of each sample, (B,).
    """
    logits = scorenet(tokens.detach() if config.scorenet_stop_gradient else tokens)
    likelihood = expected_log_likelihood(logits, targets)  # -CE
    return likelihood.detach() / -DIFFICULTY_SCALE, -config.scorenet_lambda * likelihood


@torch.no_grad()
def horizontal_step(
    rules: Rules,
    layer: int,
    targets: Tensor,
    saliency: Tensor,
    difficulty: Tensor | None,
    config: HorizontalConfig,
) -> HorizontalStep:
    """Difficulty, partners, mask and relabelling of one layer.

    Args:
        rules: the decisions.
        layer: index of the layer.
        targets: soft targets before this layer's mixing, (B, C).
        saliency: of the layer's unmixed tokens, (B, T).
        difficulty: of each sample, (B,); None makes every sample easy.
        config: thresholds, and what a token weighs in a label.

    Raises:
        ValueError: the batch is empty.
    """
    if not len(targets):
        raise ValueError(
            "the batch has no samples: there is nothing to mix, and a mean loss over it is not a "
            "number. Leave empty batches out of the training"
        )
    if difficulty is None:
        easy = torch.ones(targets.shape[0], dtype=torch.bool, device=targets.device)
    else:
        assert config.tau is not None, "HorizontalConfig checks that ScoreNet comes with tau"
        easy = difficulty <= config.tau
    saliency = rules.saliency(layer, saliency)
    decision = rules.decide(layer, saliency, targets, easy, config.rho)
    weights = saliency if config.labels == "saliency" else torch.ones_like(saliency)
    return HorizontalStep(
        saliency,
        easy,
        decision,
        weights,
        rules.relabel(targets, weights, decision),
        Statistics(partial(_statistics, saliency, easy, difficulty, decision, weights)),
    )


def _statistics(
    saliency: Tensor,
    easy: Tensor,
    difficulty: Tensor | None,
    decision: MixingDecision,
    weights: Tensor,
) -> dict[str, Tensor]:
    """The numbers by which to choose tau and rho, as 0-d tensors: no device synchronisation."""
    mask, batch = decision.mask, len(easy)
    num_easy = easy.sum()
    at_least_one = num_easy.clamp_min(1)
    largest, place = saliency.max(1)
    total = saliency.sum(1).clamp_min(torch.finfo(saliency.dtype).tiny)
    difference = (saliency.index_select(0, decision.partner) - saliency).abs().mean(1)
    possible = (saliency.amax(0) - saliency).amax(1)
    stats = {
        "easy_share": num_easy / batch,
        "mixed_share": mask.any(1).sum() / batch,
        "tokens_mixed": mask.sum() / at_least_one,
        "label_share": label_share(weights, decision).sum() / at_least_one,
        "largest_saliency_share": (largest / total).mean(),
        "same_place_share": (place == place.unsqueeze(1)).sum(1).max() / batch,
        "saliency_difference_max": (possible * easy).max(),
        "saliency_difference_mean": (difference * easy).sum() / at_least_one,
    }
    if difficulty is not None:
        stats["difficulty_min"] = difficulty.min()
        stats["difficulty_mean"] = difficulty.mean()
    return stats


_POOLINGS: dict[str, ScoreNetType] = {
    "average_pooling": "average",
    "global_average_pooling": "average",
    "attention_pooling": "attention",
    "cls_pooling": "cls",
}


class HorizontalTokenMixupLayer(nn.Module):
    """The paper's wrapper: mixes the input tokens of an encoder layer in training.

    The wrapped ``layer`` is called ``layer(x, y, *args, **kwargs)``, returns ``(x, y)`` and offers
    ``get_attention_map(x, y, *args, **kwargs)`` -> (B, H, Q, K). In evaluation the layer alone
    runs. With ScoreNet, y leaves as ``(targets, loss)``: ``targets`` (B, C) and the loss of each
    sample (B,), lambda applied, summed over all such layers; a plain ``targets`` or such a tuple
    may come in. Add ``loss.mean()`` to the training loss. Without ScoreNet y stays as it came,
    with mixed targets.

    Args:
        layer: the encoder layer.
        tau: difficulty threshold.
        rho: saliency difference threshold.
        d_model: D.
        num_classes: C.
        use_scorenet: whether only easy samples are mixed; False mixes every sample.
        scorenet_lambda: weight of ScoreNet's loss.
        scorenet_type: ``average_pooling`` (or ``global_average_pooling``), ``attention_pooling``
            or ``cls_pooling``.
        scorenet_stopgrad: keep ScoreNet's gradient out of the model.
        aspect_ratio: W / H of the token grid, needed where the map has other keys than queries
            (pooled keys): saliency over the keys is resized to the grid of the queries. Each grid
            is the one of so many tokens whose W / H is nearest, of keys to that of the queries.
        batch_first: tokens are (B, N, D) if True, (N, B, D) if False.
        has_cls: whether there is a class token.
        cls_first: whether the class token is the first token (or else the last).
        report_every: training steps between reports; compiled steps are neither counted nor
            reported.
        layer_name: name in reports.
        verbose: report difficulty, saliency difference and counts through ``logging`` (INFO).

    Raises:
        ValueError: an argument is out of its range, or the layer has no ``get_attention_map``.
    """

    def __init__(
        self,
        layer: nn.Module,
        tau: float,
        rho: float,
        d_model: int,
        num_classes: int,
        use_scorenet: bool = True,
        scorenet_lambda: float = 0.001,
        scorenet_type: str = "average_pooling",
        scorenet_stopgrad: bool = False,
        aspect_ratio: float = 1.0,
        batch_first: bool = True,
        has_cls: bool = True,
        cls_first: bool = True,
        report_every: int = 50,
        layer_name: str | None = None,
        verbose: bool = True,
    ) -> None:
        super().__init__()
        if scorenet_type not in _POOLINGS:
            raise ValueError(
                f"scorenet_type must be one of {', '.join(_POOLINGS)}, got {scorenet_type!r}"
            )
        if use_scorenet and scorenet_type == "cls_pooling" and not has_cls:
            raise ValueError("scorenet_type 'cls_pooling' reads the class token, but has_cls=False")
        if not callable(getattr(layer, "get_attention_map", None)):
            raise ValueError(
                "layer must have a method get_attention_map(x, y, *args, **kwargs) -> "
                f"(B, H, Q, K), from which saliency is read; {type(layer).__name__} has none"
            )
        if not 0 < aspect_ratio < float("inf"):
            raise ValueError(f"aspect_ratio (W / H) must be > 0, got {aspect_ratio}")
        if report_every < 1:
            raise ValueError(f"report_every must be >= 1 training steps, got {report_every}")
        self.layer = layer
        self.d_model = d_model
        self.num_classes = num_classes
        pooling = _POOLINGS[scorenet_type]
        self.config = HorizontalConfig(
            layers=(0,),  # only the encoder that holds the wrapper knows which layer this is
            tau=tau,
            rho=rho,
            scorenet=pooling if use_scorenet else None,
            scorenet_lambda=scorenet_lambda,
            scorenet_stop_gradient=scorenet_stopgrad,
        )
        self.num_prefix_tokens = int(has_cls)
        self.scorenet = (
            ScoreNet(d_model, num_classes, pooling, self.num_prefix_tokens, has_cls)
            if use_scorenet
            else None
        )
        self.aspect_ratio = aspect_ratio
        self.batch_first = batch_first
        self.cls_first = cls_first or not has_cls
        self.report_every = report_every
        self.layer_name = layer_name
        self.verbose = verbose
        self.steps = 0
        self._watch = Watch(self.config)

    def forward(self, x: Tensor, y: Any, *args: Any, **kwargs: Any) -> tuple[Tensor, Any]:
        """Mix x and y in training, then call the wrapped layer on them.

        Args:
            x: tokens, (B, N, D) or (N, B, D).
            y: soft targets (B, C), class indices (B,), which are made one-hot in training, or
                ``(targets, loss)`` as an earlier such layer left it.
            *args: passed on to the layer.
            **kwargs: passed on to the layer.
        """
        if not self.training:
            return self.layer(x, y, *args, **kwargs)
        earlier_loss: Tensor | None
        targets, earlier_loss = y if isinstance(y, tuple) else (y, None)
        tokens = self._canonical(x)
        targets = soft_targets(targets, tokens.shape[0], self.num_classes)
        with torch.no_grad(), without_autocast_cache(tokens.device.type):
            attention = cast(Any, self.layer).get_attention_map(x, y, *args, **kwargs)
        saliency = self._saliency(attention, tokens)

        difficulty, loss = None, earlier_loss
        if self.scorenet is not None:
            difficulty, loss = scorenet_loss(self.scorenet, tokens, targets, self.config)
            loss = loss if earlier_loss is None else earlier_loss + loss
        step = horizontal_step(_PAPER, 0, targets, saliency, difficulty, self.config)
        mixed = self._original(_PAPER.mix(tokens, step.decision, self.num_prefix_tokens))
        self._report(step)
        name = self.layer_name or "the wrapped layer"
        relabelled = self._watch.observe(name, self.scorenet, targets, step)
        carried = relabelled if loss is None else (relabelled, loss)
        return self.layer(mixed, carried, *args, **kwargs)

    def _canonical(self, x: Tensor) -> Tensor:
        """To (B, N, D) with the class token first."""
        if x.dim() != 3 or x.shape[-1] != self.d_model:
            raise ValueError(
                f"tokens must be three-dimensional and of width d_model = {self.d_model}, "
                f"got shape {tuple(x.shape)}"
            )
        tokens = x if self.batch_first else x.transpose(0, 1)
        return tokens if self.cls_first else tokens.roll(1, dims=1)

    def _original(self, tokens: Tensor) -> Tensor:
        """Back to the layer's own layout."""
        tokens = tokens if self.cls_first else tokens.roll(-1, dims=1)
        return tokens if self.batch_first else tokens.transpose(0, 1)

    def _saliency(self, attention: Tensor, tokens: Tensor) -> Tensor:
        """(B, T) from the layer's attention map (B, H, Q, K), over the grid of the queries."""
        batch, num_tokens = tokens.shape[:2]
        if attention.dim() != 4 or attention.shape[0] != batch or attention.shape[2] != num_tokens:
            raise ValueError(
                f"get_attention_map must return (B, H, Q, K) with B = {batch} and a row for each "
                f"of the Q = {num_tokens} tokens, got shape {tuple(attention.shape)}"
            )
        queries, keys = attention.shape[-2:]
        if not self.cls_first:
            attention = attention.roll((1, 1), dims=(-2, -1))
        prefix = self.num_prefix_tokens
        saliency = attention_saliency(attention, prefix)
        if keys == queries:
            return saliency
        target = _grid(queries - prefix, self.aspect_ratio, "queries")
        source = _grid(keys - prefix, target[1] / target[0], "keys")  # pooling rounds each side
        grid = saliency.unflatten(1, (1, *source))
        return F.interpolate(grid, target, mode="bilinear", align_corners=False).flatten(1)

    def _report(self, step: HorizontalStep) -> None:
        # compiled, a count would be a constant; run again by checkpointing, a step counts already
        if torch.compiler.is_compiling() or in_backward():
            return
        self.steps += 1
        if not self.verbose or self.steps % self.report_every != 1 % self.report_every:
            return
        if not logger.isEnabledFor(logging.INFO):  # reading the numbers would stall the device
            return
        values = ", ".join(f"{name} {value.item():.4g}" for name, value in step.stats.items())
        logger.info(
            "HTM %s step %d [tau %s, rho %s]: %s",
            self.layer_name or "layer",
            self.steps,
            self.config.tau,
            self.config.rho,
            values,
        )


def _grid(tokens: int, aspect_ratio: float, name: str) -> tuple[int, int]:
    """Rows and columns of the grid of ``tokens`` whose columns / rows are nearest aspect_ratio."""

    def distance(grid: tuple[int, int]) -> float:
        return abs(math.log(grid[1] / grid[0] / aspect_ratio))

    sides = [side for side in range(1, math.isqrt(tokens) + 1) if tokens % side == 0]
    grids = {(a, b) for side in sides for a, b in ((side, tokens // side), (tokens // side, side))}
    nearest, *others = sorted(grids, key=distance)
    found = f"{tokens} patch tokens of the {name} form "
    if distance(nearest) > math.log(_MOST_OFF) and tokens > 1:
        raise ValueError(
            f"{found}no grid of an aspect ratio W / H near {aspect_ratio:g}: the nearest is "
            f"{nearest[0]} x {nearest[1]} (rows x columns). Pass the aspect_ratio of the queries' "
            "grid, and as many prefix tokens among keys as among queries"
        )
    if others and distance(others[0]) < 1.1 * distance(nearest):
        raise ValueError(
            f"{found}a grid of {nearest[0]} x {nearest[1]} or of {others[0][0]} x {others[0][1]} "
            f"(rows x columns), both as near to the aspect ratio W / H {aspect_ratio:g}: pass the "
            "exact aspect_ratio of the queries' grid"
        )
    return nearest
