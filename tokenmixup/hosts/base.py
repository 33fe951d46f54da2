"""What `attach` needs to know about a family of hosts: the interface of adapters.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, D width, H heads, d head width,
K keys, C classes, M remembered tokens.
"""

import inspect
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, NamedTuple, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmixup._precision import without_autocast, without_autocast_cache
from tokenmixup.functional import query_key_saliency

Args = tuple[Any, ...]
Kwargs = dict[str, Any]


PARALLEL = (
    "torch.distributed.fsdp.FSDPModule",
    "torch.distributed.fsdp.fully_sharded_data_parallel.FullyShardedDataParallel",
    "torch.distributed.tensor.DTensor",
    "torch.nn.parallel.distributed.DistributedDataParallel",
)
"""Full names of what divides a model, or its batches, among processes."""


class UnsupportedHostError(ValueError):
    """The model is of no supported family, or its internals are not what the adapter relies on."""


@dataclass(frozen=True)
class TokenLayout:
    """How a host lays out its tokens, at one of its layers.

    Attributes:
        width: D.
        num_prefix_tokens: P.
        class_token: whether token 0 is a class token.
        num_patch_tokens: T, or None where it depends on the image.
        num_classes: C, or None where the host has no classifier.
        stage: tokens keep their width and their places from layer to layer of one stage.
        grid: rows and columns of the patch tokens, where the adapter knows them; for people.
    """

    width: int
    num_prefix_tokens: int
    class_token: bool
    num_patch_tokens: int | None
    num_classes: int | None
    stage: int = 0
    grid: tuple[int, int] | None = None


class Remembered(NamedTuple):
    """What a VTM layer attends to besides its own tokens, lowest layer first.

    Attributes:
        tokens: (B, M, D), as they entered the layers that remembered them, before any norm.
        positions_by_layer: the places (B, K) of each layer's among the T patch tokens, int64.
    """

    tokens: Tensor
    positions_by_layer: tuple[Tensor, ...]

    @property
    def positions(self) -> Tensor:
        """(B, M) int64, the place of each token among the T patch tokens."""
        return torch.cat(self.positions_by_layer, dim=1)


