"""The decisions of TokenMixup as methods, for research that varies one of them.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, D width, C classes, K kappa.
"""

from typing import TYPE_CHECKING

from torch import Tensor

from tokenmixup import functional
from tokenmixup.config import VerticalConfig
from tokenmixup.functional import MixingDecision
from tokenmixup.vertical import remember

if TYPE_CHECKING:
    from tokenmixup.model import TokenMixupModel


class Rules:
    """The paper's method. A subclass overrides what it varies: ``attach(..., rules=MyRules())``.

    One instance belongs to one model, so that it may keep what it needs from one method to another
    in a training step. In a step :meth:`begin` comes first, then, layer by layer, the methods of
    HTM in the order in which they stand here, then those of VTM. Under activation checkpointing
    only :meth:`mix` and :meth:`remember` run a second time, in the backward pass.

    Methods other than :meth:`begin`, :meth:`mix` and :meth:`remember` run without gradient. What
    they return must not be written to later: ``out.stats`` are computed from it when they are read.
    """

    def begin(self, model: "TokenMixupModel", images: Tensor, targets: Tensor | None) -> None:
        """Called at the start of each training pass, before the host runs.

        Args:
            model: the model, in training mode.
            images: as the model was given them.
            targets: soft targets (B, C), or None where none were given.
        """

    def saliency(self, layer: int, saliency: Tensor) -> Tensor:
        """The saliency (B, T) that HTM uses at a layer, from the one that was measured there."""
        return saliency

    def decide(
        self, layer: int, saliency: Tensor, targets: Tensor, easy: Tensor, rho: float
    ) -> MixingDecision:
        """Which tokens come from where: ``functional.decide_mixing`` with the next two methods.

        A subclass of ``functional.MixingDecision`` may carry more from here to :meth:`mix` and
        :meth:`relabel`.

        Args:
            layer: index of the HTM layer.
            saliency: (B, T).
            targets: soft targets before the mixing, (B, C).
            easy: (B,) bool.
            rho: least saliency difference that moves a token.
        """
        return functional.decide_mixing(
            saliency, targets, easy, rho, partners=self.partners, mask=self.mask
        )

    def partners(self, gain: Tensor) -> Tensor:
        """Partner of each sample, (B,) int64, from gains (B, B).

        Rows of samples that are not easy are zero, and their partners are not used.
        """
        return functional.assign_partners(gain)

    def mask(self, saliency: Tensor, partner: Tensor, easy: Tensor, rho: float) -> Tensor:
        """Which tokens are taken from the partner, (B, T) bool."""
        return functional.mixing_mask(saliency, partner, easy, rho)

    def relabel(self, targets: Tensor, saliency: Tensor, decision: MixingDecision) -> Tensor:
        """Soft targets (B, C) of the mixed samples.

        Args:
            targets: before the mixing, (B, C).
            saliency: (B, T), or ones where ``HorizontalConfig.labels`` is ``"tokens"``.
            decision: what :meth:`decide` returned.
        """
        return functional.mix_targets(targets, saliency, decision)

    def mix(self, tokens: Tensor, decision: MixingDecision, num_prefix_tokens: int) -> Tensor:
        """The mixed tokens (B, N, D)."""
        return functional.mix_tokens(tokens, decision, num_prefix_tokens)

    def choose(self, layer: int, saliency: Tensor, kappa: int) -> Tensor:
        """Positions (B, K) of the patch tokens that a layer remembers.

        Args:
            layer: index of the layer.
            saliency: of its tokens after HTM, (B, T).
            kappa: K.
        """
        return functional.salient_positions(saliency, kappa)

    def remember(
        self, tokens: Tensor, positions: Tensor, config: VerticalConfig, num_prefix_tokens: int
    ) -> Tensor:
        """The remembered tokens (B, K, D), from a layer's input (B, N, D) after HTM."""
        return remember(tokens, positions, config, num_prefix_tokens)
