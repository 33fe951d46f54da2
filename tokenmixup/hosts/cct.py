"""How TokenMixup attaches to a CCT.

Dimensions: B batch, N tokens, D width, H heads.
"""

from typing import TYPE_CHECKING, Any, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    Kwargs,
    Remembered,
    TokenLayout,
    joint_query_key,
    split_query_key,
)
from tokenmixup.hosts.timm_names import TimmNamesAdapter

if TYPE_CHECKING:  # which imports timm
    from tokenmixup.models.cct import CCT, Block


class CCTAdapter(TimmNamesAdapter):
    """CCT: no class token, saliency is the mean over the queries.

    Its attention takes remembered tokens as keys and values only, so no query is wasted on them.
    """

    family = "CCT"
    host_classes = ("tokenmixup.models.cct.CCT",)

    def check(self, host: nn.Module) -> None:
        """Nothing to check: the model lives in this repository, beside its adapter."""

    def layout(self, host: nn.Module) -> TokenLayout:
        """All tokens are patch tokens."""
        cct = cast("CCT", host)
        return TokenLayout(
            width=cct.embed_dim,
            num_prefix_tokens=0,
            class_token=False,
            num_patch_tokens=cct.num_tokens,
            num_classes=cct.num_classes or None,
        )

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `qkv`."""
        attention = cast("Block", layer).attn
        query, key = joint_query_key(
            self.normalise(layer, tokens),
            attention.qkv.weight,
            attention.qkv.bias,
            attention.num_heads,
            class_row,
        )
        return query, key, attention.scale

    def projection(self, layer: nn.Module) -> nn.Module:
        """The attention's `qkv`."""
        return cast("Block", layer).attn.qkv

    def projected_query_key(
        self, layer: nn.Module, projected: Tensor, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """The first two thirds."""
        attention = cast("Block", layer).attn
        query, key = split_query_key(projected, attention.num_heads, class_row)
        return query, key, attention.scale

    def with_memory(
        self, layer: nn.Module, remembered: Remembered, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Through the attention's own `memory` argument."""
        return args, {**kwargs, "memory": self.normalise(layer, remembered.tokens)}

    def own_tokens(
        self, layer: nn.Module, remembered: Remembered, output: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """All of the output: remembered tokens have no queries."""
        return output
