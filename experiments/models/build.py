"""Build the model of a config: timm's host with TokenMixup attached."""

import inspect
from typing import Any

import timm
import torch
from timm.layers.mlp import Mlp
from timm.models import build_model_with_cfg
from torch import nn

from experiments.config.schema import ModelConfig, RunConfig
from experiments.errors import ConfigError, nearest
from experiments.seeding import derive_seed, seeded
from tokenmixup import TokenMixupModel, attach
from tokenmixup.rules import Rules

HOST_MODULES = (
    *("vision_transformer", "deit", "beit", "eva", "swin_transformer", "swin_transformer_v2"),
    *("pvt_v2", "hiera", "mvitv2", "cct"),
)
"""Modules that register models which `tokenmixup.attach` takes: the nearest name is one of them."""

_FACTORIES = (timm.create_model, build_model_with_cfg)
_NOT_OF_THE_MODEL = frozenset(
    name for factory in _FACTORIES for name in inspect.signature(factory).parameters
) | {"features_only", "out_indices", "feature_cls", "pruned", "in_chans", "device", "dtype"}
"""Arguments with which timm's factories load files, or change what kind of model they return."""


def build_model(config: RunConfig, num_classes: int, rules: Rules | None = None) -> TokenMixupModel:
    """Build the host with its initial weights, and attach the config's HTM and VTM.

    The baseline is a TokenMixupModel, too, so that there is one training loop. Initial weights
    depend only on the config and the seed. The rules default to the paper's.

    Raises:
        ConfigError: an unknown model, an argument that it does not take, or settings of
            TokenMixup that do not fit it.
    """
    with seeded(derive_seed(config.seed, "weights")):
        host = build_host(config.model, num_classes)
        try:
            model = attach(
                host,
                horizontal=config.horizontal,
                vertical=config.vertical,
                num_classes=num_classes,
                rules=rules,
            )
        except ValueError as error:
            raise ConfigError(_with_keys(str(error), config.model.name)) from None
    _try_out(model, config.model, num_classes)
    return model


def _with_keys(message: str, model: str) -> str:
    """An error message of `attach` with the config's keys in place of the library's classes."""
    if message.startswith("ScoreNet's pooling"):
        return f"horizontal.scorenet: {message}"
    named = message
    for section in ("Horizontal", "Vertical"):
        named = named.replace(f"{section}Config.", f"{section.lower()}.")
    return named if named != message else f"model.name {model}: {message}"


def build_host(config: ModelConfig, num_classes: int) -> nn.Module:
    """Build the plain host by timm, with which this package registers its CCTs."""
    name = config.name
    if not timm.is_model(name):
        known = [each for module in HOST_MODULES for each in timm.list_models(module=module)]
        near = nearest(name, known)
        raise ConfigError(f"model.name: got {name!r}, which timm does not know; {near}")
    for key in config.kwargs:
        if key in _NOT_OF_THE_MODEL:
            raise ConfigError(
                f"model.kwargs: got {key!r}; allowed: arguments of the model's constructor; files "
                "come from model.weights alone, and this program sets the rest of what timm's "
                "create_model takes"
            )
        value = config.kwargs[key]
        if isinstance(value, str) and value.isdecimal():  # int(64 * "4") is a width, too
            raise ConfigError(
                f"model.kwargs.{key}: got the text {value!r}; allowed: numbers without quotes"
            )
    arguments = {"num_classes": num_classes, **_rates(config), **config.kwargs}
    try:
        try:
            host = timm.create_model(
                name, pretrained=False, img_size=config.image_size, **arguments
            )
        except TypeError as error:
            if "'img_size'" not in str(error):
                raise
            host = timm.create_model(name, pretrained=False, **arguments)  # images of any size
    except Exception as error:  # timm checks few of the arguments, and passes on whatever follows
        raise _unusable(config, _told(error)) from None
    if config.mlp_drop_rate is not None:
        _set_mlp_dropout(host, config.mlp_drop_rate)
    return host


def _rates(config: ModelConfig) -> dict[str, Any]:
    """The rates that the config sets."""
    rates = ("drop_rate", "attn_drop_rate", "drop_path_rate")
    return {name: rate for name in rates if (rate := getattr(config, name)) is not None}


def _try_out(model: TokenMixupModel, config: ModelConfig, num_classes: int) -> None:
    """Refuse a model that was built and cannot work, as with patches larger than the image."""
    for name, parameter in model.named_parameters():
        if not parameter.numel():
            raise _unusable(config, f"its parameter {name} would have no elements")
    images = torch.zeros(1, 3, config.image_size, config.image_size)
    was_training = model.training
    try:
        with torch.no_grad():
            logits = model.eval()(images)
    except Exception as error:  # whatever a layer raises at arguments that its constructor took
        raise _unusable(config, _told(error)) from None
    if logits.shape != (1, num_classes):
        shape = tuple(logits.shape)
        raise _unusable(
            config, f"for one image it gives {shape}, not logits of {num_classes} classes"
        )
    model.train(was_training)


def _told(error: Exception) -> str:
    """What another library's error says, in one line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def _unusable(config: ModelConfig, reason: str) -> ConfigError:
    """A model that cannot be used, with the settings that it may come from."""
    given = _rates(config) | {f"kwargs.{key}": value for key, value in config.kwargs.items()}
    settings = "".join(f", {key} {value!r:.80}" for key, value in given.items())
    return ConfigError(
        f"model: {config.name!r} cannot be built with image_size {config.image_size}{settings}: "
        f"{reason}"
    )


def _set_mlp_dropout(host: nn.Module, rate: float) -> None:
    mlps = [module for module in host.modules() if isinstance(module, Mlp)]
    if not mlps:
        raise ConfigError(f"model.mlp_drop_rate: got {rate}; allowed: null, this model has no MLP")
    for mlp in mlps:
        mlp.drop1.p = mlp.drop2.p = rate
