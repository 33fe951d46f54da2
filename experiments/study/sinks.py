"""Attention sinks: where saliency lies in a model's layers, and whether it moves with the image.

Dimensions: I images, B batch, H heads, N tokens, T patch tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from tokenmixup import TokenMixupModel
from tokenmixup.hosts.base import input_saliency


@torch.no_grad()
def layer_saliencies(model: TokenMixupModel, images: Tensor) -> list[Tensor]:
    """The saliency (B, T) by which HTM would mix at each layer, in evaluation, lowest layer first.

    Args:
        model: in evaluation mode; with or without TokenMixup.
        images: (B, 3, S, S).
    """
    assert not model.training
    found: list[Tensor] = []
    adapter = model.adapter

    def note(layer: nn.Module, args: Any, kwargs: Any) -> None:
        layout, tokens = model.layouts[len(found)], adapter.tokens(args, kwargs)
        found.append(input_saliency(adapter, layout, layer, tokens, args, kwargs))

    layers = adapter.layers(model.backbone)
    handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
    try:
        model(images)
    finally:
        for handle in handles:
            handle.remove()
    return found


def sink_statistics(saliency: Tensor) -> dict[str, float]:
    """Size and place of the most salient token, from saliency (I, T) on a square grid.

    Returns:
        `largest_share`: the share of an image's saliency that its most salient token holds, mean;
        `same_place_share`: the share of the images in which that is at the most frequent place;
        `border_share`: the share of the images in which it is at the border of the grid.
    """
    side = round(saliency.shape[1] ** 0.5)
    assert side * side == saliency.shape[1], "the patch tokens form a square grid"
    place = saliency.argmax(1)
    row, column = place // side, place % side
    at_border = (row % (side - 1) == 0) | (column % (side - 1) == 0)
    share = saliency.amax(1) / saliency.sum(1)
    return {
        "largest_share": share.mean().item(),
        "same_place_share": place.bincount().max().item() / len(place),
        "border_share": at_border.double().mean().item(),
    }