class HostAdapter(ABC):
    """Stateless knowledge about one family of hosts.

    An adapter never runs or copies the host's forward pass: hooks on the layers and on their
    attention do the work, with what these methods return. The default methods fit hosts whose
    layers are called ``layer(tokens, ...)`` and whose attention is called
    ``attention(tokens, ...)`` and returns the tokens.
    """

    family: ClassVar[str]
    """Name for people."""
    host_classes: ClassVar[tuple[str, ...]]
    """Full names of the classes that the adapter takes, subclasses included.

    Names, so that no host's library is imported for them.
    """
    refused: ClassVar[Mapping[str, str]] = MappingProxyType({})
    """Attributes that must not be read through the attached model, and what to tell who does."""

    fused_evaluation: ClassVar[bool] = False
    """Whether layers have a fused path in evaluation that any hook on them switches off."""

    @abstractmethod
    def check(self, host: nn.Module) -> None:
        """Raise `UnsupportedHostError` if the internals are not what the other methods rely on."""

    @abstractmethod
    def layers(self, host: nn.Module) -> Sequence[nn.Module]:
        """The encoder layers, in order of the forward pass."""

    @abstractmethod
    def layout(self, host: nn.Module) -> TokenLayout:
        """Layout of the tokens at the input of every layer, of a host with stages the first."""

    def layouts(self, host: nn.Module) -> Sequence[TokenLayout]:
        """Layout at the input of each layer; by default the same for all."""
        return [self.layout(host)] * len(self.layers(host))

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
            Queries (B, H, N, d), or (B, H, 1, d) with ``class_row``, keys (B, H, N, d), or
            (B, 1, N, d) where all heads share them, scale. A layer that attends within W windows,
            (B, W, H, N, d) each. There may be other keys than tokens: see :meth:`token_saliency`.
        """

    def projection(self, layer: nn.Module) -> nn.Module | None:
        """The module whose output, in the layer's own pass, holds the queries and keys.

        A layer that only remembers reads them there instead of computing them again. The module
        must run once per pass, on the normalised tokens, and give in training what it gives in
        evaluation, as a plain linear layer does. By default there is none.
        """
        return None

    def projected_query_key(
        self, layer: nn.Module, projected: Tensor, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """What :meth:`query_key` returns, from the output of :meth:`projection`.

        Args:
            layer: one of :meth:`layers`.
            projected: the rows (B, N, ...) of the layer's own tokens.
            class_row: only the class token's query is needed.
        """
        raise NotImplementedError(f"{type(self).__name__} has a projection, and no way to read it")

    def score_bias(
        self, layer: nn.Module, args: Args, kwargs: Kwargs, class_row: bool
    ) -> Tensor | None:
        """What the layer adds to its scores, e.g. a relative-position bias; by default nothing.

        Returns:
            (B or 1, H, N, N), or (B or 1, H, 1, N) with ``class_row``; with windows
            (B or 1, W or 1, H, N, N).
        """
        return None

    def token_saliency(
        self, layer: nn.Module, saliency: Tensor, args: Args, kwargs: Kwargs
    ) -> Tensor:
        """Saliency (B, T) of the layer's patch tokens, from that of its keys.

        Args:
            layer: one of :meth:`layers`.
            saliency: what each key but those of prefix tokens receives, mean over queries and
                heads, (B, K), with windows (B, W, K). By default the keys are the tokens.
            args: positional arguments of the layer's call.
            kwargs: keyword arguments of the layer's call.
        """
        return saliency

    def raster(self, host: nn.Module, index: int) -> Tensor | None:
        """Which patch token stands at each place of a layer's grid, row by row, (T,) int64.

        Nothing but pictures asks. None, the default, where the n-th stands at the n-th place.
        """
        return None

    def no_memory(self, layer: nn.Module) -> str | None:
        """Why the layer cannot attend to remembered tokens; by default nothing stands in its way.

        Others of its stage may attend to those that it remembers.
        """
        return None

    def tokens(self, args: Args, kwargs: Kwargs) -> Tensor:
        """The tokens among the arguments of a layer's call."""
        if not args:
            self._cannot("a layer is called with keywords alone", "tokens` and `with_tokens")
        return args[0]

    def with_tokens(self, tokens: Tensor, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """The arguments of a layer's call with other tokens."""
        return (tokens, *args[1:]), kwargs

    def with_memory(
        self, layer: nn.Module, remembered: Remembered, args: Args, kwargs: Kwargs
    ) -> tuple[Args, Kwargs]:
        """Arguments with which the layer's attention attends to remembered tokens as well.

        By default the remembered tokens, normalised, follow the layer's own tokens, and
        :meth:`own_tokens` drops their rows of the output.
        """
        if not args:
            self._cannot("an attention is called with keywords alone", "with_memory")
        memory = self.normalise(layer, remembered.tokens)
        return (torch.cat((args[0], memory), dim=1), *args[1:]), kwargs

    def own_tokens(
        self, layer: nn.Module, remembered: Remembered, output: Any, args: Args, kwargs: Kwargs
    ) -> Any:
        """The attention's output for the layer's own tokens alone.

        Args:
            layer: the VTM layer.
            remembered: what :meth:`with_memory` got.
            output: what the attention returned.
            args: positional arguments of the attention's call, as :meth:`with_memory` left them.
            kwargs: keyword arguments of the attention's call, likewise.
        """
        if not isinstance(output, Tensor):
            self._cannot(f"an attention returns a {type(output).__name__}", "own_tokens")
        return output[:, : -remembered.tokens.shape[1]]

    def logits(self, output: Any) -> Tensor:
        """Class logits (B, C) in what the host returns."""
        if not isinstance(output, Tensor):
            self._cannot(f"the host returns a {type(output).__name__}", "logits")
        return output

    def no_weight_decay(self, host: nn.Module) -> set[str]:
        """Names of the host's parameters that an optimiser should not decay."""
        return set()

    def _cannot(self, found: str, methods: str) -> NoReturn:
        raise UnsupportedHostError(
            f"{found}: the adapter {type(self).__name__} needs a `{methods}`"
        )


@torch.no_grad()
def layer_saliency(
    adapter: HostAdapter,
    layout: TokenLayout,
    layer: nn.Module,
    query_key: tuple[Tensor, Tensor, float],
    args: Args,
    kwargs: Kwargs,
) -> Tensor:
    """Saliency (B, T) of a layer's tokens, from its queries and keys.

    Args:
        adapter: of the host.
        layout: of the host's tokens.
        layer: one of the host's layers.
        query_key: what the adapter's ``query_key`` or ``projected_query_key`` returns.
        args: positional arguments of the layer's call.
        kwargs: keyword arguments of the layer's call.
    """
    query, key, scale = query_key
    with without_autocast_cache(query.device.type):
        of_keys = query_key_saliency(
            query,
            key,
            scale,
            layout.num_prefix_tokens,
            class_token=layout.class_token,
            bias=adapter.score_bias(layer, args, kwargs, layout.class_token),
        )
        return adapter.token_saliency(layer, of_keys, args, kwargs)


@torch.no_grad()
def input_saliency(
    adapter: HostAdapter,
    layout: TokenLayout,
    layer: nn.Module,
    tokens: Tensor,
    args: Args,
    kwargs: Kwargs,
) -> Tensor:
    """Saliency (B, T) of the tokens (B, N, D) that enter a layer, before the layer has run.

    Arguments are those of :func:`layer_saliency`.
    """
    with without_autocast_cache(tokens.device.type):
        query_key = adapter.query_key(layer, tokens, args, kwargs, layout.class_token)
    return layer_saliency(adapter, layout, layer, query_key, args, kwargs)


def class_name(kind: type) -> str:
    """Full name of a class, as in ``host_classes``."""
    return f"{kind.__module__}.{kind.__qualname__}"


def parallel_class(part: object) -> str | None:
    """Which of ``PARALLEL`` a module or a parameter is, None for all others."""
    names = (class_name(base) for base in type(part).__mro__)
    return next((name for name in names if name in PARALLEL), None)


def require_part(
    part: nn.Module,
    where: str,
    classes: tuple[str, ...],
    attributes: tuple[str, ...] = (),
    arguments: tuple[str, ...] = (),
) -> None:
    """Check a part of the host that an adapter relies on.

    Args:
        part: the module.
        where: its name in the host.
        classes: full names of the allowed classes, without their subclasses.
        attributes: the attributes that the adapter reads.
        arguments: all allowed arguments of its forward pass; empty to allow any.

    Raises:
        UnsupportedHostError: the part is different.
    """
    found = class_name(type(part))
    if found not in classes:
        raise UnsupportedHostError(
            f"TokenMixup relies on `{where}` being a {' or a '.join(classes)}, but it is a "
            f"{found}: {what_to_do_about(found)}"
        )
    parameters = inspect.signature(type(part).forward).parameters.values()
    names = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD][1:]
    unknown = [name for name in names if name not in arguments] if arguments else []
    missing = [name for name in attributes if not hasattr(part, name)]
    for names, complaint in ((missing, "lacks"), (unknown, "is called with")):
        if names:
            raise UnsupportedHostError(
                f"`{where}` ({found}) {complaint} {', '.join(names)} in the installed version of "
                "its library, which TokenMixup does not know"
            )


