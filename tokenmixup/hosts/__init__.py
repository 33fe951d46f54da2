"""Adapters: one small file per family of hosts, chosen by the host's class."""

from typing import Any, cast

from torch import nn

from tokenmixup.hosts.base import (
    HostAdapter,
    Remembered,
    TokenLayout,
    UnsupportedHostError,
    class_name,
)
from tokenmixup.hosts.cct import CCTAdapter
from tokenmixup.hosts.encoder_layers import LAYER, adapter_of_layers
from tokenmixup.hosts.timm_beit import TimmBeit
from tokenmixup.hosts.timm_eva import TimmEva
from tokenmixup.hosts.timm_hiera import TimmHiera
from tokenmixup.hosts.timm_mvit import TimmMViT
from tokenmixup.hosts.timm_pvt import TimmPVT
from tokenmixup.hosts.timm_swin import TimmSwin, TimmSwinV2
from tokenmixup.hosts.timm_vit import TimmViT
from tokenmixup.hosts.torchvision_swin import TorchvisionSwin
from tokenmixup.hosts.torchvision_vit import TorchvisionViT
from tokenmixup.hosts.transformers_swin import TransformersSwin
from tokenmixup.hosts.transformers_vit import TransformersDeiT, TransformersDinov2, TransformersViT

__all__ = [
    "HostAdapter",
    "Remembered",
    "TokenLayout",
    "UnsupportedHostError",
    "adapter_of_layers",
    "find_adapter",
    "layer_names",
    "register_adapter",
    "unwrapped",
]

PEFT = ("peft.peft_model.PeftModel", "peft.mixed_model.PeftMixedModel")

_adapters: list[HostAdapter] = [
    TimmViT(),
    TimmEva(),
    TimmBeit(),
    TimmSwin(),
    TimmSwinV2(),
    TimmPVT(),
    TimmHiera(),
    TimmMViT(),
    TorchvisionViT(),
    TorchvisionSwin(),
    TransformersViT(),
    TransformersDeiT(),
    TransformersDinov2(),
    TransformersSwin(),
    CCTAdapter(),
]


def register_adapter(adapter: HostAdapter) -> None:
    """Make `tokenmixup.attach` take a further family of hosts.

    The nearest base class of a host decides, so a subclass may have an adapter of its own.
    Registering a class of adapters again, as when a notebook's cell runs again, replaces it.

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


def unwrapped(model: nn.Module) -> nn.Module:
    """The host in what `tokenmixup.attach` was given: peft's models call the one they hold."""
    if any(class_name(base) in PEFT for base in type(model).__mro__):
        return cast(Any, model).get_base_model()
    return model


def find_adapter(host: nn.Module) -> HostAdapter:
    """The adapter for a host, after it has checked the host's internals.

    Raises:
        UnsupportedHostError: no adapter takes the host's class, or its internals do not fit.
    """
    for base in type(host).__mro__:
        for adapter in _adapters:
            if class_name(base) in adapter.host_classes:
                _check(adapter, host)
                return adapter
    raise UnsupportedHostError(
        f"{class_name(type(host))} is no supported host: {_advice(host)}. A host needs "
        "layers with one attention map each, over tokens of which the n-th of each image comes "
        "from the same place. "
        f"Supported: {_families()}"
    )


def layer_names(host: nn.Module) -> list[str]:
    """The layers as configs count them: name in the host, tokens and width of each.

    Args:
        host: of a supported family.

    Raises:
        UnsupportedHostError: as :func:`find_adapter`.
    """
    adapter, names = find_adapter(host), {part: name for name, part in host.named_modules()}
    listed = []
    for layer, layout in zip(adapter.layers(host), adapter.layouts(host), strict=True):
        tokens = layout.num_patch_tokens
        grid = "tokens" if tokens is None else f"{tokens} tokens"
        if layout.grid is not None:
            grid = "{} x {} tokens".format(*layout.grid)
        listed.append(f"{names[layer]}, {grid} of width {layout.width}")
    return listed


def _check(adapter: HostAdapter, host: nn.Module) -> None:
    try:
        adapter.check(host)
    except AttributeError as error:
        raise UnsupportedHostError(
            f"TokenMixup knows {adapter.family}, but not the installed version of its library, or "
            f"this variant of it: {error}"
        ) from error


def _families() -> str:
    """The families of hosts, each library's name once."""
    libraries: dict[str, list[str]] = {}
    for adapter in _adapters:
        library, _, kind = adapter.family.partition(" ")
        libraries.setdefault(library, []).append(kind)
    return "; ".join(
        f"{library} {', '.join(kinds)}".strip() for library, kinds in libraries.items()
    )


def _advice(host: nn.Module) -> str:
    """What to do with a host of an unknown class."""
    if isinstance(host, nn.DataParallel):
        return "use DistributedDataParallel, also on one machine, around what attach returns"
    inner = [module for module in host.children() if _is_supported(module)]
    if inner:
        return (
            f"attach TokenMixup to the {class_name(type(inner[0]))} inside it, then wrap what "
            "attach returns"
        )
    if any(class_name(type(module)) == LAYER for module in host.modules()):
        return (
            "name its encoder layers: attach(model, layers=model.encoder.layers, "
            "num_prefix_tokens=..., class_token=...), or wherever they are"
        )
    return (
        "register an adapter with tokenmixup.hosts.register_adapter (docs/adding_a_host.md), or "
        "build the encoder with HorizontalTokenMixupLayer and VerticalTokenMixupLayer"
    )


def families_of(library: str) -> list[str]:
    """The families of hosts that come from a library, such as ``timm``."""
    prefix = f"{library}."
    return [a.family for a in _adapters if any(c.startswith(prefix) for c in a.host_classes)]


def _is_supported(module: nn.Module) -> bool:
    taken = {name for adapter in _adapters for name in adapter.host_classes}
    return any(class_name(base) in taken for base in type(module).__mro__)
