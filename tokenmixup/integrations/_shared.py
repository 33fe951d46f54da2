"""What the integrations share: settings for checkpoints, label smoothing, a look at tau."""

from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor

from tokenmixup._targets import one_hot_targets
from tokenmixup.functional import least_difficulty
from tokenmixup.model import TokenMixupModel


def settings_of(model: TokenMixupModel) -> dict[str, Any]:
    """Settings of HTM and VTM in types that a checkpoint may hold."""
    configs = {"horizontal": model.horizontal, "vertical": model.vertical}
    return {name: config and asdict(config) for name, config in configs.items()}


def smoothed(labels: Tensor, smoothing: float, num_classes: int | None) -> Tensor:
    """Class indices (B,) or soft targets (B, C) -> soft targets, of which a share is spread."""
    if not labels.is_floating_point():
        labels = one_hot_targets(labels, len(labels), num_classes)
    return (1 - smoothing) * labels + smoothing / labels.shape[1]


def refuse_vain_tau(model: TokenMixupModel, smoothing: float, option: str) -> None:
    """Raise ValueError if no sample can be easy.

    Args:
        model: the attached model.
        smoothing: of its labels.
        option: what the trainer calls the smoothing.
    """
    tau = model.horizontal.tau if model.horizontal is not None and model.scorenets else None
    if tau is None:
        return
    label = torch.zeros(1, dtype=torch.int64)
    least = least_difficulty(smoothed(label, smoothing, model.num_classes)).item()
    if tau < least:
        raise ValueError(
            f"HorizontalConfig.tau is {tau}, but with {option} {smoothing} and "
            f"{model.num_classes} classes no difficulty is below {least:.4f}, so that HTM would "
            "mix nothing: raise tau, or smooth less"
        )
