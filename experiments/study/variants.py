"""The rules that a study may put in place of the library's, by name.

`released …` is what the paper's released code does differently from the paper: one class per
defect, written from the description in `docs/deviations.md`. The others are further ways to choose
partners and to measure saliency.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, D width, C classes, K kappa.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmixup import TokenMixupModel, VerticalConfig
from tokenmixup.functional import MixingDecision, soft_cross_entropy
from tokenmixup.rules import Rules


class ReleasedMask(Rules):
    """The mask compares each partner with the first easy sample: s_j[t] - s_first[t] > rho."""

    def mask(self, saliency: Tensor, partner: Tensor, easy: Tensor, rho: float) -> Tensor:
        """(B, T) bool."""
        first = easy.int().argmax()
        return (saliency[partner] - saliency[first] > rho) & easy.unsqueeze(1)


@dataclass(frozen=True)
class OrderedDecision(MixingDecision):
    """A decision, and the order (B,) in which the samples leave the layer."""

    order: Tensor


class ReleasedOrder(Rules):
    """The easy samples leave the layer first, then the others, each in batch order.

    Tokens and targets stay together; what lower layers remembered stays in batch order.
    """

    def decide(
        self, layer: int, saliency: Tensor, targets: Tensor, easy: Tensor, rho: float
    ) -> OrderedDecision:
        """The decision with the order of the samples."""
        decision = super().decide(layer, saliency, targets, easy, rho)
        order = (~easy).int().argsort(stable=True)
        return OrderedDecision(decision.partner, decision.mask, order)

    def relabel(self, targets: Tensor, saliency: Tensor, decision: MixingDecision) -> Tensor:
        """(B, C), in the new order."""
        assert isinstance(decision, OrderedDecision)
        return super().relabel(targets, saliency, decision)[decision.order]

    def mix(self, tokens: Tensor, decision: MixingDecision, num_prefix_tokens: int) -> Tensor:
        """(B, N, D), in the new order."""
        assert isinstance(decision, OrderedDecision)
        return super().mix(tokens, decision, num_prefix_tokens)[decision.order]


class ReleasedChoice(Rules):
    """A layer that mixes and remembers chooses by its attention map from before the mixing."""

    def __init__(self) -> None:
        super().__init__()
        self._before: dict[int, Tensor] = {}

    def saliency(self, layer: int, saliency: Tensor) -> Tensor:
        """(B, T), noted for `choose`."""
        self._before[layer] = super().saliency(layer, saliency)
        return self._before[layer]

    def choose(self, layer: int, saliency: Tensor, kappa: int) -> Tensor:
        """Positions (B, K)."""
        return super().choose(layer, self._before.pop(layer, saliency), kappa)


class ReleasedPositions(Rules):
    """Positions that count patch tokens are used on tokens that begin with a class token."""

    def remember(
        self, tokens: Tensor, positions: Tensor, config: VerticalConfig, num_prefix_tokens: int
    ) -> Tensor:
        """(B, K, D), of the tokens one before the chosen ones."""
        assert num_prefix_tokens > 0, "without a class token this defect does nothing"
        return super().remember(tokens, positions, config, num_prefix_tokens - 1)


class RandomPartners(Rules):
    """A uniformly random one-to-one assignment; a sample that gets itself is not mixed."""

    def partners(self, gain: Tensor) -> Tensor:
        """(B,) int64."""
        return torch.randperm(len(gain)).to(gain.device)


class GreedyPartners(Rules):
    """The largest gain of all first, then the largest of the remaining rows and columns."""

    def partners(self, gain: Tensor) -> Tensor:
        """(B,) int64; rows without any gain get the columns that are left."""
        values = gain.detach().cpu().numpy()
        found = np.full(len(values), -1, dtype=np.int64)
        taken = np.zeros(len(values), dtype=bool)
        for index in np.argsort(-values, axis=None, kind="stable"):
            row, column = divmod(int(index), len(values))
            if values[row, column] <= 0:
                break
            if found[row] < 0 and not taken[column]:
                found[row], taken[column] = column, True
        found[found < 0] = np.flatnonzero(~taken)
        return torch.from_numpy(found).to(gain.device)


class GradientSaliency(Rules):
    """Saliency from the loss's gradient in the pixels, as image mixing methods measure it."""

    def begin(self, model: TokenMixupModel, images: Tensor, targets: Tensor | None) -> None:
        """Measure it in a pass of its own."""
        super().begin(model, images, targets)
        if targets is not None:
            self._measured = gradient_saliency(model, images, targets)

    def saliency(self, layer: int, saliency: Tensor) -> Tensor:
        """(B, T), the same at each layer."""
        assert self._measured.shape == saliency.shape
        return self._measured


