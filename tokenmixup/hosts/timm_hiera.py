"""timm's Hiera, whose first stages attend within windows, and whose stages begin by pooled queries.

Dimensions: B batch, N tokens, W windows, n tokens of a window, D width, H heads, d head width.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    Kwargs,
    UnsupportedHostError,
    module_query_key,
)
from tokenmixup.hosts.timm_stages import Grid, TimmStages
from tokenmixup.hosts.timm_vit import TimmNames
from tokenmixup.hosts.windows import NO_MEMORY


class TimmHiera(TimmStages):
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
        hiera = cast(Any, host)
        if hiera.patch_drop_rate > 0:
            raise UnsupportedHostError(
                "build the host with patch_drop_rate=0: it drops windows in training, different "
                "ones in each image, but TokenMixup exchanges tokens of one place"
            )
        if len(hiera.tokens_spatial_shape) != 2:
            raise UnsupportedHostError("this Hiera takes videos, and TokenMixup mixes images")
        super().check(host)

    def blocks(self, host: nn.Module) -> dict[str, nn.Module]:
        """One list for all stages."""
        return TimmNames.blocks(self, host)

    def inputs(self, host: nn.Module) -> Iterable[tuple[int, Grid, int]]:
        """A stage ends with the block that pools its tokens, or widens them."""
        hiera, stage = cast(Any, host), 0
        rows, columns = hiera.tokens_spatial_shape
        for block in hiera.blocks:
            yield block.dim, (rows, columns), stage
            if block.attn.q_stride > 1:
                rows, columns = rows // hiera.q_stride[0], columns // hiera.q_stride[1]
            stage += block.attn.q_stride > 1 or block.dim != block.dim_out

    def raster(self, host: nn.Module, index: int) -> Tensor | None:
        """By the host's own module, which orders what a layer returns."""
        hiera, tokens = cast(Any, host), self.layouts(host)[index].num_patch_tokens
        numbers = torch.arange(tokens or 0).view(1, -1, 1)
        return hiera.reroll(numbers, max(index - 1, 0)).flatten()

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
