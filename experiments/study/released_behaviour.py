"""What the paper's released code does otherwise than the paper: one function a defect.

They are described in `docs/deviations.md`, were written from that description, and serve the study
of whether each correction matters. The library has none of them.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, D width, C classes, K kappa.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tokenmixup import HorizontalConfig, VerticalConfig, functional, vertical
from tokenmixup.functional import MixingDecision
from tokenmixup.horizontal import horizontal_step

MethodOfHook = Callable[..., Any]


@torch.no_grad()
def decide_by_first_easy(
    saliency: Tensor, targets: Tensor, easy: Tensor, rho: float
) -> MixingDecision:
    """The mask compares each partner with the first easy sample: s_j[t] - s_first[t] > rho.

    Partners are the optimum, as in the library. Arguments and result are those of
    `functional.decide_mixing`.
    """
    everyone = torch.ones_like(easy)
    gain = functional.saliency_gain(saliency, everyone, rho) * easy.unsqueeze(1)
    partner = functional.assign_partners(gain + 0 * targets.sum(1, keepdim=True))
    first = easy.int().argmax()
    mask = (saliency[partner] - saliency[first] > rho) & easy.unsqueeze(1)
    own = torch.arange(len(partner), device=partner.device)
    return MixingDecision(torch.where(mask.any(1), partner, own), mask)


class OrderedDecision(NamedTuple):
    """A decision, and the order (B,) in which the samples leave the layer."""

    partner: Tensor
    mask: Tensor
    order: Tensor


class OrderedStep(NamedTuple):
    """As the library's `HorizontalStep`, for `mix_easy_first` to carry out."""

    decision: OrderedDecision
    targets: Tensor
    stats: dict[str, Tensor]


@torch.no_grad()
def step_easy_first(
    targets: Tensor, saliency: Tensor, logits: Tensor | None, config: HorizontalConfig
) -> OrderedStep:
    """The easy samples leave the layer first, the others behind them, each in batch order.

    Tokens and targets still belong together; what lower layers remembered stays in batch order.
    """
    step = horizontal_step(targets, saliency, logits, config)
    easy = torch.ones(len(targets), dtype=torch.bool, device=targets.device)
    if logits is not None:
        assert config.tau is not None, "HorizontalConfig checks that ScoreNet comes with tau"
        easy = functional.sample_difficulty(logits, targets) <= config.tau
    order = (~easy).int().argsort(stable=True)
    partner, mask = step.decision
    return OrderedStep(OrderedDecision(partner, mask, order), step.targets[order], step.stats)


def mix_easy_first(tokens: Tensor, decision: OrderedDecision, num_prefix_tokens: int = 0) -> Tensor:
    """Carry out the decision of `step_easy_first` on tokens (B, N, D)."""
    partner, mask, order = decision
    return functional.mix_tokens(tokens, MixingDecision(partner, mask), num_prefix_tokens)[order]


def stale_choice(measure: MethodOfHook, choose: MethodOfHook) -> tuple[MethodOfHook, MethodOfHook]:
    """A layer that mixes and remembers chooses by its attention map from before the mixing.

    Args:
        measure: the method by which a layer's hook measures the saliency of the layer's input, for
            the mixing first.
        choose: the method by which a hook chooses what is remembered, from the saliency given.

    Returns:
        What takes the place of the two.
    """
    before: dict[int, Tensor] = {}

    def measured(hook: Any, *arguments: Any) -> Tensor:
        saliency = measure(hook, *arguments)
        if hook.mixes and hook.remembers:
            before.setdefault(hook.index, saliency)
        return saliency

    def chosen(hook: Any, record: Any, saliency: Tensor) -> None:
        choose(hook, record, before.pop(hook.index, saliency))

    return measured, chosen


def remember_one_before(
    tokens: Tensor, positions: Tensor, config: VerticalConfig, num_prefix_tokens: int
) -> Tensor:
    """Positions that count patch tokens are used on tokens that begin with a class token."""
    assert num_prefix_tokens > 0, "without a class token this defect does nothing"
    return vertical.remember(tokens, positions, config, num_prefix_tokens - 1)
