"""What `attach` needs to know of a family of host models: the protocol each adapter satisfies.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, D width, H heads, C classes,
M remembered tokens.
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


class UnsupportedHostError(ValueError):
    """The model is of no supported family, or its internals are not what the adapter relies on."""


@dataclass(frozen=True)
class TokenLayout:
    """How a host lays out its tokens.

    Attributes:
        width: D.
        num_prefix_tokens: P.
        class_token: whether token 0 is a class token.
        num_patch_tokens: T, or None where it depends on the image.
        num_classes: C, or None where the host has no classifier.
    """

    width: int
    num_prefix_tokens: int
    class_token: bool
    num_patch_tokens: int | None
    num_classes: int | None


class HostAdapter(ABC):
    """Stateless knowledge of one family of hosts.

    An adapter never runs or copies the host's forward pass: hooks on the layers and on their
    attention do the work, with what these methods tell. Methods with a body fit hosts whose layers
    are called ``layer(tokens, ...)`` and whose attention is called ``attention(tokens, ...)`` and
    returns the tokens.
    """

    family: ClassVar[str]
    """Name for people."""
    host_classes: ClassVar[tuple[str, ...]]
    """Full names of the classes that the adapter takes, subclasses included."""

    def takes(self, host: nn.Module) -> bool:
        """Whether the host is an instance of one of ``host_classes``.

        Told by name, so that no host's library is imported for it.
        """
        return any(class_name(base) in self.host_classes for base in type(host).__mro__)

    @abstractmethod
    def check(self, host: nn.Module) -> None:
        """Raise `UnsupportedHostError` where the internals are not what the methods rely on."""

    @abstractmethod
    def layers(self, host: nn.Module) -> Sequence[nn.Module]:
        """The encoder layers, in order of the forward pass."""

    @abstractmethod
    def layout(self, host: nn.Module) -> TokenLayout:
        """Layout of the tokens at the input of every layer."""

    @abstractmethod
    def attention(self, layer: nn.Module) -> nn.Module:
        """The layer's self-attention module."""

    @abstractmethod
    def normalise(self, layer: nn.Module, tokens: Tensor) -> Tensor:
        """The norm that the layer applies before its attention, (B, N, D) -> (B, N, D)."""

    @abstractmethod
    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """Queries, keys and the scale of their scores for the layer's raw input tokens.

        Args:
            layer: one of :meth:`layers`.
            tokens: its input (B, N, D), before the norm.
            args: positional arguments of the layer's call.
            kwargs: keyword arguments of the layer's call.
            class_row: only the class token's query is needed.

        Returns:
            Queries (B, H, N, d), or (B, H, 1, d) with ``class_row``, keys (B, H, N, d), scale.
        """

    def tokens(self, args: Args, kwargs: Kwargs) -> Tensor:
        """The tokens among the arguments of a layer's call."""
        return args[0]

    def with_tokens(self, tokens: Tensor, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments of a layer's call with other tokens."""
        return (tokens, *args[1:]), kwargs

    def with_memory(self, memory: Tensor, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """Arguments of the attention's call that make it attend to memory (B, M, D) as well.

        By default the normalised memory follows the layer's own tokens; :meth:`own_tokens` then
        drops its rows of the output.
        """
        return (torch.cat((args[0], memory), dim=1), *args[1:]), kwargs

    def own_tokens(self, output: Any, num_remembered: int) -> Any:
        """The attention's output without the rows of the M remembered tokens."""
        return output[:, :-num_remembered]

    def logits(self, output: Any) -> Tensor:
        """Class logits (B, C) in what the host returns."""
        return output

    def no_weight_decay(self, host: nn.Module) -> set[str]:
        """Names of the host's parameters that an optimiser should not decay."""
        return set()


def class_name(kind: type) -> str:
    """Full name of a class, as in ``host_classes``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def require_type(module: nn.Module, allowed: str, where: str) -> None:
    """Check the exact class of a part of the host, named in full."""
    found = class_name(type(module))
    if found != allowed:
        raise UnsupportedHostError(
            f"TokenMixup relies on {where} being a {allowed}, but it is a {found}: this variant "
            "of the host (or this version of its library) is not supported"
        )


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, H * d) -> (B, H, N, d)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def joint_query_key(
    tokens: Tensor, qkv: nn.Linear, heads: int, class_row: bool
) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, N, d) from a joint projection (queries, keys, values in thirds).

    Only the rows of the projection that are needed are computed; with ``class_row`` the queries
    are those of token 0 alone, (B, H, 1, d).
    """
    width = qkv.out_features // 3
    weight, bias = qkv.weight, qkv.bias
    query = F.linear(
        tokens[:, :1] if class_row else tokens,
        weight[:width],
        None if bias is None else bias[:width],
    )
    keys = slice(width, 2 * width)
    key = F.linear(tokens, weight[keys], None if bias is None else bias[keys])
    return split_heads(query, heads), split_heads(key, heads)
