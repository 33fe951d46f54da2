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
    linear_outputs,
)
from tokenmixup.hosts.timm_vit import TimmNames, TimmViT


class CCTAdapter(TimmViT):
    """CCT: no class token, so that saliency is the mean over the queries.

    Its attention takes remembered tokens as keys and values only: they cost no query.
    """

    family = "CCT"
    host_classes = ("tokenmixup.models.cct.CCT",)
    block_classes = ("tokenmixup.models.cct.Block",)
    attention_classes = ("tokenmixup.models.cct.Attention",)
    read = ("qkv", "num_heads", "scale")
    arguments = ("x", "memory")

    def check(self, host: nn.Module) -> None:
        """CCT's own blocks."""
        TimmNames.check(self, host)

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

    def head_norms(self, attention: Any, query: Tensor, key: Tensor) -> tuple[Tensor, Tensor]:
        """None."""
        return query, key

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
