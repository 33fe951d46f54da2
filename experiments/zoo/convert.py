"""Any checkpoint as safetensors, with its config and its provenance in the metadata."""

import json
from pathlib import Path
from typing import Any

from safetensors import safe_open
from safetensors.torch import save

import tokenmixup
from experiments.checkpoint import (
    RUN_FORMAT,
    Loaded,
    file_hash,
    load_plain,
    load_weights,
    read_weights,
    recognise,
)
from experiments.config.reading import build_config, settings_of
from experiments.config.schema import RunConfig, as_plain
from experiments.data.facts import known_num_classes
from experiments.errors import CheckpointError, ConfigError
from experiments.files import write_atomically
from experiments.models.build import build_model
from experiments.zoo.manifest import Checkpoint

CONFIG, PROVENANCE = "config", "provenance"
_HEADS = ("classifier.fc.bias", "head.bias", "backbone.head.bias")
_OF_THE_MACHINE = ("output", "device")


def config_of(path: Path) -> RunConfig | None:
    """The config that a file itself carries: a checkpoint of a run, or a converted one.

    Raises:
        CheckpointError: the file cannot be read.
        ConfigError: the config in it cannot be used.
    """
    kind = recognise(path)
    plain: Any = None
    if kind == "safetensors":
        text = read_metadata(path).get(CONFIG, "null")
        try:
            plain = json.loads(text)
        except (ValueError, RecursionError):
            raise CheckpointError(f"{path}: the config in its metadata is no JSON") from None
    elif kind == "torch":
        content = load_plain(path)
        if isinstance(content, dict) and content.get("format") == RUN_FORMAT:
            plain = content.get("config")
    if not isinstance(plain, dict):
        return None
    return build_config(settings_of(plain, str(path)), str(path))


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; `config` and `provenance` are JSON."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # safetensors' own errors share no base but this
        raise CheckpointError(f"{path}: cannot read the metadata: {error}") from None


def convert(
    path: Path,
    config: RunConfig,
    output: Path,
    entry: Checkpoint | None = None,
    averaged: bool = False,
) -> Loaded:
    """Write a file's weights as safetensors, under the names of this project's models.

    Equal files give equal bytes.

    Args:
        path: of the file.
        config: of the model that the weights fit.
        output: written atomically.
        entry: what the zoo knows of the file.
        averaged: write the averaged weights that the file holds besides.

    Returns:
        What was left out.

    Raises:
        UserError: the file is not the one of the zoo, or does not fit the config's model.
    """
    if output.resolve() == path.resolve():
        raise ConfigError(f"command line: --output: {output} is the file to be converted")
    num_classes = (
        known_num_classes(config) or config.model.num_classes or _classes_in(path, averaged)
    )
    model = build_model(config, num_classes)
    loaded = load_weights(model, path, averaged=averaged)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    provenance = {
        "file": path.name,
        "kind": loaded.kind,
        "sha256": file_hash(path),
        "bytes": path.stat().st_size,
        "left_as_initialised": list(loaded.left_out),
        "not_used": list(loaded.unused),
        "averaged": averaged,
        "converted_by": f"tokenmixup {tokenmixup.__version__}",
    }
    if entry is not None:
        provenance |= {
            "zoo": entry.name,
            "link": entry.link,
            "published_top1": entry.published_top1,
        }
    plain = {key: value for key, value in as_plain(config).items() if key not in _OF_THE_MACHINE}
    plain["data"] = {key: value for key, value in plain["data"].items() if key != "root"}
    metadata = {
        "format": "pt",
        CONFIG: json.dumps(plain, sort_keys=True),
        PROVENANCE: json.dumps(provenance, sort_keys=True),
    }
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(output, _in_one_order(save(state, metadata=metadata)))
    except OSError as error:
        raise ConfigError(f"{output}: cannot write: {error.strerror}") from None
    return loaded


def _classes_in(path: Path, averaged: bool) -> int:
    """The number of classes of a file's classifier, for a config that does not tell it."""
    state = read_weights(path, averaged).state_dict
    for name in _HEADS:
        if name in state:
            return len(state[name])
    raise ConfigError(f"{path}: tells no number of classes; set model.num_classes in the config")


def _in_one_order(content: bytes) -> bytes:
    """The same safetensors file with sorted metadata, which the library writes in any order."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
