"""What hosts with timm's names have in common: `blocks` with a `norm1` and an `attn`.

Dimensions: B batch, N tokens, D width.
"""

from collections.abc import Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import HostAdapter, class_name


class TimmNamesAdapter(HostAdapter):
    """Base of the adapters whose hosts are built as timm builds its vision transformers."""

    post_norm_block: ClassVar[str | None] = None
    """Full name of the class of blocks that norm after their attention, where there is one."""

    def layers(self, host: nn.Module) -> Sequence[nn.Module]:
        """The blocks."""
        return list(cast(Any, host).blocks)

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
