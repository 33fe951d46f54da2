"""timm's `VisionTransformer` with one attention a block.

Dimensions: B batch, N tokens, D width, H heads, C classes.
"""

from typing import Any, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import (
    LINEAR,
    Args,
    Kwargs,
    Remembered,
    TokenLayout,
    UnsupportedHostError,
    argument,
    joint_query_key,
    linear_outputs,
    refuse,
    require_part,
    split_query_key,
)
from tokenmixup.hosts.timm_names import TimmNamesAdapter

BLOCK = "timm.models.vision_transformer.Block"
POST_NORM_BLOCK = "timm.models.vision_transformer.ResPostBlock"
ATTENTION = "timm.layers.attention.Attention"
ARGUMENTS = ("x", "attn_mask", "is_causal")
"""Of blocks and of their attention."""
READ = ("qkv", "num_heads", "attn_dim", "scale", "q_norm", "k_norm")
"""Attributes of the attention."""


class TimmVisionTransformer(TimmNamesAdapter):
    """timm's ViT, DeiT, DeiT-III, SigLIP, DINOv2 and whatever else is a `VisionTransformer`.

    Class, distillation and register tokens are prefix tokens; there may be none. Refused are
    blocks with two branches in parallel and differential attention, which have no single
    attention map, and hosts that drop patches.
    """

    family = "timm VisionTransformer"
    host_classes = ("timm.models.vision_transformer.VisionTransformer",)
    post_norm_block = POST_NORM_BLOCK

    def check(self, host: nn.Module) -> None:
        """Blocks with a joint qkv projection, and no dropping of patches."""
        vit = cast(Any, host)
        refuse_dropped_patches(vit.patch_drop)
        for index, block in enumerate(vit.blocks):
            where = f"blocks[{index}]"
            require_part(block, where, (BLOCK, POST_NORM_BLOCK), ("norm1", "attn"), ARGUMENTS)
            require_part(block.attn, f"{where}.attn", (ATTENTION,), READ, ARGUMENTS)
            require_part(block.attn.qkv, f"{where}.attn.qkv", (LINEAR,))
            if block.attn.qkv.out_features != 3 * block.attn.attn_dim:
                raise UnsupportedHostError(
                    f"TokenMixup relies on `{where}.attn.qkv` giving queries, keys and values of "
                    f"{block.attn.attn_dim} each, but it gives {block.attn.qkv.out_features}"
                )

    def layout(self, host: nn.Module) -> TokenLayout:
        """As the host's own attributes tell."""
        vit = cast(Any, host)
        return TokenLayout(
            width=vit.embed_dim,
            num_prefix_tokens=vit.num_prefix_tokens,
            class_token=vit.has_class_token,
            num_patch_tokens=None if vit.dynamic_img_size else vit.patch_embed.num_patches,
            num_classes=linear_outputs(vit.head),
        )

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `qkv`, with the query and key norms."""
        _refuse_masks(args, kwargs)
        attention = cast(Any, layer).attn
        query, key = joint_query_key(
            self.normalise(layer, tokens),
            attention.qkv.weight,
            attention.qkv.bias,
            attention.num_heads,
            class_row,
        )
        return attention.q_norm(query), attention.k_norm(key), attention.scale

    def projection(self, layer: nn.Module) -> nn.Module:
        """The attention's `qkv`."""
        return cast(Any, layer).attn.qkv

    def projected_query_key(
        self, layer: nn.Module, projected: Tensor, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """The first two thirds, with the query and key norms."""
        attention = cast(Any, layer).attn
        query, key = split_query_key(projected, attention.num_heads, class_row)
        return attention.q_norm(query), attention.k_norm(key), attention.scale

    def with_memory(
        self, layer: nn.Module, remembered: Remembered, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Remembered tokens follow the layer's own."""
        _refuse_masks(args, kwargs)
        return super().with_memory(layer, remembered, args, kwargs)

    def logits(self, output: Any) -> Tensor:
        """What the host returns, unless DeiT is in its training with a teacher."""
        if isinstance(output, tuple):
            raise ValueError(
                "the distilled host returns the logits of both its heads, and TokenMixup does not "
                "know what its teacher would say of mixed images: call "
                "set_distilled_training(False), and the host returns their mean"
            )
        return output


def refuse_dropped_patches(patch_drop: nn.Module | None) -> None:
    """Raise `UnsupportedHostError` where timm drops patches in training."""
    if patch_drop is not None and not isinstance(patch_drop, nn.Identity):
        raise UnsupportedHostError(
            "the host drops patches in training (patch_drop_rate > 0), other ones in each image, "
            "so that its n-th tokens come from different places; TokenMixup exchanges tokens of "
            "one place: build the host with patch_drop_rate=0"
        )


def _refuse_masks(args: Args, kwargs: Kwargs) -> None:
    for position, name in enumerate(ARGUMENTS[1:], start=1):
        refuse(name, argument(position, name, args, kwargs))
