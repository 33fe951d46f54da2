"""Checkpoints of a run, and weights put into a model, strictly."""

import math
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from experiments.config import dotted_keys
from experiments.errors import CheckpointError, ConfigError
from experiments.files import write_atomically
from experiments.released import is_classifier, is_released, load_released
from experiments.sealed import refuse_damaged, save_sealed
from experiments.weight_files import NPZ, RUN_FORMAT, load_plain, read_weights, recognise
from tokenmixup import TokenMixupModel

__all__ = [
    "Loaded",
    "load_checkpoint",
    "load_released",
    "load_weights",
    "refuse_changed_config",
    "save_checkpoint",
    "save_final_weights",
]

_VERSION = 2

# keys that change where and how fast a run computes, how it is evaluated, what it reports and which
# faults it bears, never the weights of a run without faults
_FREE_KEYS = (
    *("output", "data.root", "data.workers", "data.download", "data.max_bad_images", "logging."),
    *("checkpoint.", "on_nonfinite", "skip_limit", "timeout_minutes"),
    *("data.eval_batch_size", "eval_precision"),
)

# what the saved state of the optimiser is made for
_FIXED_KEYS = ("optimizer.name",)

_HOST, _SCORENETS = "backbone.", "scorenets."


@dataclass(frozen=True)
class Loaded:
    """What `load_weights` did."""

    kind: str
    """What the file was."""
    left_out: tuple[str, ...]
    """Names of the model that the file has nothing for, left as initialised."""
    unused: tuple[str, ...]
    """Names in the file that the model has no use for."""
    resized: bool = False
    """Whether the position embedding was resized to another image size."""


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a run's state, atomically and with a checksum: tensors and plain types alone."""
    save_sealed(path, {"format": RUN_FORMAT, "version": _VERSION, **content})


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        CheckpointError: the file is damaged, be it by one bit, or is no checkpoint of a run.
    """
    recognise(path)
    refuse_damaged(path)
    content = load_plain(path)
    if not isinstance(content, dict) or content.get("format") != RUN_FORMAT:
        raise CheckpointError(f"{path}: is no checkpoint of a run")
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: is a checkpoint of version {content.get('version')}; this program reads "
            f"version {_VERSION}"
        )
    return content


def refuse_changed_config(
    path: Path, saved: dict[str, Any], now: dict[str, Any], allowed: Collection[str] = ()
) -> list[str]:
    """Compare the config of a run to be resumed with the one that is asked for.

    Args:
        path: of the checkpoint, for the message.
        saved: the config in the checkpoint.
        now: the config that is asked for.
        allowed: keys that may differ.

    Returns:
        The allowed keys that do differ, each with its two values.

    Raises:
        ConfigError: other keys differ, which the message lists; or an allowed one does not, or
            never may.
    """
    before, after = deciding_keys(saved), deciding_keys(now)
    changed = {
        key: f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }
    refused = [text for key, text in changed.items() if key not in allowed]
    for key in _FIXED_KEYS:
        if key in changed:
            raise ConfigError(
                f"{path} cannot be continued with {changed[key]}: its state is of that optimiser; "
                f"set {key} back, or begin another run (--output) from its weights: "
                f"--model.weights {path}"
            )
    if refused:
        names = ",".join(changed)
        raise ConfigError(
            f"{path} is of another experiment, so it cannot be continued: {'; '.join(refused)}; "
            f"choose another --output, set these keys back, or name them: --allow-changed {names}"
        )
    for key in allowed:
        if key not in changed:
            raise ConfigError(f"command line: --allow-changed: {key} is as it was in {path}")
    return list(changed.values())


def deciding_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config, as `section.key`, that decide which weights a run comes to."""
    flat = dotted_keys(config)
    return {key: value for key, value in flat.items() if not key.startswith(_FREE_KEYS)}


