"""Settings of Horizontal and Vertical TokenMixup, checked at construction."""

import numbers
import sys
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

ScoreNetType = Literal["attention", "cls", "average"]
SCORENET_TYPES: tuple[str, ...] = get_args(ScoreNetType)
LabelWeights = Literal["saliency", "tokens"]
LABEL_WEIGHTS: tuple[str, ...] = get_args(LabelWeights)
_LARGEST = sys.float_info.max


@dataclass(frozen=True, kw_only=True)
class HorizontalConfig:
    """Horizontal TokenMixup (HTM).

    Attributes:
        layers: 0-based indices of the encoder layers at whose input tokens are mixed.
        tau: difficulty threshold; samples with ``CE / 10 <= tau`` are easy. Required with a
            ScoreNet, unused without. No prediction is easier than the entropy of its
            target over 10, so label smoothing of 0.1 needs a tau above 0.050 for 10 classes,
            0.078 for 100 and 0.101 for 1000: with a smaller tau nothing is ever mixed.
        rho: smallest saliency difference that replaces a token, in the unit of the attention map.
        scorenet: how ScoreNet pools the tokens, one of ``"attention"``, ``"cls"`` (class token)
            and ``"average"`` (of the patch tokens); None mixes every sample.
        scorenet_lambda: weight of ScoreNet's loss.
        scorenet_stop_gradient: keep ScoreNet's gradient out of the model.
        labels: ``"saliency"``, as in the paper, weighs each token in the mixed label by its
            saliency; ``"tokens"`` weighs all alike, so that the partner's share of the label is its
            share of the patch tokens. Partners and tokens are chosen by saliency either way.

    Raises:
        ValueError: a value is out of its range.
    """

    layers: tuple[int, ...]
    rho: float
    tau: float | None = None
    scorenet: ScoreNetType | None = "attention"
    scorenet_lambda: float = 0.001
    scorenet_stop_gradient: bool = False
    labels: LabelWeights = "saliency"

    def __post_init__(self) -> None:
        layers = layer_indices("HorizontalConfig.layers", self.layers, lowest=0)
        object.__setattr__(self, "layers", layers)
        _settle_number(self, "rho")
        if self.scorenet is not None and self.scorenet not in SCORENET_TYPES:
            raise ValueError(
                f"HorizontalConfig.scorenet must be one of {', '.join(SCORENET_TYPES)}, or None "
                f"to mix every sample; got {self.scorenet!r}"
            )
        if self.tau is not None:
            _settle_number(self, "tau")
        elif self.scorenet is not None:
            raise ValueError(
                "HorizontalConfig.tau is needed to tell easy samples by ScoreNet "
                f"(scorenet={self.scorenet!r}); scorenet=None mixes every sample"
            )
        _settle_number(self, "scorenet_lambda")
        _check_bool("HorizontalConfig", "scorenet_stop_gradient", self.scorenet_stop_gradient)
        if self.labels not in LABEL_WEIGHTS:
            raise ValueError(
                f"HorizontalConfig.labels must be one of {', '.join(LABEL_WEIGHTS)}; "
                f"got {self.labels!r}"
            )


@dataclass(frozen=True, kw_only=True)
class VerticalConfig:
    """Vertical TokenMixup (VTM).

    Attributes:
        layers: 0-based indices of the encoder layers that attend to remembered tokens. Layer 0
            has no earlier layer and is not allowed.
        kappa: tokens that each layer before the last of ``layers`` remembers.
        stop_gradient: keep gradients out of the remembered tokens.

    Raises:
        ValueError: a value is out of its range.
    """

    layers: tuple[int, ...]
    kappa: int
    stop_gradient: bool = False

    def __post_init__(self) -> None:
        layers = layer_indices("VerticalConfig.layers", self.layers, lowest=1)
        object.__setattr__(self, "layers", layers)
        if not _is_int(self.kappa) or self.kappa < 1:
            raise ValueError(f"VerticalConfig.kappa must be an integer >= 1, got {self.kappa!r}")
        object.__setattr__(self, "kappa", int(self.kappa))
        _check_bool("VerticalConfig", "stop_gradient", self.stop_gradient)


def layer_indices(name: str, layers: Iterable[int], lowest: int) -> tuple[int, ...]:
    """Layer indices in rising order; ValueError unless they are distinct integers >= lowest."""
    if isinstance(layers, str) or not isinstance(layers, Iterable):
        raise ValueError(f"{name} must be a sequence of layer indices, got {layers!r}")
    layers = tuple(layers)
    if not layers:
        raise ValueError(f"{name} must name at least one layer, got none")
    for layer in layers:
        if not _is_int(layer) or layer < lowest:
            reason = " (layer 0 has no earlier layer to attend to)" if lowest else ""
            raise ValueError(f"{name} must be integers >= {lowest}{reason}, got {layer!r}")
    if len(set(layers)) < len(layers):
        raise ValueError(f"{name} must not name a layer twice, got {layers}")
    return tuple(sorted(int(layer) for layer in layers))


def _settle_number(owner: object, field: str) -> None:
    """Check a number; convert one of another library, such as NumPy, to Python's type."""
    value = getattr(owner, field)
    is_number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    number = float(value) if is_number and not isinstance(value, int) else value
    if not is_number or not 0 <= number <= _LARGEST:
        raise ValueError(
            f"{type(owner).__name__}.{field} must be a finite number >= 0, got {value!r}"
        )
    object.__setattr__(owner, field, number)


def _check_bool(owner: str, field: str, value: bool) -> None:
    if not isinstance(value, bool):
        raise ValueError(f"{owner}.{field} must be True or False, got {value!r}")


def _is_int(value: object) -> bool:
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)
