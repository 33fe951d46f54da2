"""Any recognised checkpoint as safetensors, with its config and where it came from inside."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save

import tokenmixup
from experiments.checkpoint import (
    RUN_FORMAT,
    file_hash,
    load_plain,
    load_weights,
    read_weights,
    recognise,
    refuse_changed,
)
from experiments.config import RunConfig, as_plain, build_config, load_config, settings_of
from experiments.data.datasets import known_num_classes
from experiments.errors import CheckpointError, ConfigError
from experiments.files import write_atomically
from experiments.models.build import build_model
from experiments.zoo.manifest import Checkpoint

CONFIG, PROVENANCE = "config", "provenance"
_HEADS = ("classifier.fc.bias", "head.bias", "backbone.head.bias")
_PLACES = ("output", "device")  # of one machine, and without meaning on another


@dataclass(frozen=True)
class Source:
    """A file to be converted, the config whose model it fits, and what the zoo knows of it."""

    path: Path
    config: RunConfig
    checkpoint: Checkpoint | None = None


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
    return _from_plain(plain, str(path)) if isinstance(plain, dict) else None


def read_metadata(path: Path) -> dict[str, str]:
    """The metadata of a safetensors file; `config` and `provenance` are JSON."""
    try:
        with safe_open(path, framework="pt") as file:
            return dict(file.metadata() or {})
    except Exception as error:  # safetensors' own errors share no base but this
        raise CheckpointError(f"{path}: cannot read the metadata: {error}") from None


def convert(source: Source, output: Path) -> None:
    """Write a checkpoint's weights as safetensors, under the names of this project's models.

    What is written is read back and compared. The same source gives the same bytes.

    Raises:
        UserError: the file is not the one of the zoo, or does not fit the config's model.
    """
    path, config = source.path, source.config
    if output.resolve() == path.resolve():
        raise ConfigError(f"command line: --output: {output} is the file to be converted")
    refuse_changed(path)
    num_classes = known_num_classes(config) or config.model.num_classes or _classes_in(path)
    model = build_model(config, num_classes)
    loaded = load_weights(model, path)
    state = {name: value.detach().contiguous() for name, value in model.state_dict().items()}
    provenance = {
        "file": path.name,
        "kind": loaded.kind,
        "sha256": file_hash(path),
        "bytes": path.stat().st_size,
        "left_as_initialised": list(loaded.left_out),
        "converted_by": f"tokenmixup {tokenmixup.__version__}",
    }
    if source.checkpoint is not None:
        entry = source.checkpoint
        provenance |= {
            "zoo": entry.name,
            "link": entry.link,
            "published_top1": entry.published_top1,
        }
    plain = {key: value for key, value in as_plain(config).items() if key not in _PLACES}
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
    with safe_open(output, framework="pt") as file:
        same = set(file.keys()) == state.keys() and all(
            torch.equal(file.get_tensor(name), value) for name, value in state.items()
        )
    assert same, "what was written is what was read"


def find_config(path: Path, checkpoint: Checkpoint | None, given: Path | None) -> RunConfig:
    """The config of a file's model: the given one, the file's own, or the zoo's.

    Args:
        path: the file.
        checkpoint: what the zoo knows of it.
        given: a config file that goes before all.

    Raises:
        ConfigError: none of them is there.
    """
    if given is not None:
        return load_config(given)
    own = config_of(path)
    if own is not None:
        return own
    raise ConfigError(
        f"{path}: carries no config"
        + ("" if checkpoint else ", and the zoo does not know a file of this name")
        + "; name one: --config configs/NAME.yaml"
    )


def _classes_in(path: Path) -> int:
    """The number of classes of a file's classifier, where only the data set could tell it, too."""
    state = read_weights(path).state_dict
    for name in _HEADS:
        if name in state:
            return len(state[name])
    raise ConfigError(f"{path}: tells no number of classes; set model.num_classes in the config")


def _from_plain(plain: Mapping[str, Any], origin: str) -> RunConfig:
    return build_config(settings_of(plain, origin), origin)


def _in_one_order(content: bytes) -> bytes:
    """The same safetensors file with sorted metadata, which the library writes in any order."""
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of eight bytes
    return len(text).to_bytes(8, "little") + text + content[8 + length :]
