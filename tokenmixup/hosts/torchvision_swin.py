"""torchvision's Swin Transformers, V1 and V2.

Dimensions: B' windows of all samples, n positions in a window, D width, H heads, d head width.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    Kwargs,
    TokenLayout,
    class_name,
    joint_query_key,
    linear_outputs,
    require_part,
)
from tokenmixup.hosts.timm_swin import cosine
from tokenmixup.hosts.windows import GridHost, Windows

_MODULE = "torchvision.models.swin_transformer"
BLOCKS = (f"{_MODULE}.SwinTransformerBlock", f"{_MODULE}.SwinTransformerBlockV2")
ATTENTION = (f"{_MODULE}.ShiftedWindowAttention", f"{_MODULE}.ShiftedWindowAttentionV2")
_READ = ("qkv", "num_heads", "window_size", "shift_size", "get_relative_position_bias")


class TorchvisionSwin(GridHost):
    """torchvision's Swin: images of any size, and windows that pad the grid where it is small."""

    family = "torchvision SwinTransformer"
    host_classes = (f"{_MODULE}.SwinTransformer",)

    def check(self, host: nn.Module) -> None:
        """torchvision's own blocks and attention."""
        names = {part: name for name, part in host.named_modules()}
        for block in self.layers(host):
            require_part(block, names[block], BLOCKS, ("norm1", "attn"), ("x",))
            require_part(cast(Any, block).attn, f"{names[block]}.attn", ATTENTION, _READ, ("x",))

    def layers(self, host: nn.Module) -> Sequence[nn.Module]:
        """Those of the first stage, then those of the second, and so on."""
        return [block for stage in cast(Any, host).features[1::2] for block in stage]

    def layouts(self, host: nn.Module) -> Sequence[TokenLayout]:
        """The grid depends on the image."""
        swin = cast(Any, host)
        classes = linear_outputs(swin.head)
        return [
            TokenLayout(block.attn.qkv.in_features, 0, False, None, classes, stage)
            for stage, blocks in enumerate(swin.features[1::2])
            for block in blocks
        ]

    def attention(self, layer: nn.Module) -> nn.Module:
        """The block's `attn`."""
        return cast(Any, layer).attn

    def normalise(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The block's `norm1`, which in V2 follows the attention."""
        return tokens if class_name(type(layer)) == BLOCKS[1] else cast(Any, layer).norm1(tokens)

    def windows(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> Windows:
        """Padded, then rolled, but for sides of a single window."""
        attention, grid = cast(Any, layer).attn, tuple(args[0].shape[1:3])
        still = Windows(grid, tuple(attention.window_size), (0, 0), pads_first=True)
        down, right = (
            0 if side >= size else by
            for side, size, by in zip(
                attention.window_size, still.padded, attention.shift_size, strict=True
            )
        )
        return Windows(still.grid, still.window, (down, right), pads_first=True)

    def window_query_key(self, layer: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor, float]:
        """By the weight of `qkv`, which the host reads without a call."""
        attention = cast(Any, layer).attn
        weight, bias, heads = attention.qkv.weight, attention.qkv.bias, attention.num_heads
        cosines = class_name(type(attention)) == ATTENTION[1]
        if cosines and bias is not None:
            query, key, value = bias.chunk(3)
            bias = torch.cat((query, torch.zeros_like(key), value))
        query, key = joint_query_key(windows, weight, bias, heads, False)
        if cosines:
            return *cosine(query, key, attention.logit_scale), 1.0
        return query, key, query.shape[-1] ** -0.5

    def relative_bias(self, layer: nn.Module) -> Tensor:
        """By the host itself."""
        return cast(Any, layer).attn.get_relative_position_bias()
