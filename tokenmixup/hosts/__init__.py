"""Adapters: one small file a family of hosts, chosen by the host's class."""

from torch import nn

from tokenmixup.hosts.base import (
    HostAdapter,
    Remembered,
    TokenLayout,
    UnsupportedHostError,
    class_name,
)
from tokenmixup.hosts.cct import CCTAdapter
from tokenmixup.hosts.timm_beit import TimmBeit
from tokenmixup.hosts.timm_eva import TimmEva
from tokenmixup.hosts.timm_vision_transformer import TimmVisionTransformer
from tokenmixup.hosts.torchvision_vision_transformer import TorchvisionVisionTransformer
from tokenmixup.hosts.transformers_vit import TransformersDeiT, TransformersDinov2, TransformersViT
from tokenmixup.hosts.unsupported import REASONS

__all__ = [
    "HostAdapter",
    "Remembered",
    "TokenLayout",
    "UnsupportedHostError",
    "find_adapter",
    "register_adapter",
]

_adapters: list[HostAdapter] = [
    TimmVisionTransformer(),
    TimmEva(),
    TimmBeit(),
    TorchvisionVisionTransformer(),
    TransformersViT(),
    TransformersDeiT(),
    TransformersDinov2(),
    CCTAdapter(),
]


def register_adapter(adapter: HostAdapter) -> None:
    """Make `tokenmixup.attach` take a further family of hosts.

    It goes before those for base classes of its own. Registering a class of adapters anew, as when
    a notebook's cell is run again, replaces it.

    Raises:
        ValueError: another adapter for one of its classes is registered already.
    """
    others = [known for known in _adapters if class_name(type(known)) != class_name(type(adapter))]
    for known in others:
        taken = set(known.host_classes) & set(adapter.host_classes)
        if taken:
            raise ValueError(
                f"an adapter for {', '.join(sorted(taken))} is registered already: {known.family}"
            )
    _adapters[:] = [*others, adapter]


def find_adapter(host: nn.Module) -> HostAdapter:
    """The adapter for a host, after it has checked the host's internals.

    Raises:
        UnsupportedHostError: no adapter takes the host's class, or its internals do not fit.
    """
    # the nearest base class decides, so that a subclass may have an adapter of its own
    for base in type(host).__mro__:
        for adapter in _adapters:
            if class_name(base) in adapter.host_classes:
                _check(adapter, host)
                return adapter
    supported = "; ".join(
        f"{known.family} ({', '.join(known.host_classes)})" for known in _adapters
    )
    raise UnsupportedHostError(
        f"TokenMixup does not {_verdict(host)}. Supported: {supported}. A model with one sequence "
        "of tokens through all its layers can be added with tokenmixup.hosts.register_adapter, or "
        "built with HorizontalTokenMixupLayer and VerticalTokenMixupLayer"
    )


def _check(adapter: HostAdapter, host: nn.Module) -> None:
    try:
        adapter.check(host)
    except AttributeError as error:
        raise UnsupportedHostError(
            f"TokenMixup knows {adapter.family}, but not the installed version of its library, or "
            f"this variant of it: {error}"
        ) from error


def _verdict(host: nn.Module) -> str:
    name = class_name(type(host))
    for base in type(host).__mro__:
        if class_name(base) in REASONS:
            return f"work with the model class {name}: {REASONS[class_name(base)]}"
    return f"know the model class {name}"
