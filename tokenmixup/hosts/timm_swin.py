"""timm's Swin Transformers, which attend within windows that every other layer shifts.

Dimensions: B' windows of all samples, W windows of one, n positions in a window, D width, H heads,
d head width.
"""

import math
from collections.abc import Iterable
from typing import Any, ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmixup.hosts.base import Args, Kwargs, module_query_key
from tokenmixup.hosts.timm_stages import Grid, TimmStages
from tokenmixup.hosts.timm_vit import joint_bias
from tokenmixup.hosts.windows import GridHost, Windows


class TimmSwin(GridHost, TimmStages):
    """timm's Swin, with images of a fixed or of any size, and windows of any size."""

    family = "timm SwinTransformer"
    host_classes = ("timm.models.swin_transformer.SwinTransformer",)
    stages = "layers"
    block_classes: ClassVar[tuple[str, ...]] = (
        "timm.models.swin_transformer.SwinTransformerBlock",
    )
    block_read = (
        *("norm1", "attn", "dim", "window_size", "shift_size", "input_resolution"),
        *("dynamic_mask", "attn_mask"),
    )
    attention_classes = ("timm.models.swin_transformer.WindowAttention",)
    read: ClassVar[tuple[str, ...]] = ("qkv", "num_heads", "scale", "_get_rel_pos_bias")
    arguments = ("x", "mask")

    def inputs(self, host: nn.Module) -> Iterable[tuple[int, Grid, int]]:
        """No grid where the host takes images of any size."""
        any_size = cast(Any, host).dynamic_img_size
        for stage, block in self.by_stage(host):
            yield block.dim, None if any_size else tuple(block.input_resolution), stage

    def windows(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> Windows:
        """Rolled, then padded."""
        block = cast(Any, layer)
        grid = tuple(args[0].shape[1:3])
        return Windows(grid, tuple(block.window_size), tuple(block.shift_size))

    def window_query_key(self, layer: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `qkv`."""
        attention = cast(Any, layer).attn
        query, key = module_query_key(windows, attention.qkv, attention.num_heads, False)
        return query, key, attention.scale

    def relative_bias(self, layer: nn.Module) -> Tensor:
        """By the host itself."""
        return cast(Any, layer).attn._get_rel_pos_bias()

    def shift_bias(self, layer: nn.Module, windows: Windows, like: Tensor) -> Tensor | None:
        """The mask that the host keeps for images of a fixed size."""
        block = cast(Any, layer)
        if block.dynamic_mask or block.attn_mask is None:
            return windows.shift_bias(like)
        return block.attn_mask[None, :, None]


class TimmSwinV2(TimmSwin):
    """timm's Swin V2: cosine attention, a bias from an MLP, and the norm after the attention."""

    family = "timm SwinTransformerV2"
    host_classes = ("timm.models.swin_transformer_v2.SwinTransformerV2",)
    block_classes = ("timm.models.swin_transformer_v2.SwinTransformerV2Block",)
    attention_classes = ("timm.models.swin_transformer_v2.WindowAttention",)
    read = (
        *("qkv", "q_bias", "k_bias", "v_bias", "qkv_bias_separate", "num_heads", "logit_scale"),
        *("cpb_mlp", "relative_coords_table", "relative_position_index", "window_size"),
    )

    def projection_bias(self, attention: Any) -> Tensor | None:
        """Kept apart from the projection."""
        return joint_bias(attention)

    def normalise(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """Nothing: the norm follows the attention."""
        return tokens

    def window_query_key(self, layer: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor, float]:
        """Of unit length, in float32, with the scale of each head in the queries."""
        attention = cast(Any, layer).attn
        query, key = module_query_key(
            windows, attention.qkv, attention.num_heads, False, self.projection_bias(attention)
        )
        query, key = cosine(query, key, attention.logit_scale)
        return query, key, 1.0

    def relative_bias(self, layer: nn.Module) -> Tensor:
        """From the MLP, as the attention computes it inside its own pass."""
        attention = cast(Any, layer).attn
        table = attention.cpb_mlp(attention.relative_coords_table).flatten(0, 2)
        bias = table[attention.relative_position_index.flatten()].mT  # (H, n n)
        positions = attention.window_size[0] * attention.window_size[1]
        return 16 * torch.sigmoid(bias).unflatten(1, (positions, positions)).unsqueeze(0)


def cosine(query: Tensor, key: Tensor, logit_scale: Tensor) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, n, d) whose products are cosines by the scale (H, 1, 1) of each head.

    The scale is bounded as in Swin V2. The result is in float32 or wider.
    """
    dtype = torch.promote_types(query.dtype, torch.float32)
    query, key = (F.normalize(one.to(dtype), dim=-1) for one in (query, key))
    return query * logit_scale.to(dtype).clamp(max=math.log(100)).exp(), key
