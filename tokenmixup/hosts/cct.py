"""The paper's CCT, as `tokenmixup.models.cct` builds it.

Dimensions: B batch, N tokens, D width, H heads.
"""

from typing import Any, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    Kwargs,
    Remembered,
    TokenLayout,
    joint_query_key,
    linear_outputs,
    require_part,
    split_query_key,
)
from tokenmixup.hosts.timm_vit import TimmNames

BLOCK = "tokenmixup.models.cct.Block"


class CCTAdapter(TimmNames):
    """CCT: no class token, so that saliency is the mean over the queries.

    Its attention takes remembered tokens as keys and values only: they cost no query.
    """

    family = "CCT"
    host_classes = ("tokenmixup.models.cct.CCT",)

    def check(self, host: nn.Module) -> None:
        """CCT's own blocks."""
        for index, block in enumerate(self.layers(host)):
            require_part(block, f"blocks[{index}]", (BLOCK,), ("norm1", "attn"))

    def layout(self, host: nn.Module) -> TokenLayout:
        """All tokens are patch tokens."""
        cct = cast(Any, host)
        return TokenLayout(
            width=cct.embed_dim,
            num_prefix_tokens=0,
            class_token=False,
            num_patch_tokens=cct.num_tokens,
            num_classes=linear_outputs(cct.head),
        )

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """From the first two thirds of `qkv`."""
        attention = cast(Any, layer).attn
        weight, bias, heads = attention.qkv.weight, attention.qkv.bias, attention.num_heads
        tokens = self.normalise(layer, tokens)
        return *joint_query_key(tokens, weight, bias, heads, class_row), attention.scale

    def projection(self, layer: nn.Module) -> nn.Module:
        """The attention's `qkv`."""
        return cast(Any, layer).attn.qkv

    def projected_query_key(
        self, layer: nn.Module, projected: Tensor, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """The first two thirds."""
        attention = cast(Any, layer).attn
        return *split_query_key(projected, attention.num_heads, class_row), attention.scale

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
