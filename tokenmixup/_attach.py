"""`attach`: TokenMixup on an unmodified host, once the settings fit it.

Dimensions: P prefix tokens, C classes.
"""

from collections.abc import Iterable

from torch import nn

from tokenmixup._hooks import has_hooks
from tokenmixup.config import HorizontalConfig, VerticalConfig
from tokenmixup.hosts import (
    HostAdapter,
    UnsupportedHostError,
    adapter_of_layers,
    find_adapter,
    layer_names,
    unwrapped,
)
from tokenmixup.hosts.base import parallel_class
from tokenmixup.model import TokenMixupModel
from tokenmixup.rules import Rules


def attach(
    model: nn.Module,
    *,
    horizontal: HorizontalConfig | None = None,
    vertical: VerticalConfig | None = None,
    num_classes: int | None = None,
    rules: Rules | None = None,
    layers: Iterable[nn.Module] | None = None,
    num_prefix_tokens: int | None = None,
    class_token: bool | None = None,
) -> TokenMixupModel:
    """Put TokenMixup on a host model without editing it.

    The host keeps its class, its forward pass, its state-dict keys and its fused attention. With
    neither ``horizontal`` nor ``vertical`` the result is the plain host behind the same interface,
    for training loops that serve all variants. It is in training or evaluation mode as the host is.

    A host of any other class is taken where its ``layers`` are given.

    Args:
        model: the host, of one of the supported families.
        horizontal: settings of Horizontal TokenMixup.
        vertical: settings of Vertical TokenMixup.
        num_classes: C, where the host does not know it.
        rules: for research, the decisions that differ from the paper's; one instance per model.
        layers: the encoder layers of a host of no supported family, anywhere in it, in the order of
            its forward pass: ``torch.nn.TransformerEncoderLayer`` with ``batch_first=True``.
        num_prefix_tokens: with ``layers``, P, the tokens before the patch tokens.
        class_token: with ``layers``, whether token 0 is a class token.

    Raises:
        UnsupportedHostError: (a ValueError) the host is of no supported family.
        ValueError: the settings do not fit the host, TokenMixup is attached to it already, or it is
            sharded or wrapped (``fully_shard``, ``DistributedDataParallel``, ...).
    """
    if not isinstance(model, nn.Module):
        raise ValueError(
            "model must be a model (torch.nn.Module), such as "
            f"timm.create_model({model if isinstance(model, str) else 'vit_base_patch16_224'!r}); "
            f"got {model!r}"
        )
    if isinstance(model, TokenMixupModel) or has_hooks(model):
        raise ValueError(
            "TokenMixup is attached to this model already: give all layers in one call of attach, "
            "or detach() first (a copied backbone keeps its hooks, which do nothing: copy the "
            "TokenMixupModel and detach() that)"
        )
    for name, value, kind in (
        ("horizontal", horizontal, HorizontalConfig),
        ("vertical", vertical, VerticalConfig),
        ("rules", rules, Rules),
    ):
        if value is not None and not isinstance(value, kind):
            raise ValueError(f"{name} must be a {kind.__name__} or None, got {value!r}")
    _refuse_parallel(model)
    host = unwrapped(model)
    if layers is not None:
        adapter = adapter_of_layers(host, layers, num_prefix_tokens, class_token)
    elif num_prefix_tokens is not None or class_token is not None:
        raise ValueError("num_prefix_tokens and class_token describe `layers`, which are not given")
    else:
        adapter = find_adapter(host)
    _check_layers(horizontal, vertical, adapter, host)
    if vertical is not None:
        _check_vertical(vertical, adapter, host)
    classes = _known_classes(num_classes, adapter.layout(host).num_classes, horizontal)
    return TokenMixupModel(model, adapter, horizontal, vertical, classes, rules or Rules())


def _refuse_parallel(model: nn.Module) -> None:
    for name, part in (*model.named_modules(), *model.named_parameters()):
        found = parallel_class(part)
        if found is not None:
            raise ValueError(
                f"{f'`{name}` of the model' if name else 'the model'} is a {found} already: attach "
                "first, then shard or wrap what attach returns (docs/trainers.md)"
            )


def _check_layers(
    horizontal: HorizontalConfig | None,
    vertical: VerticalConfig | None,
    adapter: HostAdapter,
    host: nn.Module,
) -> None:
    layers = adapter.layers(host)
    depth = len(layers)
    if depth == 0:
        raise UnsupportedHostError("the model has no encoder layers, where TokenMixup acts")
    for config in (horizontal, vertical):
        if config is not None and config.layers[-1] >= depth:
            raise ValueError(
                f"{type(config).__name__}.layers names layer {config.layers[-1]}, but the model "
                f"has {depth} layers, 0 to {depth - 1}{_stages(adapter, host)}"
            )
    if (horizontal is not None or vertical is not None) and len(set(layers)) < depth:
        raise UnsupportedHostError(
            f"the model's {depth} layers are {len(set(layers))} modules: some run more than once "
            "per pass, and TokenMixup cannot tell such layers apart"
        )


def _stages(adapter: HostAdapter, host: nn.Module) -> str:
    """Which layers are in which stage, for an error; nothing for a host without stages."""
    layouts = adapter.layouts(host)
    if layouts[0].stage == layouts[-1].stage:
        return ""
    firsts = [i for i, one in enumerate(layouts) if not i or one.stage != layouts[i - 1].stage]
    names = layer_names(host)
    return f" (its stages begin with {'; '.join(f'{i}: {names[i]}' for i in firsts)})"


def _check_vertical(vertical: VerticalConfig, adapter: HostAdapter, host: nn.Module) -> None:
    layers, layouts = adapter.layers(host), adapter.layouts(host)
    for index in vertical.layers:
        reason = adapter.no_memory(layers[index])
        if reason is not None:
            raise UnsupportedHostError(
                f"VTM is not possible at layer {index} of {adapter.family}: {reason}"
            )
        if layouts[index].stage != layouts[index - 1].stage:
            raise ValueError(
                f"VerticalConfig.layers names layer {index}, the first of its stage: tokens of "
                "earlier stages have another width, and it has none to attend to"
                f"{_stages(adapter, host)}"
            )
        patches = layouts[index].num_patch_tokens
        if patches is not None and vertical.kappa > patches:
            raise ValueError(
                f"VerticalConfig.kappa is {vertical.kappa}, but a layer has only {patches} patch "
                "tokens"
            )


def _known_classes(
    given: int | None, of_host: int | None, horizontal: HorizontalConfig | None
) -> int | None:
    if given is not None and of_host is not None and given != of_host:
        raise ValueError(f"num_classes is {given}, but the model's classifier has {of_host}")
    classes = of_host if given is None else given
    if classes is None and horizontal is not None and horizontal.scorenet is not None:
        raise ValueError(
            "the model has no classifier to read num_classes from, and ScoreNet needs it: "
            "pass num_classes to attach"
        )
    return classes
