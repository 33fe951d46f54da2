"""The Swin classifier of Hugging Face's `transformers` (tested from version 5.17 on).

Dimensions: B' windows of all samples, n positions in a window, D width, H heads, d head width.
"""

from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    Kwargs,
    TokenLayout,
    argument,
    linear_outputs,
    project,
    require_part,
    split_heads,
)
from tokenmixup.hosts.transformers_vit import TRAINER, check_implementation
from tokenmixup.hosts.windows import WindowedHost, Windows

_MODULE = "transformers.models.swin.modeling_swin"
_LAYER_READ = ("layernorm_before", "attention", "window_size", "shift_size")
_READ = ("q_proj", "k_proj", "num_attention_heads", "scaling", "relative_position_bias")


class TransformersSwin(WindowedHost):
    """`SwinForImageClassification`, images of any size."""

    family = "transformers SwinForImageClassification"
    host_classes = (f"{_MODULE}.SwinForImageClassification",)
    refused = TRAINER

    def check(self, host: nn.Module) -> None:
        """Layers with separate projections, and an implementation that the tests cover."""
        check_implementation(self.family, host)
        names = {part: name for name, part in host.named_modules()}
        arguments = ("hidden_states", "input_dimensions", "always_partition")
        for layer in self.layers(host):
            where = names[layer]
            require_part(layer, where, (f"{_MODULE}.SwinLayer",), _LAYER_READ, arguments)
            attention = self.attention(layer)
            require_part(attention, f"{where}.attention", (f"{_MODULE}.SwinAttention",), _READ)

    def layers(self, host: nn.Module) -> Sequence[nn.Module]:
        """Those of the first stage, then those of the second, and so on."""
        return [layer for stage in _stages(host) for layer in stage.blocks]

    def layouts(self, host: nn.Module) -> Sequence[TokenLayout]:
        """The grid depends on the image."""
        classes = linear_outputs(cast(Any, host).classifier)
        return [
            TokenLayout(layer.attention.q_proj.in_features, 0, False, None, classes, number)
            for number, stage in enumerate(_stages(host))
            for layer in stage.blocks
        ]

    def attention(self, layer: nn.Module) -> nn.Module:
        """The layer's `attention`."""
        return cast(Any, layer).attention

    def normalise(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The layer's first norm."""
        return cast(Any, layer).layernorm_before(tokens)

    def windows(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> Windows:
        """Padded, then rolled; of grids as small as a window one, or as many of the short side."""
        swin, grid = cast(Any, layer), argument(1, "input_dimensions", args, kwargs)
        side, by = swin.window_size, swin.shift_size
        if min(grid) <= side and not argument(2, "always_partition", args, kwargs):
            side, by = min(grid), 0
        return Windows(tuple(grid), (side, side), (by, by), pads_first=True)

    def window_query_key(self, layer: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor, float]:
        """From the separate projections."""
        attention = cast(Any, layer).attention
        query, key = (
            split_heads(project(projection, windows), attention.num_attention_heads)
            for projection in (attention.q_proj, attention.k_proj)
        )
        return query, key, attention.scaling

    def relative_bias(self, layer: nn.Module) -> Tensor:
        """By the host itself."""
        return cast(Any, layer).attention.relative_position_bias()

    def logits(self, output: Any) -> Tensor:
        """The output's `logits`."""
        return output.logits


def _stages(host: nn.Module) -> Any:
    return cast(Any, host).swin.encoder.layers
