"""Adapters: one small file a family of hosts, chosen by the host's class."""

from torch import nn

from tokenmixup.hosts.base import HostAdapter, TokenLayout, UnsupportedHostError, class_name
from tokenmixup.hosts.timm_vision_transformer import TimmVisionTransformer

__all__ = [
    "HostAdapter",
    "TokenLayout",
    "UnsupportedHostError",
    "find_adapter",
    "register_adapter",
]

_adapters: list[HostAdapter] = [TimmVisionTransformer()]


def register_adapter(adapter: HostAdapter) -> None:
    """Make `tokenmixup.attach` take a further family of hosts.

    Raises:
        ValueError: an adapter for one of its classes is registered already.
    """
    for known in _adapters:
        taken = set(known.host_classes) & set(adapter.host_classes)
        if taken:
            raise ValueError(
                f"an adapter for {', '.join(sorted(taken))} is registered already: {known.family}"
            )
    _adapters.append(adapter)


def find_adapter(host: nn.Module) -> HostAdapter:
    """The adapter for a host, after it has checked the host's internals.

    Raises:
        UnsupportedHostError: no adapter takes the host's class, or its internals do not fit.
    """
    for adapter in _adapters:
        if adapter.takes(host):
            adapter.check(host)
            return adapter
    supported = "; ".join(
        f"{known.family} ({', '.join(known.host_classes)})" for known in _adapters
    )
    raise UnsupportedHostError(
        f"TokenMixup does not know the model class {class_name(type(host))}. Supported: "
        f"{supported}. A model with one sequence of tokens through all its layers can be added "
        "with tokenmixup.hosts.register_adapter, or built with HorizontalTokenMixupLayer and "
        "VerticalTokenMixupLayer"
    )
