"""Other ways to choose partners and to measure saliency, for comparison with the paper's.

Dimensions: B batch, T patch tokens, C classes, E easy samples.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from tokenmixup import HorizontalConfig, TokenMixupModel
from tokenmixup.functional import soft_cross_entropy
from tokenmixup.horizontal import HorizontalStep, horizontal_step


def random_partners(gain: Tensor) -> Tensor:
    """A uniformly random one-to-one assignment of columns to rows: gain (E, B) -> (E,) int64.

    It may give a sample itself, which is then not mixed.
    """
    return torch.randperm(gain.shape[1])[: gain.shape[0]].to(gain.device)


def greedy_partners(gain: Tensor) -> Tensor:
    """The largest gain of all first, then the largest of the rows and columns that are left.

    Rows without any gain get the columns that nobody took: gain (E, B) -> (E,) int64.
    """
    values = gain.detach().cpu().numpy()
    rows, columns = values.shape
    found = np.full(rows, -1, dtype=np.int64)
    taken = np.zeros(columns, dtype=bool)
    for index in np.argsort(-values, axis=None, kind="stable"):
        row, column = divmod(int(index), columns)
        if values[row, column] <= 0:
            break
        if found[row] < 0 and not taken[column]:
            found[row], taken[column] = column, True
    found[found < 0] = np.flatnonzero(~taken)[: np.count_nonzero(found < 0)]
    return torch.from_numpy(found).to(gain.device)


def pixel_gradient_saliency(
    logits_of: Callable[[Tensor], Tensor], images: Tensor, targets: Tensor, num_tokens: int
) -> Tensor:
    """Saliency from the loss's gradient in the pixels, as image mixing methods measure it.

    The root of the mean square over the channels, averaged over each token's square of pixels, and
    scaled to sum to one as attention does.

    Args:
        logits_of: a model's pass, images -> (B, C).
        images: (B, 3, S, S).
        targets: (B, C).
        num_tokens: T, a square number.

    Returns:
        (B, T), without gradient.
    """
    side = round(num_tokens**0.5)
    assert side * side == num_tokens, "the patch tokens form a square grid"
    with torch.enable_grad():
        pixels = images.detach().requires_grad_()
        loss = soft_cross_entropy(logits_of(pixels), targets).sum()
        (gradient,) = torch.autograd.grad(loss, pixels)
    strength = gradient.square().mean(1, keepdim=True).sqrt()  # (B, 1, S, S)
    saliency = F.adaptive_avg_pool2d(strength, side).flatten(1)
    return saliency / saliency.sum(1, keepdim=True).clamp_min(torch.finfo(saliency.dtype).tiny)


def input_gradient_saliency(
    model: TokenMixupModel, images: Tensor, targets: Tensor, num_tokens: int
) -> Tensor:
    """`pixel_gradient_saliency` of a model; dropout and TokenMixup are off in this pass.

    Args:
        model: in training; left as it came.
        images: (B, 3, S, S).
        targets: soft targets (B, C), or classes (B,).
        num_tokens: T, a square number.

    Returns:
        (B, T), without gradient.
    """
    if not targets.is_floating_point():
        assert model.num_classes is not None, "models of a run have a classifier"
        targets = F.one_hot(targets, model.num_classes).float()
    model.eval()
    try:
        return pixel_gradient_saliency(
            lambda pixels: model.adapter.logits(model.backbone(pixels)), images, targets, num_tokens
        )
    finally:
        model.train()


def gradient_saliency_of_model(
    forward: Callable[..., Any],
) -> tuple[Callable[..., Any], Callable[..., HorizontalStep]]:
    """A model's forward pass and an HTM layer's step that use `input_gradient_saliency`.

    Args:
        forward: `TokenMixupModel.forward`, which is called in the end.

    Returns:
        What takes the place of `TokenMixupModel.forward` and of `horizontal_step`.
    """
    measured: list[Tensor] = []

    def measure_first(model: TokenMixupModel, images: Tensor, targets: Tensor | None = None) -> Any:
        if not model.training or targets is None:
            return forward(model, images, targets)
        num_tokens = model.layout.num_patch_tokens
        assert num_tokens is not None, "models of a run have images of one size"
        measured[:] = [input_gradient_saliency(model, images, targets, num_tokens)]
        return forward(model, images, targets)

    def step(
        targets: Tensor, saliency: Tensor, logits: Tensor | None, config: HorizontalConfig
    ) -> HorizontalStep:
        assert measured[0].shape == saliency.shape
        return horizontal_step(targets, measured[0], logits, config)

    return measure_first, step
