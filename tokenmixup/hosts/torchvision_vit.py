"""torchvision's `VisionTransformer`, whose attention is `nn.MultiheadAttention`.

Dimensions: B batch, N tokens, D width, H heads, M remembered tokens.
"""

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    HostAdapter,
    Kwargs,
    Remembered,
    TokenLayout,
    UnsupportedHostError,
    joint_query_key,
    linear_outputs,
    require_part,
)

LAYER = "torchvision.models.vision_transformer.EncoderBlock"
ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
READ = (
    *("in_proj_weight", "in_proj_bias", "num_heads", "head_dim"),
    *("batch_first", "bias_k", "add_zero_attn", "q_proj_weight"),
)
"""Attributes of the attention."""


class TorchvisionViT(HostAdapter):
    """torchvision's ViT: a class token, then the patches."""

    family = "torchvision VisionTransformer"
    host_classes = ("torchvision.models.vision_transformer.VisionTransformer",)

    def check(self, host: nn.Module) -> None:
        """torchvision's own layers, with plain multi-head attention, batch first."""
        for index, layer in enumerate(cast(Any, host).encoder.layers):
            where = f"encoder.layers[{index}]"
            require_part(layer, where, (LAYER,), ("ln_1", "self_attention"), ("input",))
            attention, where = layer.self_attention, f"{where}.self_attention"
            require_part(attention, where, (ATTENTION,), READ)
            for name, value, expected in (
                ("batch_first", attention.batch_first, True),
                ("bias_k", attention.bias_k, None),
                ("add_zero_attn", attention.add_zero_attn, False),
                ("q_proj_weight", attention.q_proj_weight, None),
            ):
                if value is not expected:
                    raise UnsupportedHostError(
                        f"TokenMixup relies on `{where}.{name}` being {expected}, but it is {value}"
                    )

    def layers(self, host: nn.Module) -> Sequence[nn.Module]:
        """The encoder's layers."""
        return list(cast(Any, host).encoder.layers)

    def layout(self, host: nn.Module) -> TokenLayout:
        """A class token and the patches."""
        vit = cast(Any, host)
        return TokenLayout(
            width=vit.hidden_dim,
            num_prefix_tokens=1,
            class_token=True,
            num_patch_tokens=vit.seq_length - 1,
            num_classes=linear_outputs(vit.heads[-1]),
        )

    def attention(self, layer: nn.Module) -> nn.Module:
        """The layer's `self_attention`."""
        return cast(Any, layer).self_attention

    def normalise(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The layer's `ln_1`."""
        return cast(Any, layer).ln_1(tokens)

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `in_proj_weight`."""
        attention = cast(Any, layer).self_attention
        query, key = joint_query_key(
            self.normalise(layer, tokens),
            attention.in_proj_weight,
            attention.in_proj_bias,
            attention.num_heads,
            class_row,
        )
        return query, key, attention.head_dim**-0.5

    def with_memory(
        self, layer: nn.Module, remembered: Remembered, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Through the attention's own keys and values, so that memory has no queries."""
        query, key, _, *rest = args
        keys = torch.cat((key, self.normalise(layer, remembered.tokens)), dim=1)
        return (query, keys, keys, *rest), kwargs

    def own_tokens(
        self, layer: nn.Module, remembered: Remembered, output: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """All of the output: remembered tokens have no queries."""
        return output
