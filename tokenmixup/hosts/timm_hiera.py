"""timm's Hiera, whose first stages attend within windows, and whose stages begin by pooled queries.

Dimensions: B batch, N tokens, W windows, n tokens of a window, D width, H heads, d head width.
"""

import math
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    Kwargs,
    TokenLayout,
    UnsupportedHostError,
    linear_outputs,
    module_query_key,
)
from tokenmixup.hosts.timm_vit import TimmNames
from tokenmixup.hosts.windows import NO_MEMORY


class TimmHiera(TimmNames):
    """timm's Hiera, of images.

    The n-th tokens of two images come from the same place, but not row by row: Hiera keeps the
    tokens of a window, and of what will be pooled, at equal distances.
    """

    family = "timm Hiera"
    host_classes = ("timm.models.hiera.Hiera",)
    block_classes = ("timm.models.hiera.HieraBlock",)
    block_read = ("norm1", "attn", "dim", "dim_out")
    attention_classes = ("timm.models.hiera.MaskUnitAttention",)
    read = ("qkv", "heads", "scale", "q_stride", "window_size", "use_mask_unit_attn")
    arguments = ("x",)

    def check(self, host: nn.Module) -> None:
        """timm's own blocks, and no dropping of windows."""
        if cast(Any, host).patch_drop_rate > 0:
            raise UnsupportedHostError(
                "build the host with patch_drop_rate=0: it drops windows in training, different "
                "ones in each image, but TokenMixup exchanges tokens of one place"
            )
        super().check(host)

    def layouts(self, host: nn.Module) -> Sequence[TokenLayout]:
        """A stage ends with the block that pools its tokens, or widens them."""
        hiera, layouts, stage = cast(Any, host), [], 0
        grid = tuple(hiera.tokens_spatial_shape)
        for block in hiera.blocks:
            layouts.append(
                TokenLayout(
                    width=block.dim,
                    num_prefix_tokens=0,
                    class_token=False,
                    num_patch_tokens=math.prod(grid),
                    num_classes=linear_outputs(hiera.get_classifier()),
                    stage=stage,
                    grid=grid if len(grid) == 2 else None,
                )
            )
            if block.attn.q_stride > 1:
                grid = tuple(side // by for side, by in zip(grid, hiera.q_stride, strict=True))
            stage += block.attn.q_stride > 1 or block.dim != block.dim_out
        return layouts

    def layout(self, host: nn.Module) -> TokenLayout:
        """Of the first layer."""
        return self.layouts(host)[0]

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `qkv`, in windows where there are any, queries pooled."""
        attention = cast(Any, layer).attn
        query, key = module_query_key(
            self.normalise(layer, tokens), attention.qkv, attention.heads, False
        )
        if attention.use_mask_unit_attn:
            windows = tokens.shape[1] // (attention.q_stride * attention.window_size)
            query, key = (
                each.unflatten(2, (-1, windows)).permute(0, 3, 1, 2, 4) for each in (query, key)
            )
        if attention.q_stride > 1:
            query = query.unflatten(-2, (attention.q_stride, -1)).amax(-3)
        return query, key, attention.scale

    def token_saliency(
        self, layer: nn.Module, saliency: Tensor, args: Args, kwargs: Kwargs
    ) -> Tensor:
        """A mean over the queries of a window becomes one over those of the image."""
        if saliency.dim() == 2:
            return saliency
        return saliency.mT.flatten(1) / saliency.shape[1]

    def no_memory(self, layer: nn.Module) -> str | None:
        """Windows have their own keys, and pooled queries are found by the order of the tokens."""
        attention = cast(Any, layer).attn
        if attention.use_mask_unit_attn:
            return NO_MEMORY
        if attention.q_stride > 1:
            return "it pools its queries, which it finds by the number and the order of its tokens"
        return None