def gradient_saliency(model: TokenMixupModel, images: Tensor, targets: Tensor) -> Tensor:
    """The pixels' gradient, averaged over each token's square of pixels, scaled to sum to one.

    The gradient's root mean square over the channels is taken. Dropout and TokenMixup are off in
    this pass.

    Args:
        model: in training mode; left in it.
        images: (B, 3, S, S).
        targets: soft targets (B, C).

    Returns:
        (B, T), without gradient.
    """
    num_tokens = model.layout.num_patch_tokens
    assert num_tokens is not None, "models of a run have images of one size"
    side = round(num_tokens**0.5)
    assert side * side == num_tokens, "the patch tokens form a square grid"
    model.eval()
    try:
        with torch.enable_grad():
            pixels = images.detach().requires_grad_()
            logits = model.adapter.logits(model.backbone(pixels))
            (gradient,) = torch.autograd.grad(soft_cross_entropy(logits, targets).sum(), pixels)
    finally:
        model.train()
    strength = gradient.square().mean(1, keepdim=True).sqrt()  # (B, 1, S, S)
    return _summing_to_one(F.adaptive_avg_pool2d(strength, side).flatten(1))


class RandomSaliency(Rules):
    """Saliency that knows nothing: uniformly random among all that sum to one."""

    def saliency(self, layer: int, saliency: Tensor) -> Tensor:
        """(B, T)."""
        return _summing_to_one(torch.empty_like(saliency).exponential_())


class CentredSaliency(Rules):
    """Saliency above the batch's mean at each place, which takes away sinks that do not move."""

    def saliency(self, layer: int, saliency: Tensor) -> Tensor:
        """(B, T)."""
        return _summing_to_one((saliency - saliency.mean(0)).clamp_min(0))


def _summing_to_one(saliency: Tensor) -> Tensor:
    return saliency / saliency.sum(1, keepdim=True).clamp_min(torch.finfo(saliency.dtype).tiny)


class LabelsByTokens(Rules):
    """As `HorizontalConfig(labels="tokens")`, which is younger: records name the rule."""

    def relabel(self, targets: Tensor, saliency: Tensor, decision: MixingDecision) -> Tensor:
        """(B, C)."""
        return super().relabel(targets, torch.ones_like(saliency), decision)


RULES: dict[str, type[Rules]] = {
    "released mask": ReleasedMask,
    "released order": ReleasedOrder,
    "released choice": ReleasedChoice,
    "released positions": ReleasedPositions,
    "random partners": RandomPartners,
    "greedy partners": GreedyPartners,
    "gradient saliency": GradientSaliency,
    "random saliency": RandomSaliency,
    "centred saliency": CentredSaliency,
    "labels by tokens": LabelsByTokens,
}


def rules_of(names: Sequence[str]) -> Rules | None:
    """One object with all the named rules, for one model; None for the library's own.

    Raises:
        ValueError: two of them replace the same decision.
    """
    if not names:
        return None
    classes = tuple(RULES[name] for name in names)
    methods = [method for each in classes for method in vars(each) if method in vars(Rules)]
    twice = {m for m in methods if methods.count(m) > 1 and not m.startswith("__")}
    if twice:
        raise ValueError(f"{' and '.join(names)} both replace {', '.join(sorted(twice))}")
    combined: type[Rules] = type("StudyRules", classes, {})
    return combined()
