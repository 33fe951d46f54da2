"""timm's `VisionTransformer` with one attention per block, and what other hosts share with it.

Dimensions: B batch, N tokens, D width, H heads, C classes.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    HostAdapter,
    Kwargs,
    Remembered,
    TokenLayout,
    UnsupportedHostError,
    class_name,
    linear_outputs,
    module_query_key,
    plain_linear,
    refuse_masks,
    require_part,
    split_query_key,
)

POST_NORM_BLOCK = "timm.models.vision_transformer.ResPostBlock"


class TimmNames(HostAdapter):
    """Base of the adapters for hosts with timm's names: `blocks` with a `norm1` and an `attn`."""

    block_classes: ClassVar[tuple[str, ...]]
    """Full names of the allowed classes of blocks."""
    block_read: ClassVar[tuple[str, ...]] = ("norm1", "attn")
    """The attributes of the blocks that the adapter reads."""
    post_norm_block: ClassVar[str | None] = None
    """The one of them that norms after its attention, where there is one."""
    attention_classes: ClassVar[tuple[str, ...]]
    """Full names of the allowed classes of attention."""
    read: ClassVar[tuple[str, ...]]
    """The attributes of the attention that the adapter reads."""
    arguments: ClassVar[tuple[str, ...]]
    """All allowed arguments of blocks and of their attention."""

    def blocks(self, host: nn.Module) -> dict[str, nn.Module]:
        """The blocks by their place in the host, in the order of the forward pass."""
        return {f"blocks[{i}]": block for i, block in enumerate(cast(Any, host).blocks)}

    def check(self, host: nn.Module) -> None:
        """Blocks and attentions of the known classes, whose adapters take effect."""
        for where, block in self.blocks(host).items():
            require_part(block, where, self.block_classes, self.block_read, self.arguments)
            attention, where = cast(Any, block).attn, f"{where}.attn"
            require_part(attention, where, self.attention_classes, self.read, self.arguments)
            self.projection_bias(attention)

    def layout(self, host: nn.Module) -> TokenLayout:
        """From the host's attributes."""
        vit = cast(Any, host)
        return TokenLayout(
            width=vit.embed_dim,
            num_prefix_tokens=vit.num_prefix_tokens,
            class_token=vit.cls_token is not None,
            num_patch_tokens=None if vit.dynamic_img_size else vit.patch_embed.num_patches,
            num_classes=linear_outputs(vit.head),
        )

    def projection_bias(self, attention: Any) -> Tensor | None:
        """What the attention adds to the output of `qkv`; by default nothing."""
        return None

    def layers(self, host: nn.Module) -> Sequence[nn.Module]:
        """The blocks."""
        return list(self.blocks(host).values())

    def attention(self, layer: nn.Module) -> nn.Module:
        """The block's `attn`."""
        return cast(Any, layer).attn

    def normalise(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The block's `norm1`; post-norm blocks attend to their tokens as they are."""
        if class_name(type(layer)) == self.post_norm_block:
            return tokens
        return cast(Any, layer).norm1(tokens)

    def no_weight_decay(self, host: nn.Module) -> set[str]:
        """As the host has it."""
        return set(cast(Any, host).no_weight_decay())


class TimmViT(TimmNames):
    """timm's ViT, DeiT, DeiT-III, SigLIP, DINOv2 and any other `VisionTransformer`.

    Class, distillation and register tokens are prefix tokens; there may be none. Blocks with
    parallel branches and differential attention have no single attention map and are refused,
    as are hosts that drop patches.
    """

    family = "timm VisionTransformer"
    host_classes = ("timm.models.vision_transformer.VisionTransformer",)
    block_classes: ClassVar[tuple[str, ...]] = (
        "timm.models.vision_transformer.Block",
        POST_NORM_BLOCK,
    )
    post_norm_block = POST_NORM_BLOCK
    attention_classes = ("timm.layers.attention.Attention",)
    read: ClassVar[tuple[str, ...]] = ("qkv", "num_heads", "attn_dim", "scale", "q_norm", "k_norm")
    arguments: ClassVar[tuple[str, ...]] = ("x", "attn_mask", "is_causal")

    def check(self, host: nn.Module) -> None:
        """timm's own blocks, qkv of whole heads, and no dropping of patches."""
        refuse_dropped_patches(host)
        super().check(host)
        for index, block in enumerate(cast(Any, host).blocks):
            width, outputs = block.attn.attn_dim, block.attn.qkv.out_features
            if outputs != 3 * width:
                raise UnsupportedHostError(
                    f"TokenMixup relies on `blocks[{index}].attn.qkv` giving queries, keys and "
                    f"values of {width} each, but it gives {outputs}"
                )

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `qkv`, with the query and key norms."""
        refuse_masks(args, kwargs, attn_mask=1, is_causal=2)
        attention = cast(Any, layer).attn
        query, key = module_query_key(
            self.normalise(layer, tokens),
            attention.qkv,
            attention.num_heads,
            class_row,
            as_projected=class_row
            and all(type(norm) is nn.Identity for norm in (attention.q_norm, attention.k_norm)),
        )
        return *self.head_norms(attention, query, key), attention.scale

    def head_norms(self, attention: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """The attention's norms of queries and keys."""
        return attention.q_norm(query), attention.k_norm(key)

    def projection(self, layer: nn.Module) -> nn.Module | None:
        """The attention's `qkv`; None where something else has taken its place."""
        qkv = cast(Any, layer).attn.qkv
        return qkv if plain_linear(qkv) else None

    def projected_query_key(
        self, layer: nn.Module, projected: Tensor, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """The first two thirds, with the query and key norms."""
        attention = cast(Any, layer).attn
        query, key = split_query_key(projected, attention.num_heads, class_row)
        return *self.head_norms(attention, query, key), attention.scale

    def with_memory(
        self, layer: nn.Module, remembered: Remembered, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Remembered tokens follow the layer's own."""
        refuse_masks(args, kwargs, attn_mask=1, is_causal=2)
        return super().with_memory(layer, remembered, args, kwargs)

    def logits(self, output: Any) -> Tensor:
        """The host's output; an error if DeiT trains with a teacher."""
        if isinstance(output, tuple):
            raise ValueError(
                "the distilled host returns the logits of both its heads, and TokenMixup does not "
                "know what its teacher would say of mixed images: call "
                "set_distilled_training(False), and the host returns their mean"
            )
        return output


def refuse_dropped_patches(host: nn.Module) -> None:
    """Raise `UnsupportedHostError` if one of timm's hosts drops patches in training."""
    patch_drop = cast(Any, host).patch_drop
    if patch_drop is not None and not isinstance(patch_drop, nn.Identity):
        raise UnsupportedHostError(
            "build the host with patch_drop_rate=0: it drops patches in training "
            "(patch_drop_rate > 0), different ones in each image, but TokenMixup exchanges tokens "
            "of one place"
        )


def joint_bias(attention: Any) -> Tensor | None:
    """Bias of queries, keys and values where the attention keeps them apart, or None.

    Such an attention reads the weight of `qkv` itself unless it adds the bias separately.

    Raises:
        UnsupportedHostError: it reads the weight of what is no linear layer.
    """
    if attention.q_bias is None:
        return None
    if not (attention.qkv_bias_separate or isinstance(attention.qkv, nn.Linear)):
        found = class_name(type(attention.qkv))
        raise UnsupportedHostError(
            f"a {found} stands in the place of a block's `attn.qkv`, and has no effect: this "
            f"{class_name(type(attention))} multiplies by `qkv.weight` without calling `qkv`. Set "
            "`qkv_bias_separate = True` on every block's `attn` before TokenMixup is attached "
            "(it then calls `qkv`), or leave `qkv` as it is"
        )
    return torch.cat((attention.q_bias, attention.k_bias, attention.v_bias))
