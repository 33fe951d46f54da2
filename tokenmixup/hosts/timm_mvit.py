"""timm's MViT v2, which pools queries and keys, and adds relative positions of both grids.

Dimensions: B batch, N tokens, P prefix tokens, Q queries, K keys, D width, H heads, d head width.
"""

from collections.abc import Iterable
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenmixup.functional import resized_saliency
from tokenmixup.hosts.base import Args, Kwargs, module_query_key
from tokenmixup.hosts.timm_stages import Grid, Size, TimmStages, feat_size


class TimmMViT(TimmStages):
    """timm's MViT v2, with and without a class token."""

    family = "timm MultiScaleVit"
    host_classes = ("timm.models.mvitv2.MultiScaleVit",)
    stages = "stages"
    block_classes = ("timm.models.mvitv2.MultiScaleBlock",)
    block_read = ("norm1", "attn", "dim", "dim_out")
    attention_classes = ("timm.models.mvitv2.MultiScaleAttention",)
    read = (
        *("qkv", "num_heads", "scale", "has_cls_token", "pool_q", "norm_q", "pool_k", "norm_k"),
        *("rel_pos_type",),
    )
    arguments = ("x", "feat_size")

    def inputs(self, host: nn.Module) -> Iterable[tuple[int, Grid, int]]:
        """A stage ends with the layer that pools its queries, or widens its tokens."""
        first = cast(Any, host).stages[0]
        pool = first.blocks[0].attn.pool_q
        by = (1, 1) if pool is None else pool.stride
        grid, stage = (first.feat_size[0] * by[0], first.feat_size[1] * by[1]), 0
        for block in cast(Any, self.layers(host)):
            yield block.dim, grid, stage
            after = _pooled_size(block.attn.pool_q, grid)
            stage += after != grid or block.dim != block.dim_out
            grid = after

    def prefix_tokens(self, host: nn.Module) -> int:
        """The class token, where there is one."""
        return cast(Any, host).num_prefix_tokens

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `qkv`, each pooled and normed.

        Relative positions add to a query's scores q·h[row of the key] + q·w[column of the key]:
        these products become further entries of the query, and a key has 1 at its row and column.
        The class token's query has none.
        """
        attention, grid = cast(Any, layer).attn, feat_size(args, kwargs)
        normed, prefix = self.normalise(layer, tokens), int(attention.has_cls_token)
        query, key = module_query_key(normed, attention.qkv, attention.num_heads, class_row)
        key = _pooled(attention.pool_k, attention.norm_k, key, grid, prefix)
        if class_row:
            return _normed(attention.norm_q, query), key, attention.scale
        assert not prefix, "with a class token its query is all that saliency needs"
        query = _pooled(attention.pool_q, attention.norm_q, query, grid, prefix)
        if attention.rel_pos_type == "spatial":
            sizes = (_pooled_size(pool, grid) for pool in (attention.pool_q, attention.pool_k))
            query, key = _with_relative_positions(attention, query, key, *sizes)
        return query, key, attention.scale

    def token_saliency(
        self, layer: nn.Module, saliency: Tensor, args: Args, kwargs: Kwargs
    ) -> Tensor:
        """That of a key is shared out among the tokens that it is made of."""
        grid = feat_size(args, kwargs)
        return resized_saliency(saliency, _pooled_size(cast(Any, layer).attn.pool_k, grid), grid)

    def no_memory(self, layer: nn.Module) -> str | None:
        """Keys are convolved in the grid, and their relative positions are those of a grid."""
        return (
            "it convolves its keys in their grid, and adds relative positions of that grid to all "
            "scores: a remembered token has no place in it"
        )


def _pooled_size(pool: Any, grid: Size) -> Size:
    """The grid behind a pooling, or no pooling."""
    if pool is None:
        return grid
    rows, columns = (
        (side + 2 * padding - kernel) // stride + 1
        for side, padding, kernel, stride in zip(
            grid, pool.padding, pool.kernel_size, pool.stride, strict=True
        )
    )
    return rows, columns


def _normed(norm: nn.Module | None, heads: Tensor) -> Tensor:
    return heads if norm is None else norm(heads)


def _pooled(
    pool: nn.Module | None,
    norm: nn.Module | None,
    heads: Tensor,
    grid: Size,
    prefix: int,
) -> Tensor:
    """Queries or keys (B, H, N, d) pooled over their grid, but for prefix tokens, then normed."""
    if pool is not None:
        maps = heads[:, :, prefix:].mT.unflatten(-1, grid)  # (B, H, d, R, C)
        patches = pool(maps.flatten(0, 1)).flatten(2).mT.unflatten(0, heads.shape[:2])
        heads = torch.cat((heads[:, :, :prefix], patches), dim=2)
    return _normed(norm, heads)


def _with_relative_positions(
    attention: Any, query: Tensor, key: Tensor, queries: Size, keys: Size
) -> tuple[Tensor, Tensor]:
    """Queries (B, H, Q, d + R + C) and keys (B, H, K, d + R + C), R x C the grid of the keys."""
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = query.to(dtype), key.to(dtype)
    of_row = attention.rel_pos_h[_distances(queries[0], keys[0], key.device)].to(dtype)
    of_column = attention.rel_pos_w[_distances(queries[1], keys[1], key.device)].to(dtype)
    grid = query.unflatten(2, queries)
    products = (
        torch.einsum("bhrcd,rkd->bhrck", grid, of_row),
        torch.einsum("bhrcd,ckd->bhrck", grid, of_column),
    )
    places = (
        torch.eye(keys[0], dtype=dtype, device=key.device).repeat_interleave(keys[1], 0),
        torch.eye(keys[1], dtype=dtype, device=key.device).repeat(keys[0], 1),
    )
    relative = torch.cat(products, dim=-1).flatten(2, 3) / attention.scale
    place = torch.cat(places, dim=1).expand(*key.shape[:2], -1, -1)
    return torch.cat((query, relative), dim=-1), torch.cat((key, place), dim=-1)


def _distances(queries: int, keys: int, device: torch.device) -> Tensor:
    """Rows of a table of relative positions, (queries, keys), both at the scale of the larger."""
    by_query, by_key = max(keys / queries, 1.0), max(queries / keys, 1.0)
    query = torch.arange(queries, device=device).unsqueeze(1) * by_query
    key = torch.arange(keys, device=device) * by_key
    return (query - key + (keys - 1) * by_key).long()
