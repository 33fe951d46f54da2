"""timm's `Eva`: EVA, EVA-02, DINOv3, Perception Encoder and other ViTs with rotary embeddings.

Dimensions: B batch, N tokens, T patch tokens, D width, H heads, d head width, M remembered tokens.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    Kwargs,
    Remembered,
    argument,
    class_name,
    module_query_key,
    project,
    refuse_masks,
    split_heads,
    with_argument,
)
from tokenmixup.hosts.timm_vit import TimmNames, joint_bias, refuse_dropped_patches

POST_NORM_BLOCK = "timm.models.eva.EvaBlockPostNorm"
ROPE_ATTENTION = "timm.layers.attention.AttentionRope"


class TimmEva(TimmNames):
    """timm's Eva.

    Patch tokens carry the rotary embedding of their position, remembered tokens that of their
    original position, prefix tokens none.
    """

    family = "timm Eva"
    host_classes = ("timm.models.eva.Eva",)
    block_classes = ("timm.models.eva.EvaBlock", POST_NORM_BLOCK)
    post_norm_block = POST_NORM_BLOCK
    attention_classes = ("timm.models.eva.EvaAttention", ROPE_ATTENTION)
    read = (
        *("qkv", "q_proj", "k_proj", "num_heads", "head_dim", "scale", "q_norm", "k_norm"),
        *("num_prefix_tokens", "rotate_half"),
    )
    arguments = ("x", "rope", "attn_mask", "is_causal")

    def check(self, host: nn.Module) -> None:
        """Eva's own blocks, and no dropping of patches."""
        refuse_dropped_patches(host)
        super().check(host)

    def projection_bias(self, attention: Any) -> Tensor | None:
        """EVA's own attention keeps the biases apart from the projection."""
        own = class_name(type(attention)) != ROPE_ATTENTION
        return joint_bias(attention) if own else None

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """Joint or separate projections, query and key norms, then the rotation."""
        refuse_masks(args, kwargs, attn_mask=2, is_causal=3)
        attention = cast(Any, layer).attn
        tokens = self.normalise(layer, tokens)
        if attention.qkv is not None:
            bias = self.projection_bias(attention)
            query, key = module_query_key(
                tokens, attention.qkv, attention.num_heads, class_row, bias
            )
        else:
            query = split_heads(project(attention.q_proj, tokens, class_row), attention.num_heads)
            key = project(attention.k_proj, tokens)
            key = key.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2)
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
        refuse_masks(args, kwargs, attn_mask=2, is_causal=3)
        args, kwargs = super().with_memory(layer, remembered, args, kwargs)
        rope = argument(1, "rope", args, kwargs)
        if rope is None:
            return args, kwargs
        # One embedding for all heads, or one for each: (T, 2 d) or (H, T, 2 d).
        own = rope.unsqueeze(0) if rope.dim() == 2 else rope
        more = own[:, remembered.positions].transpose(0, 1)  # (B, 1 or H, M, 2 d)
        own = own.expand(len(more), -1, -1, -1)
        return with_argument(1, "rope", torch.cat((own, more), dim=2), args, kwargs)


def _rotate(heads: Tensor, rope: Tensor, attention: Any) -> Tensor:
    """Rotate the patch tokens of queries or keys (B, H, N, d), as the attention itself does it."""
    from timm.layers import apply_rot_embed_cat

    prefix = attention.num_prefix_tokens
    rotated = apply_rot_embed_cat(heads[:, :, prefix:], rope, half=attention.rotate_half)
    return torch.cat((heads[:, :, :prefix], rotated), dim=2)
