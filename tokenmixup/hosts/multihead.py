"""What hosts share whose layers attend by `torch.nn.MultiheadAttention`.

Dimensions: B batch, N tokens, D width, H heads, M remembered tokens.
"""

from typing import Any, ClassVar, cast

import torch
from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    HostAdapter,
    Kwargs,
    Remembered,
    UnsupportedHostError,
    joint_query_key,
    refuse_masks,
    require_part,
)

_ATTENTION = "torch.nn.modules.activation.MultiheadAttention"
_READ = (
    *("in_proj_weight", "in_proj_bias", "num_heads", "head_dim"),
    *("batch_first", "bias_k", "add_zero_attn", "q_proj_weight"),
)
"""Attributes of the attention."""


class MultiheadHost(HostAdapter):
    """Base of the adapters for layers with `torch.nn.MultiheadAttention`, batch first."""

    masks: ClassVar[dict[str, int]] = {}
    """Attention masks among the arguments of a layer, with their positions."""

    def check_attention(self, layer: nn.Module, where: str) -> None:
        """Plain multi-head attention with one joint projection, batch first."""
        attention = cast(Any, self.attention(layer))
        require_part(attention, where, (_ATTENTION,), _READ)
        for name, expected in (
            ("batch_first", True),
            ("bias_k", None),
            ("add_zero_attn", False),
            ("q_proj_weight", None),
        ):
            value = getattr(attention, name)
            if value is not expected:
                raise UnsupportedHostError(
                    f"TokenMixup relies on `{where}.{name}` being {expected}, but it is {value}"
                )

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `in_proj_weight`."""
        refuse_masks(args, kwargs, **self.masks)
        attention = cast(Any, self.attention(layer))
        query, key = joint_query_key(
            self.normalise(layer, tokens),
            attention.in_proj_weight,
            attention.in_proj_bias,
            attention.num_heads,
            class_row,
            as_projected=True,
        )
        return query, key, attention.head_dim**-0.5

    def with_memory(
        self, layer: nn.Module, remembered: Remembered, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Through the attention's own keys and values, so that memory has no queries."""
        refuse_masks(args, kwargs, key_padding_mask=3, attn_mask=5, is_causal=7)
        query, key, _, *rest = args
        keys = torch.cat((key, self.normalise(layer, remembered.tokens)), dim=1)
        return (query, keys, keys, *rest), kwargs

    def own_tokens(
        self, layer: nn.Module, remembered: Remembered, output: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """All of the output: remembered tokens have no queries."""
        return output
