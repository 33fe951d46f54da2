"""timm's `VisionTransformer` with its standard blocks.

Dimensions: B batch, N tokens, D width, H heads.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    HostAdapter,
    Kwargs,
    TokenLayout,
    UnsupportedHostError,
    joint_query_key,
    require_type,
)


class TimmVisionTransformer(HostAdapter):
    """timm's ViT and DeiT, with or without class, distillation and register tokens."""

    family = "timm VisionTransformer"
    host_classes = ("timm.models.vision_transformer.VisionTransformer",)

    def check(self, host: nn.Module) -> None:
        """Standard blocks with a joint qkv projection, and no dropping of patches."""
        vit = cast(Any, host)
        require_type(vit.patch_drop, "torch.nn.modules.linear.Identity", "the host's `patch_drop`")
        for index, block in enumerate(vit.blocks):
            where = f"`blocks[{index}]"
            require_type(block, "timm.models.vision_transformer.Block", f"{where}`")
            require_type(block.attn, "timm.layers.attention.Attention", f"{where}.attn`")
            require_type(block.attn.qkv, "torch.nn.modules.linear.Linear", f"{where}.attn.qkv`")
            if block.attn.qkv.out_features != 3 * block.attn.attn_dim:
                raise UnsupportedHostError(
                    f"TokenMixup relies on {where}.attn.qkv` giving queries, keys and values of "
                    f"{block.attn.attn_dim} each, but it gives {block.attn.qkv.out_features}"
                )

    def layers(self, host: nn.Module) -> Sequence[nn.Module]:
        """The blocks."""
        return list(cast(Any, host).blocks)

    def layout(self, host: nn.Module) -> TokenLayout:
        """As the host's own attributes tell."""
        vit = cast(Any, host)
        return TokenLayout(
            width=vit.embed_dim,
            num_prefix_tokens=vit.num_prefix_tokens,
            class_token=vit.has_class_token,
            num_patch_tokens=None if vit.dynamic_img_size else vit.patch_embed.num_patches,
            num_classes=vit.num_classes or None,
        )

    def attention(self, layer: nn.Module) -> nn.Module:
        """The block's `attn`."""
        return cast(Any, layer).attn

    def normalise(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The block's `norm1`."""
        return cast(Any, layer).norm1(tokens)

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `qkv`, with the query and key norms."""
        attention = cast(Any, layer).attn
        query, key = joint_query_key(
            self.normalise(layer, tokens), attention.qkv, attention.num_heads, class_row
        )
        return attention.q_norm(query), attention.k_norm(key), attention.scale

    def no_weight_decay(self, host: nn.Module) -> set[str]:
        """As timm has it."""
        return set(cast(Any, host).no_weight_decay())
