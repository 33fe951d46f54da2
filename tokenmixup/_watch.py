"""Tell a user once that Horizontal TokenMixup does nothing, without waiting for the device.

Dimensions: B batch, C classes.
"""

import itertools
import warnings
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tokenmixup._assignment import on_the_host
from tokenmixup._session import in_backward
from tokenmixup.config import HorizontalConfig
from tokenmixup.functional import least_difficulty
from tokenmixup.scorenet import ScoreNet

if TYPE_CHECKING:
    from tokenmixup.horizontal import HorizontalStep

STEPS = 300
"""Training steps after which a layer that has mixed nothing is told."""
_ARRIVES = 20
"""Steps after which the numbers of an earlier step are surely on the host."""


class TokenMixupWarning(UserWarning):
    """Horizontal TokenMixup mixes nothing; the message says why, and what to do."""


@dataclass
class _Seen:
    """What one layer has done.

    Attributes:
        steps: its training steps.
        largest_batch: the greatest B among them.
        masks: the tokens that it mixed in the last steps, bool, on the model's device.
        mixed: whether it mixed anything in the steps before those, 0-d, likewise.
        read: that, the numbers of one step, and the least difficulty that the targets allow, (5,),
            on their way to the host.
    """

    steps: int = 0
    largest_batch: int = 0
    masks: list[Tensor] = field(default_factory=list)
    mixed: Tensor | None = None
    read: Tensor | None = None


class Watch:
    """Watches the HTM layers of one model for their first steps, and warns at most once.

    Copies and pickles of a model have a watch of their own.

    Args:
        config: thresholds of the layers.
    """

    def __init__(self, config: HorizontalConfig) -> None:
        self.config = config
        self.key = next(_keys)
        self._layers: dict[str, _Seen] = {}
        self._warned = False
        _watches[self.key] = self

    def __reduce__(self) -> tuple[type["Watch"], tuple[HorizontalConfig]]:
        return Watch, (self.config,)

    def observe(
        self,
        layer: str,
        scorenet: ScoreNet | None,
        targets: Tensor,
        step: "HorizontalStep",
    ) -> Tensor:
        """Count a training step of a layer.

        Args:
            layer: its name.
            scorenet: its ScoreNet, or None.
            targets: before its mixing, (B, C).
            step: what it did.

        Returns:
            ``step.targets``, which compiled code has to use: a compiler drops calls without a
            result.
        """
        mixed, mask = step.targets, step.decision.mask
        compiling = torch.compiler.is_compiling()
        if not compiling and (in_backward() or self._is_over(layer)):
            return mixed
        # none at all where FullyShardedDataParallel holds them flat
        parameters = [] if scorenet is None else list(scorenet.parameters())
        frozen = len(parameters) > 0 and not any(p.requires_grad for p in parameters)
        if compiling:
            now = _numbers(step.stats)
            return _observe_compiled(mixed, targets, mask, now, self.key, layer, frozen)
        self.see(layer, targets, mask, lambda: _numbers(step.stats), frozen)
        return mixed

    def _is_over(self, layer: str) -> bool:
        seen = self._layers.get(layer)
        return self._warned or (seen is not None and seen.steps >= STEPS + _ARRIVES)

    @torch.no_grad()
    def see(
        self,
        layer: str,
        targets: Tensor,
        mask: Tensor,
        numbers: Callable[[], list[Tensor]],
        frozen: bool,
    ) -> None:
        """As :meth:`observe`, outside of compiled code."""
        if self._is_over(layer):
            return
        if frozen:
            self._warn(
                layer,
                "cannot begin: none of ScoreNet's parameters requires a gradient, so that no "
                "sample becomes easy unless ScoreNet was trained before. Fine-tuning libraries "
                "freeze what they do not know: call requires_grad_(True) on model.scorenets (or "
                "on the wrapper's scorenet) after them, and give its parameters to the optimiser",
            )
            return
        seen = self._layers.setdefault(layer, _Seen())
        seen.steps += 1
        seen.largest_batch = max(seen.largest_batch, len(targets))
        if seen.steps <= STEPS:
            seen.masks.append(mask)
        if len(seen.masks) == _ARRIVES or seen.steps == STEPS:
            masks = [] if seen.mixed is None else [seen.mixed]
            masks += seen.masks
            seen.mixed = torch.cat([one.to(mask.device).flatten() for one in masks]).any()
            seen.masks = []
        if seen.steps == STEPS:
            assert seen.mixed is not None
            least = least_difficulty(targets).min()
            # float32: the numbers are for a message
            read = torch.stack([one.float() for one in (seen.mixed, least, *numbers())])
            # pinned memory, filled when the device gets there; nobody waits for it
            seen.read = read.to("cpu", non_blocking=True)
        elif self._is_over(layer):
            cause = self._cause(seen)
            if cause:
                self._warn(layer, f"mixed nothing in {STEPS} training steps: {cause}")

    def _cause(self, seen: _Seen) -> str | None:
        """Why nothing was mixed, and what to do; None if something was."""
        assert seen.read is not None
        mixed, least, easy, difference, lowest = seen.read.tolist()
        tau, rho = self.config.tau, self.config.rho
        if mixed > 0:
            return None
        if seen.largest_batch == 1:
            return (
                "each batch had one sample, which has no partner. Give the model more samples per "
                "forward pass (and process); accumulated gradients do not help"
            )
        if easy == 0 and tau is not None and tau < least:
            return (
                f"tau is {tau:g}, but with these targets no difficulty can be below {least:.4f}, "
                "their entropy over 10. Raise tau above that, or soften the targets less"
            )
        if easy == 0:
            return (
                f"in the last of them no sample was easy: the least difficulty was {lowest:.4f}, "
                f"tau is {tau}. If difficulty_min does not fall, see that the loss is out.loss() "
                "or has out.scorenet_loss in it, that the optimiser has ScoreNet's parameters, and "
                "that scorenet_lambda is not too small, or raise tau"
            )
        if difference <= rho:
            return (
                f"rho is {rho:g}, but in the last of them the greatest saliency difference was "
                f"{difference:.3g}. Lower rho; begin with 1 / (number of patch tokens)"
            )
        return "there were easy samples and differences above rho, but its rules moved no token"

    def _warn(self, layer: str, message: str) -> None:
        self._warned = True
        text = f"Horizontal TokenMixup at {layer} {message}"
        warnings.warn(text, TokenMixupWarning, stacklevel=2)


def _numbers(stats: Mapping[str, Tensor]) -> list[Tensor]:
    """Easy share, greatest saliency difference and least difficulty of a step, each 0-d."""
    easy = stats["easy_share"]
    lowest = stats.get("difficulty_min", torch.zeros_like(easy))
    return [easy, stats["saliency_difference_max"], lowest]


_keys = itertools.count()
_watches: weakref.WeakValueDictionary[int, Watch] = weakref.WeakValueDictionary()
"""By key, as an operator's arguments cannot be objects; a watch lives as long as its model."""


@torch.library.custom_op("tokenmixup::observe", mutates_args=(), tags=on_the_host)
def _observe_compiled(
    mixed: Tensor,
    targets: Tensor,
    mask: Tensor,
    now: list[Tensor],
    key: int,
    layer: str,
    frozen: bool,
) -> Tensor:
    """Run :meth:`Watch.see` at each step of compiled code, which cannot count itself."""
    watch = _watches.get(key)
    if watch is not None:
        # the next step may write to the same memory
        watch.see(layer, targets, mask.clone(), lambda: now, frozen)
    return mixed.clone()


@_observe_compiled.register_fake
def _(mixed: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(mixed)