def what_to_do_about(found: str) -> str:
    """Advice on a class that stands where TokenMixup needs another one."""
    if found.startswith("peft."):
        return (
            "put peft's adapters on other modules, or merge them (merge_and_unload()) before "
            "TokenMixup is attached"
        )
    if found in PARALLEL:
        return "shard (or wrap) whole layers and then the whole model, no parts of layers"
    if found.endswith(".CheckpointWrapper"):
        return "checkpoint whole layers, or their MLPs, but not attentions alone"
    return "this variant of the host (or this version of its library) is not supported"


def refuse_masks(args: Args, kwargs: Kwargs, **positions: int) -> None:
    """Raise ValueError if a call has an attention mask that is not None or False.

    Args:
        args: positional arguments of the call.
        kwargs: keyword arguments of the call.
        **positions: where each mask stands among the positional arguments, by its name.
    """
    for name, position in positions.items():
        value = argument(position, name, args, kwargs)
        if value is not None and value is not False:
            raise ValueError(
                f"the host calls its layers with `{name}`, but TokenMixup's saliency and memory "
                "are those of attention without a mask: leave it out in training"
            )


def argument(position: int, name: str, args: Args, kwargs: Kwargs) -> Any:
    """An argument of a call, however it was passed; None where it was left out."""
    return args[position] if len(args) > position else kwargs.get(name)


def with_argument(
    position: int, name: str, value: Any, args: Args, kwargs: Kwargs
) -> tuple[Args, Kwargs]:
    """The arguments of a call with one replaced, by position or by name as before."""
    if len(args) > position:
        return (*args[:position], value, *args[position + 1 :]), kwargs
    return args, {**kwargs, name: value}


def linear_outputs(classifier: nn.Module) -> int | None:
    """C of a host's classifier if that is a linear layer, or ends with one, else None.

    Whatever stands in the place of a linear layer (adapters, copies that peft trains and saves,
    quantised layers) has its attributes.
    """
    if isinstance(classifier, nn.Sequential) and len(classifier):
        return linear_outputs(classifier[-1])
    return getattr(classifier, "out_features", None)


def forward_hooks(module: nn.Module) -> tuple[Callable[..., Any], ...]:
    """The hooks before and after a module's own forward pass."""
    return (*module._forward_pre_hooks.values(), *module._forward_hooks.values())


def plain_linear(projection: nn.Module) -> bool:
    """Whether a projection is no more than the product with its weight, and its bias.

    Adapters, parametrisations, pruning and quantisation replace the layer, or its weight by
    something else than a parameter; others replace its ``forward``, or hook to it.
    """
    return (
        type(projection) is nn.Linear
        and type(projection.weight) is nn.Parameter
        and "forward" not in projection.__dict__
        and all(getattr(hook, "only_reads", False) for hook in forward_hooks(projection))
    )


