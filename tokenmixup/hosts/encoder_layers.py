"""Hosts of any class, whose layers are `torch.nn.TransformerEncoderLayer` anywhere in them.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, D width.
"""

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, cast

from torch import Tensor, nn

from tokenmixup.hosts.base import (
    Args,
    HostAdapter,
    Kwargs,
    TokenLayout,
    UnsupportedHostError,
    argument,
    require_part,
    with_argument,
)
from tokenmixup.hosts.multihead import MultiheadHost

LAYER = "torch.nn.modules.transformer.TransformerEncoderLayer"


class EncoderLayers(MultiheadHost):
    """A host whose layers are given, by their names in it.

    Args:
        names: of the layers, in the order of the forward pass.
        num_prefix_tokens: P.
        class_token: whether token 0 is a class token.
    """

    family = "torch.nn.TransformerEncoderLayer"
    host_classes = ()  # `tokenmixup.attach` takes it where layers are given
    fused_evaluation = True
    masks: ClassVar[dict[str, int]] = {"src_mask": 1, "src_key_padding_mask": 2, "is_causal": 3}

    def __init__(self, names: Sequence[str], num_prefix_tokens: int, class_token: bool) -> None:
        self.names = tuple(names)
        self.num_prefix_tokens = num_prefix_tokens
        self.class_token = class_token

    def check(self, host: nn.Module) -> None:
        """torch's own layers, of one width, batch first."""
        layers = self.layers(host)
        for name, layer in zip(self.names, layers, strict=True):
            attributes = ("self_attn", "norm1", "norm_first")
            require_part(layer, name, (LAYER,), attributes, ("src", *self.masks))
            if not cast(Any, layer).self_attn.batch_first:
                raise UnsupportedHostError(
                    f"`{name}` takes tokens as (N, B, D): build torch.nn.TransformerEncoderLayer "
                    "with batch_first=True, and give it tokens as (B, N, D)"
                )
            self.check_attention(layer, f"{name}.self_attn")
        widths = [self.attention(layer).embed_dim for layer in layers]
        if len(set(widths)) > 1:
            raise UnsupportedHostError(f"the layers have different widths: {widths}")

    def layers(self, host: nn.Module) -> Sequence[nn.Module]:
        """By their names."""
        return [host.get_submodule(name) for name in self.names]

    def layout(self, host: nn.Module) -> TokenLayout:
        """Neither the number of tokens nor a classifier is known."""
        return TokenLayout(
            width=cast(Any, self.attention(self.layers(host)[0])).embed_dim,
            num_prefix_tokens=self.num_prefix_tokens,
            class_token=self.class_token,
            num_patch_tokens=None,
            num_classes=None,
        )

    def attention(self, layer: nn.Module) -> nn.Module:
        """The layer's `self_attn`."""
        return cast(Any, layer).self_attn

    def normalise(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The layer's `norm1` where the norm comes first."""
        return cast(Any, layer).norm1(tokens) if cast(Any, layer).norm_first else tokens

    def tokens(self, args: Args, kwargs: Kwargs) -> Tensor:
        """The layer's `src`."""
        return cast(Tensor, argument(0, "src", args, kwargs))

    def with_tokens(self, tokens: Tensor, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The same call with another `src`."""
        return with_argument(0, "src", tokens, args, kwargs)


def adapter_of_layers(
    host: nn.Module,
    layers: Iterable[nn.Module],
    num_prefix_tokens: int | None,
    class_token: bool | None,
) -> HostAdapter:
    """The adapter for layers of a host, after it has checked them.

    Raises:
        UnsupportedHostError: they are not the layers that it takes.
        ValueError: a layer is no part of the host, or it is not said how tokens are laid out.
    """
    if num_prefix_tokens is None or class_token is None:
        raise ValueError(
            "attach(model, layers=...) needs to know the tokens: pass num_prefix_tokens (0 without "
            "a class token or registers) and class_token (whether token 0 is a class token)"
        )
    if num_prefix_tokens < int(class_token):
        raise ValueError(
            f"num_prefix_tokens is {num_prefix_tokens} and class_token {class_token}: it must be "
            ">= 0, and a class token counts"
        )
    names = {id(module): name for name, module in host.named_modules()}
    given = list(layers)
    if not given:
        raise ValueError("layers is empty: give the model's encoder layers, in their order")
    for index, layer in enumerate(given):
        if id(layer) not in names:
            raise ValueError(
                f"layers[{index}] is no part of the model: give the layers themselves, such as "
                "layers=model.encoder.layers"
            )
    adapter = EncoderLayers([names[id(layer)] for layer in given], num_prefix_tokens, class_token)
    adapter.check(host)
    return adapter
