"""From a config to a model: timm's host with TokenMixup attached."""

import importlib

from torch import nn

from experiments.config import ModelConfig, RunConfig, nearest
from experiments.errors import ConfigError
from experiments.seeding import derive_seed, seeded
from tokenmixup import TokenMixupModel, attach
from tokenmixup.rules import Rules


def build_model(
    config: RunConfig, num_classes: int, rules: Rules | None = None
) -> TokenMixupModel:
    """Build the host with its initial weights, and attach what the config asks for.

    The baseline, too, is a TokenMixupModel, so that one training loop serves all. Initial weights
    depend on the config and the seed alone. `rules` are the paper's by default.

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
            message = str(error)
            for name in ("Horizontal", "Vertical"):
                message = message.replace(f"{name}Config.", f"{name.lower()}.")
            if message.startswith("ScoreNet's pooling"):
                message = f"horizontal.scorenet: {message}"
            elif message == str(error):
                message = f"model.name {config.model.name}: {message}"
            raise ConfigError(message) from None


def build_host(config: ModelConfig, num_classes: int) -> nn.Module:
    """The plain host, by timm; this project's CCTs are registered there."""
    import timm

    importlib.import_module("experiments.models")  # registers them
    name = config.name
    if not timm.is_model(name):
        near = nearest(name, timm.list_models())
        raise ConfigError(f"model.name: got {name!r}, which timm does not know; {near}")
    rates = {
        rate: getattr(config, rate)
        for rate in ("drop_rate", "attn_drop_rate", "drop_path_rate")
        if getattr(config, rate) is not None
    }
    try:
        host = timm.create_model(
            name,
            pretrained=False,
            num_classes=num_classes,
            img_size=config.image_size,
            **rates,
            **config.kwargs,
        )
    except (AssertionError, RuntimeError, TypeError, ValueError) as error:
        if "'img_size'" in str(error):
            raise ConfigError(
                f"model.name: got {name!r}, which takes no image size; allowed: the families of "
                "transformers that tokenmixup.attach supports"
            ) from None
        raise ConfigError(
            f"model: {name!r} cannot be built with image_size {config.image_size}"
            f"{''.join(f', {key} {value!r}' for key, value in (rates | config.kwargs).items())}: "
            f"{error}"
        ) from None
    if config.mlp_drop_rate is not None:
        _set_mlp_dropout(host, config.mlp_drop_rate)
    return host


def _set_mlp_dropout(host: nn.Module, rate: float) -> None:
    from timm.layers.mlp import Mlp

    mlps = [module for module in host.modules() if isinstance(module, Mlp)]
    if not mlps:
        raise ConfigError(f"model.mlp_drop_rate: got {rate}; allowed: null, this model has no MLP")
    for mlp in mlps:
        mlp.drop1.p = mlp.drop2.p = rate
