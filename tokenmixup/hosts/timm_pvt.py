"""timm's PVT v2, whose queries attend to pooled keys of the whole image.

Dimensions: B batch, N tokens, K keys, D width, H heads, d head width, M remembered tokens.
"""

from collections.abc import Iterable
from typing import Any, cast

from torch import Tensor, nn

from tokenmixup.functional import resized_saliency
from tokenmixup.hosts.base import Args, Kwargs, Remembered, project, split_heads
from tokenmixup.hosts.timm_stages import Grid, TimmStages, feat_size


class TimmPVT(TimmStages):
    """timm's PVT v2, images of any size.

    VTM is possible where keys are not pooled, as in the last stage: `kv` then takes remembered
    tokens behind the layer's own.
    """

    family = "timm PyramidVisionTransformerV2"
    host_classes = ("timm.models.pvt_v2.PyramidVisionTransformerV2",)
    stages = "stages"
    block_classes = ("timm.models.pvt_v2.Block",)
    attention_classes = ("timm.models.pvt_v2.Attention",)
    read = ("q", "kv", "num_heads", "scale", "dim", "pool", "sr", "norm", "act")
    arguments = ("x", "feat_size")

    def inputs(self, host: nn.Module) -> Iterable[tuple[int, Grid, int]]:
        """The grid depends on the image."""
        for stage, block in self.by_stage(host):
            yield block.attn.dim, None, stage

    def attention(self, layer: nn.Module) -> nn.Module:
        """The projection to keys and values, whose output may have any number of rows."""
        return cast(Any, layer).attn.kv

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From `q`, and from the first half of `kv` on pooled tokens."""
        attention, tokens = cast(Any, layer).attn, self.normalise(layer, tokens)
        pooled = tokens
        if attention.sr is not None:
            grid = tokens.mT.unflatten(2, feat_size(args, kwargs))
            grid = grid if attention.pool is None else attention.pool(grid)
            pooled = attention.norm(attention.sr(grid).flatten(2).mT)
            pooled = pooled if attention.act is None else attention.act(pooled)
        keys, _ = project(attention.kv, pooled).chunk(2, dim=-1)
        query = split_heads(project(attention.q, tokens), attention.num_heads)
        return query, split_heads(keys, attention.num_heads), attention.scale

    def token_saliency(
        self, layer: nn.Module, saliency: Tensor, args: Args, kwargs: Kwargs
    ) -> Tensor:
        """That of a key is shared out among the tokens that it is made of."""
        attention, grid = cast(Any, layer).attn, feat_size(args, kwargs)
        if attention.pool is not None:
            side = attention.pool.output_size
            return resized_saliency(saliency, (side, side), grid)
        if attention.sr is None:
            return saliency
        by = attention.sr.stride
        return resized_saliency(saliency, (grid[0] // by[0], grid[1] // by[1]), grid)

    def no_memory(self, layer: nn.Module) -> str | None:
        """Where keys are made of several tokens, one token makes none."""
        if cast(Any, layer).attn.sr is None:
            return None
        return (
            "each of its keys is made of several tokens of the grid, and a remembered token alone "
            "makes none"
        )

    def own_tokens(
        self, layer: nn.Module, remembered: Remembered, output: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """All keys and values: remembered tokens have no queries."""
        return output