def save_final_weights(path: Path, model: nn.Module) -> None:
    """Write the weights alone as safetensors; equal weights give equal bytes."""
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, save(state, metadata={"format": "pt"}))


def load_weights(model: nn.Module, path: str | Path, new_head: bool = False) -> Loaded:
    """Put the weights of a file into a plain host or a TokenMixupModel.

    The file may be a checkpoint or the final weights of a run, a released checkpoint, Google's npz
    of a ViT, or the state dict of a plain host. Weights of a plain host leave a model's ScoreNets
    as they are, a released ScoreNet is not used by a model that has none, and a ViT's position
    embedding is resized to another image size; anything else that is missing or has no place is an
    error.

    Args:
        model: is changed in place, or left as it was where the file does not fit.
        path: of the file.
        new_head: leave the classifier and the ScoreNets out, for a data set of other classes.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; the message names the keys.
    """
    found = read_weights(path)
    weights = _as_attached(found.state_dict, found.state_dict)
    own = model.state_dict()
    target = _as_attached(own, own)
    if is_released(found.state_dict):
        try:
            report = load_released(model, found.state_dict, new_head)
        except ValueError as error:
            raise CheckpointError(f"{path}: {error}") from None
        return Loaded("released checkpoint", report.left_out, report.unused)
    if new_head:
        weights = {name: value for name, value in weights.items() if not is_classifier(name)}
    has_scorenets = any(name.startswith(_SCORENETS) for name in weights)
    left_out = [
        name
        for name in target
        if (new_head and is_classifier(name)) or (name.startswith(_SCORENETS) and not has_scorenets)
    ]
    resized = _resize_position_embedding(model, weights, found.kind == NPZ)
    problems = []
    for title, names in (
        ("without a place in the model", weights.keys() - target.keys()),
        ("missing in the file", target.keys() - weights.keys() - set(left_out)),
    ):
        if names:
            problems.append(f"{title}: {_listed(sorted(names))}")
    problems += [
        f"{name} is {tuple(weights[name].shape)} in the file and {tuple(value.shape)} in the model"
        for name, value in target.items()
        if name in weights and weights[name].shape != value.shape
    ][:3]
    if problems:
        raise CheckpointError(f"{path}: does not fit the model; {'; '.join(problems)}")
    with torch.no_grad():
        for name, value in weights.items():
            target[name].copy_(value)
    return Loaded(found.kind, tuple(left_out), (), resized)


def _resize_position_embedding(model: nn.Module, weights: dict[str, Tensor], npz: bool) -> bool:
    """Resize a ViT's position embedding to the grid of the model's images, where it differs.

    In timm's ways: bilinear for Google's npz, as Google did, else bicubic with antialiasing.
    """
    from timm.layers import resample_abs_pos_embed
    from timm.models import VisionTransformer

    host = model.backbone if isinstance(model, TokenMixupModel) else model
    name = _HOST + "pos_embed"
    if not isinstance(host, VisionTransformer) or host.pos_embed is None or name not in weights:
        return False
    value, wanted = weights[name], host.pos_embed.shape
    if value.dim() != 3 or value.shape[1] == wanted[1] or value.shape[2] != wanted[2]:
        return False
    prefix = 0 if host.no_embed_class else host.num_prefix_tokens
    if math.isqrt(value.shape[1] - prefix) ** 2 != value.shape[1] - prefix:
        return False
    grid = list(host.patch_embed.grid_size)
    weights[name] = resample_abs_pos_embed(
        value,
        grid,
        num_prefix_tokens=prefix,
        interpolation="bilinear" if npz else "bicubic",
        antialias=not npz,
    )
    return True


def _as_attached(state: dict[str, Tensor], names: dict[str, Tensor]) -> dict[str, Tensor]:
    """The same tensors under the names that they have in a TokenMixupModel."""
    if any(name.startswith((_HOST, _SCORENETS)) for name in names):
        return dict(state)
    return {_HOST + name: value for name, value in state.items()}


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"
