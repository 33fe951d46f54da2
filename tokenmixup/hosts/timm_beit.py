"""timm's `Beit`, whose attention adds a relative-position bias to its scores.

Dimensions: B batch, N tokens, D width, H heads, d head width, M remembered tokens.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    Kwargs,
    Remembered,
    TokenLayout,
    argument,
    joint_projection,
    linear_outputs,
    module_query_key,
    plain_linear,
    split_heads,
)
from tokenmixup.hosts.timm_vit import TimmNames, joint_bias

PREFIX_TOKENS = 1


class TimmBeit(TimmNames):
    """timm's BEiT and BEiT v2, with a bias per block, a shared bias, both or none.

    The bias has a fixed size, so the attention cannot take more tokens. At a VTM layer the
    adapter therefore replaces the attention's output: the host's projections attend to the
    layer's tokens and the remembered ones, which have the bias of their original position.
    """

    family = "timm Beit"
    host_classes = ("timm.models.beit.Beit",)
    block_classes = ("timm.models.beit.Block",)
    attention_classes = ("timm.models.beit.Attention",)
    read = (
        *("qkv", "q_bias", "k_bias", "v_bias", "qkv_bias_separate", "num_heads", "scale"),
        *("relative_position_bias_table", "relative_position_index"),
        *("attn_drop", "proj", "proj_drop"),
    )
    arguments = ("x", "shared_rel_pos_bias")

    def layout(self, host: nn.Module) -> TokenLayout:
        """A class token and the patches."""
        beit = cast(Any, host)
        return TokenLayout(
            width=beit.embed_dim,
            num_prefix_tokens=PREFIX_TOKENS,
            class_token=True,
            num_patch_tokens=beit.patch_embed.num_patches,
            num_classes=linear_outputs(beit.head),
        )

    def projection_bias(self, attention: Any) -> Tensor | None:
        """Kept apart from the projection."""
        return joint_bias(attention)

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `qkv`."""
        attention = cast(Any, layer).attn
        query, key = module_query_key(
            self.normalise(layer, tokens),
            attention.qkv,
            attention.num_heads,
            class_row,
            self.projection_bias(attention),
            as_projected=True,
        )
        return query, key, attention.scale

    def score_bias(
        self, layer: nn.Module, args: Args, kwargs: Kwargs, class_row: bool
    ) -> Tensor | None:
        """The relative-position bias, the block's own and the shared one, (1, H, N or 1, N)."""
        rows = slice(1) if class_row else slice(None)
        return _relative_bias(cast(Any, layer).attn, args, kwargs, rows)

    def with_memory(
        self, layer: nn.Module, remembered: Remembered, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Unchanged: see :meth:`own_tokens`."""
        return args, kwargs

    def own_tokens(
        self, layer: nn.Module, remembered: Remembered, output: Any, args: Args, kwargs: Kwargs
    ) -> Tensor:
        """The layer's tokens (B, N, D) attending to themselves and to the remembered ones."""
        attention, tokens = cast(Any, layer).attn, args[0]
        everything = torch.cat((tokens, self.normalise(layer, remembered.tokens)), dim=1)
        qkv, bias = attention.qkv, joint_bias(attention)
        if plain_linear(qkv):
            query, key, value = (
                joint_projection(inputs, qkv.weight, bias, part, attention.num_heads)
                for part, inputs in enumerate((tokens, everything, everything))
            )
        else:  # in training, with the dropout of adapters: this is the layer's output
            projected = qkv(everything) if bias is None else qkv(everything) + bias
            query, key, value = (
                split_heads(part, attention.num_heads) for part in projected.chunk(3, dim=-1)
            )
            query = query[:, :, : tokens.shape[1]]
        mask = _relative_bias(attention, args, kwargs, slice(None))
        if mask is not None:
            more = mask[0, :, :, PREFIX_TOKENS + remembered.positions]  # (H, N, B, M)
            own = mask.expand(len(tokens), -1, -1, -1)
            mask = torch.cat((own, more.permute(2, 0, 1, 3)), dim=-1)
        dropout = attention.attn_drop.p if attention.training else 0.0
        out = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, dropout_p=dropout)
        return attention.proj_drop(attention.proj(out.transpose(1, 2).flatten(2)))


def _relative_bias(attention: Any, args: Args, kwargs: Kwargs, rows: slice) -> Tensor | None:
    """Rows of the bias, (1, H, rows, N), from the arguments that block and attention share."""
    bias = argument(1, "shared_rel_pos_bias", args, kwargs)
    if bias is not None:
        bias = bias[..., rows, :].reshape(1, attention.num_heads, -1, bias.shape[-1])
    if attention.relative_position_bias_table is not None:
        index = attention.relative_position_index[rows]
        own = attention.relative_position_bias_table[index].permute(2, 0, 1).unsqueeze(0)
        bias = own if bias is None else bias + own
    return bias
