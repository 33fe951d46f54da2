"""Build the model of a config: timm's host with TokenMixup attached."""

from typing import Any

import timm
from timm.layers.mlp import Mlp
from torch import nn

from experiments.config import ModelConfig, RunConfig, nearest
from experiments.errors import ConfigError
from experiments.seeding import derive_seed, seeded
from tokenmixup import TokenMixupModel, attach
from tokenmixup.rules import Rules


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
            return attach(
                host,
                horizontal=config.horizontal,
                vertical=config.vertical,
                num_classes=num_classes,
                rules=rules,
            )
        except ValueError as error:
            raise ConfigError(_with_keys(str(error), config.model.name)) from None


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
        near = nearest(name, timm.list_models())
        raise ConfigError(f"model.name: got {name!r}, which timm does not know; {near}")
    rates = ("drop_rate", "attn_drop_rate", "drop_path_rate")
    arguments: dict[str, Any] = {
        rate: getattr(config, rate) for rate in rates if getattr(config, rate) is not None
    }
    arguments |= config.kwargs
    try:
        host = timm.create_model(
            name,
            pretrained=False,
            num_classes=num_classes,
            img_size=config.image_size,
            **arguments,
        )
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        if "'img_size'" in str(error):
            raise ConfigError(
                f"model.name: got {name!r}, which takes no image size; allowed: the families of "
                "transformers that tokenmixup.attach supports"
            ) from None
        further = "".join(f", {key} {value!r}" for key, value in arguments.items())
        raise ConfigError(
            f"model: {name!r} cannot be built with image_size {config.image_size}{further}: {error}"
        ) from None
    if config.mlp_drop_rate is not None:
        _set_mlp_dropout(host, config.mlp_drop_rate)
    return host


def _set_mlp_dropout(host: nn.Module, rate: float) -> None:
    mlps = [module for module in host.modules() if isinstance(module, Mlp)]
    if not mlps:
        raise ConfigError(f"model.mlp_drop_rate: got {rate}; allowed: null, this model has no MLP")
    for mlp in mlps:
        mlp.drop1.p = mlp.drop2.p = rate
