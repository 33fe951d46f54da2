"""torchvision's `VisionTransformer`, whose attention is `nn.MultiheadAttention`.

Dimensions: B batch, N tokens, D width.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import TokenLayout, linear_outputs, require_part
from tokenmixup.hosts.multihead import MultiheadHost

LAYER = "torchvision.models.vision_transformer.EncoderBlock"


class TorchvisionViT(MultiheadHost):
    """torchvision's ViT: a class token, then the patches."""

    family = "torchvision VisionTransformer"
    host_classes = ("torchvision.models.vision_transformer.VisionTransformer",)

    def check(self, host: nn.Module) -> None:
        """torchvision's own layers, with plain multi-head attention, batch first."""
        for index, layer in enumerate(cast(Any, host).encoder.layers):
            where = f"encoder.layers[{index}]"
            require_part(layer, where, (LAYER,), ("ln_1", "self_attention"), ("input",))
            self.check_attention(layer, f"{where}.self_attention")

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
            num_classes=linear_outputs(vit.heads),
        )

    def attention(self, layer: nn.Module) -> nn.Module:
        """The layer's `self_attention`."""
        return cast(Any, layer).self_attention

    def normalise(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The layer's `ln_1`."""
        return cast(Any, layer).ln_1(tokens)