def project(projection: nn.Module, tokens: Tensor, first_alone: bool = False) -> Tensor:
    """What saliency reads at a projection of tokens (B, N, D): (B, N, ...).

    The module is called, whatever it is, so that adapters, parametrisations and quantisation take
    part, but in evaluation mode. Saliency is free of dropout, that of adapters as that of the
    attention map; the layer's own random numbers stay those of the plain host; and a
    parametrisation with a state (spectral norm) does not move it.

    Args:
        projection: a module of the host.
        tokens: its input.
        first_alone: return token 0 alone, (B, 1, ...).
    """
    if plain_linear(projection):
        return projection(tokens[:, :1] if first_alone else tokens)
    training = [part for part in projection.modules() if part.training]
    try:
        for part in training:
            part.training = False
        projected = projection(tokens)
    finally:
        for part in training:
            part.training = True
    return projected[:, :1] if first_alone else projected


def split_heads(tokens: Tensor, heads: int) -> Tensor:
    """(B, N, H * d) -> (B, H, N, d)."""
    return tokens.unflatten(-1, (heads, -1)).transpose(1, 2)


def joint_projection(
    tokens: Tensor, weight: Tensor, bias: Tensor | None, part: int, heads: int
) -> Tensor:
    """Queries (part 0), keys (1) or values (2) from a joint weight (3 H d, D) -> (B, H, N, d).

    Only the rows of the projection that are needed are computed.
    """
    width = weight.shape[0] // 3
    rows = slice(part * width, (part + 1) * width)
    return split_heads(F.linear(tokens, weight[rows], None if bias is None else bias[rows]), heads)


def joint_query_key(
    tokens: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    heads: int,
    class_row: bool,
    as_projected: bool = False,
) -> tuple[Tensor, Tensor]:
    """Queries and keys (B, H, N, d) from a joint projection.

    With ``class_row`` the queries are those of token 0 alone, (B, H, 1, d), in the type of the
    weight, autocast or not: casts would be most of their cost.

    A score is then q (W x + b) = (q W) x + q b, where q b is the same for all keys of a query and
    changes no softmax. With ``as_projected``, where scores are such products and nothing else is
    done to queries and keys, the query is q W, (B, H, 1, D), and the tokens themselves are the keys
    of all heads, (B, 1, N, D): no key is projected. Where torch is allowed to multiply in TF32 it
    rounds both, by less than autocast rounds queries and keys.
    """
    if class_row:
        with without_autocast(tokens.device.type):
            width = weight.shape[0] // 3
            own = None if bias is None else bias[:width]
            query = F.linear(tokens[:, 0].to(weight.dtype), weight[:width], own)
            query = query.unflatten(-1, (heads, -1))  # (B, H, d)
            if as_projected:
                of_keys = weight.unflatten(0, (3, heads, -1))[1]  # (H, d, D)
                query = torch.bmm(query.transpose(0, 1), of_keys).transpose(0, 1)
                return query.unsqueeze(2), tokens.to(weight.dtype).unsqueeze(1)
        return query.unsqueeze(2), joint_projection(tokens, weight, bias, 1, heads)
    rows = slice(2 * weight.shape[0] // 3)
    both = F.linear(tokens, weight[rows], None if bias is None else bias[rows])
    query, key = both.chunk(2, dim=-1)
    return split_heads(query, heads), split_heads(key, heads)


def module_query_key(
    tokens: Tensor,
    projection: nn.Module,
    heads: int,
    class_row: bool,
    bias: Tensor | None = None,
    as_projected: bool = False,
) -> tuple[Tensor, Tensor]:
    """As :func:`joint_query_key`, from the module itself; see :func:`project`.

    Args:
        tokens: (B, N, D).
        projection: of queries, keys and values, usually `torch.nn.Linear`.
        heads: H.
        class_row: only the class token's query is needed.
        bias: what the attention adds to a projection that has no bias of its own, (3 H d,).
        as_projected: whether the scores are products of what is projected, with no more done to it.
    """
    if plain_linear(projection):
        linear = cast(nn.Linear, projection)
        own = linear.bias if bias is None else bias
        return joint_query_key(tokens, linear.weight, own, heads, class_row, as_projected)
    projected = project(projection, tokens)
    return split_query_key(projected if bias is None else projected + bias, heads, class_row)


def split_query_key(projected: Tensor, heads: int, class_row: bool) -> tuple[Tensor, Tensor]:
    """As :func:`joint_query_key`, from the output (B, N, 3 H d) of the joint projection."""
    width = projected.shape[-1] // 3
    queries = projected[:, :1] if class_row else projected
    return (
        split_heads(queries[..., :width], heads),
        split_heads(projected[..., width : 2 * width], heads),
    )
