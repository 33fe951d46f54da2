"""Checks of targets, for every entry to the library.

Dimensions: B batch, C classes.
"""

import math

import torch
from torch import Tensor

SUM_TOLERANCE = 0.01
"""How far from 1 the sum of a row may be: above what rounding to bfloat16 (2^-9) adds up to."""


def no_distributions(targets: Tensor) -> Tensor:
    """Which rows of targets (B, C) are not finite, somewhere negative, or do not sum to 1: (B,)."""
    wide = targets.to(torch.promote_types(targets.dtype, torch.float32))
    root = torch.linalg.vector_norm(wide.sqrt(), dim=1)  # of the sum; nan, as that of a negative
    return root.clamp((1 - SUM_TOLERANCE) ** 0.5, (1 + SUM_TOLERANCE) ** 0.5) != root


def soft_targets(targets: Tensor, batch: int, num_classes: int | None) -> Tensor:
    """Soft targets (B, C) of what a user gave: those themselves, or class indices made one-hot.

    Raises:
        ValueError: neither of the two, as the functions below say.
    """
    if isinstance(targets, Tensor) and not targets.is_floating_point():
        return one_hot_targets(targets, batch, num_classes)
    check_soft_targets(targets, batch, num_classes)
    return targets


def check_soft_targets(targets: Tensor, batch: int, num_classes: int | None) -> None:
    """Raise ValueError unless targets are floating point, (B, C), and rows are distributions.

    Values are read only on the CPU, where that needs no device synchronisation. On an accelerator,
    and in compiled code, the assignment solver of HTM finds bad rows in the gains that it reads
    anyway (``functional.decide_mixing``). Without HTM nothing looks at the values there.
    """
    classes = "C" if num_classes is None else num_classes
    if not isinstance(targets, Tensor):
        raise ValueError(
            f"targets must be a tensor, soft ({batch}, {classes}) or class indices ({batch},); "
            f"got {type(targets).__name__}"
        )
    if (
        targets.dim() != 2
        or targets.shape[0] != batch
        or (num_classes is not None and targets.shape[1] != num_classes)
    ):
        raise ValueError(
            f"targets must be (B, C) = ({batch}, {classes}), got shape {tuple(targets.shape)}"
        )
    if not targets.is_floating_point():
        raise ValueError(f"targets (B, C) must be floating point, got {targets.dtype}")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        bad = no_distributions(targets).nonzero()
        if len(bad):
            row = int(bad[0])
            least, total = targets[row].min(), targets[row].double().sum()
            raise ValueError(
                "each row of targets must be a distribution over the classes (finite, not "
                f"negative, of sum 1), but targets[{row}] has sum {total:.4g} and minimum "
                f"{least:.4g}. For several labels per image attach VTM alone, call model(images), "
                "and compute a loss of your own"
            )


def one_hot_targets(targets: Tensor, batch: int, num_classes: int | None) -> Tensor:
    """Class indices (B,) -> one-hot targets (B, C) in torch's default floating dtype.

    Raises:
        ValueError: no integers of shape (B,), an unknown number of classes, or (on the CPU, where
            checking needs no device synchronisation) an index out of range.
    """
    if targets.dim() != 1 or targets.shape[0] != batch or targets.dtype == torch.bool:
        raise ValueError(
            f"targets must be soft, ({batch}, C) floating point, or class indices, ({batch},) "
            f"integer; got {targets.dtype} of shape {tuple(targets.shape)}"
        )
    if num_classes is None:
        raise ValueError("class indices need num_classes, which the host does not know")
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        outside = ((targets < 0) | (targets >= num_classes)).nonzero()
        if len(outside):
            index = int(outside[0])
            raise ValueError(
                f"targets must be class indices 0 to {num_classes - 1} (num_classes is "
                f"{num_classes}), but targets[{index}] is {targets[index].item()}"
            )
    one_hot = torch.zeros(batch, num_classes, device=targets.device)
    one_hot = one_hot.scatter_(1, targets.long().unsqueeze(1), 1)
    if torch.compiler.is_compiling():  # where an index out of range may give a row of zeros
        outside = (targets < 0) | (targets >= num_classes)
        one_hot = one_hot.masked_fill(outside.unsqueeze(1), math.nan)
    return one_hot
