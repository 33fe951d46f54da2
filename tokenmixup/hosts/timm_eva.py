"""timm's `Eva`: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary embeddings.

Dimensions: B batch, N tokens, T patch tokens, D width, H heads, d head width, M remembered tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenmixup.hosts.base import (
    LINEAR,
    Args,
    Kwargs,
    Remembered,
    TokenLayout,
    argument,
    class_name,
    joint_query_key,
    linear_outputs,
    refuse,
    require_part,
    split_heads,
    with_argument,
)
from tokenmixup.hosts.timm_vit import TimmNames, refuse_dropped_patches

BLOCK = "timm.models.eva.EvaBlock"
POST_NORM_BLOCK = "timm.models.eva.EvaBlockPostNorm"
ATTENTION = "timm.models.eva.EvaAttention"
ROPE_ATTENTION = "timm.layers.attention.AttentionRope"
ARGUMENTS = ("x", "rope", "attn_mask", "is_causal")
"""Of blocks and of their attention."""
READ = (
    *("qkv", "q_proj", "k_proj", "num_heads", "head_dim", "scale", "q_norm", "k_norm"),
    *("num_prefix_tokens", "rotate_half"),
)
"""Attributes of both attentions."""


class TimmEva(TimmNames):
    """timm's Eva.

    Patch tokens carry the rotary embedding of their position, remembered tokens that of their
    original position, prefix tokens none.
    """

    family = "timm Eva"
    host_classes = ("timm.models.eva.Eva",)
    post_norm_block = POST_NORM_BLOCK

    def check(self, host: nn.Module) -> None:
        """Eva's own blocks and attentions, and no dropping of patches."""
        eva = cast(Any, host)
        refuse_dropped_patches(eva.patch_drop)
        for index, block in enumerate(eva.blocks):
            where = f"blocks[{index}]"
            require_part(block, where, (BLOCK, POST_NORM_BLOCK), ("norm1", "attn"), ARGUMENTS)
            attentions = (ATTENTION, ROPE_ATTENTION)
            require_part(block.attn, f"{where}.attn", attentions, READ, ARGUMENTS)
            if block.attn.qkv is not None:
                require_part(block.attn.qkv, f"{where}.attn.qkv", (LINEAR,))

    def layout(self, host: nn.Module) -> TokenLayout:
        """From the host's attributes."""
        eva = cast(Any, host)
        return TokenLayout(
            width=eva.embed_dim,
            num_prefix_tokens=eva.num_prefix_tokens,
            class_token=eva.cls_token is not None,
            num_patch_tokens=None if eva.dynamic_img_size else eva.patch_embed.num_patches,
            num_classes=linear_outputs(eva.head),
        )

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """Joint or separate projections, query and key norms, then the rotation."""
        _refuse_masks(args, kwargs)
        attention = cast(Any, layer).attn
        tokens = self.normalise(layer, tokens)
        if attention.qkv is not None:
            weight, bias = attention.qkv.weight, _joint_bias(attention)
            query, key = joint_query_key(tokens, weight, bias, attention.num_heads, class_row)
        else:
            query = attention.q_proj(tokens[:, :1] if class_row else tokens)
            query = split_heads(query, attention.num_heads)
            key = attention.k_proj(tokens).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
        query, key = attention.q_norm(query), attention.k_norm(key)
        rope = argument(1, "rope", args, kwargs)
        if rope is not None:
            key = _rotate(key, rope, attention)
            if not class_row:
                query = _rotate(query, rope, attention)
        groups = attention.num_heads // key.shape[1]  # heads that share a key
        return query, key.repeat_interleave(groups, dim=1), attention.scale

    def with_memory(
        self, layer: nn.Module, remembered: Remembered, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Remembered tokens follow the layer's own, and so do their rotary embeddings."""
        _refuse_masks(args, kwargs)
        args, kwargs = super().with_memory(layer, remembered, args, kwargs)
        rope = argument(1, "rope", args, kwargs)
        if rope is None:
            return args, kwargs
        # One embedding for all heads, or one for each: (T, 2 d) or (H, T, 2 d).
        own = rope.unsqueeze(0) if rope.dim() == 2 else rope
        more = own[:, remembered.positions].transpose(0, 1)  # (B, 1 or H, M, 2 d)
        own = own.expand(len(more), -1, -1, -1)
        return with_argument(1, "rope", torch.cat((own, more), dim=2), args, kwargs)


def _joint_bias(attention: Any) -> Tensor | None:
    """Bias of queries, keys and values: EVA's own attention has none for the keys."""
    if class_name(type(attention)) == ROPE_ATTENTION:
        return attention.qkv.bias
    if attention.q_bias is None:
        return None
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))


def _rotate(heads: Tensor, rope: Tensor, attention: Any) -> Tensor:
    """Rotate the patch tokens of queries or keys (B, H, N, d), as the attention itself does it."""
    from timm.layers import apply_rot_embed_cat

    prefix = attention.num_prefix_tokens
    rotated = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=attention.rotate_half)
    return torch.cat((heads[:, :, :prefix], rotated), dim=2)


def _refuse_masks(args: Args, kwargs: Kwargs) -> None:
    for position, name in enumerate(ARGUMENTS[2:], start=2):
        refuse(name, argument(position, name, args, kwargs))
