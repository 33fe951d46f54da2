"""Checkpoints of runs, and weights from files of any kind; nothing in a file is executed."""

import argparse
import hashlib
import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from experiments.config.schema import dotted_keys
from experiments.errors import CheckpointError, ConfigError
from experiments.files import atomic_file, exclusive, write_atomically
from experiments.provenance import now
from experiments.released import (
    NPZ,
    Loaded,
    google_vit,
    is_released,
    load_named,
    load_released,
)
from experiments.strict_yaml import read_yaml, yaml_text

__all__ = [
    "LOCK_FILE",
    "RUN_FORMAT",
    "Loaded",
    "copied",
    "load_checkpoint",
    "load_plain",
    "load_released",
    "load_weights",
    "read_weights",
    "recognise",
    "refuse_changed_config",
    "save_checkpoint",
    "save_final_weights",
]

RUN_FORMAT = "tokenmixup.run"
_VERSION = 3
_ZOO = Path(__file__).parent.parent / "weights" / "zoo.yaml"
_LAYOUTS = {"state_dict": "checkpoint of timm", "model": "checkpoint in DeiT's layout"}
_AVERAGED = ("state_dict_ema", "model_ema")  # timm's name and DeiT's
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # bytes; the format's own

# These keys change where and how fast a run computes, how it is evaluated, what it reports and
# which faults it tolerates, but never the weights of a run without faults.
_FREE_KEYS = (
    *("output", "data.root", "data.workers", "data.download", "data.max_bad_images", "logging."),
    *("checkpoint.", "on_nonfinite", "skip_limit", "timeout_minutes"),
    *("data.eval_batch_size", "eval_precision"),
)


# Checkpoints of runs


def save_checkpoint(path: Path, content: dict[str, Any]) -> None:
    """Write a run's state atomically: tensors and plain types only.

    The file is torch's zip archive, in which each part has a checksum.
    """
    with atomic_file(path) as file:
        try:
            torch.save({"format": RUN_FORMAT, "version": _VERSION, **content}, file)
        except RuntimeError as error:
            # if a write fails, torch's closing of its archive hides the reason
            if isinstance(error.__context__, OSError):
                raise error.__context__ from None
            raise


def copied(content: Any, earlier: Any = None) -> Any:
    """A state dict, or anything with tensors in it, in memory of its own on the CPU.

    An earlier copy is written over where its tensors fit: new memory takes many times as long.
    """
    if isinstance(content, Tensor):
        kind = (content.shape, content.dtype)
        if isinstance(earlier, Tensor) and (earlier.shape, earlier.dtype) == kind:
            return earlier.copy_(content)
        return content.detach().to("cpu", copy=True)
    if isinstance(content, dict):
        before = earlier if isinstance(earlier, dict) else {}
        return {key: copied(value, before.get(key)) for key, value in content.items()}
    if isinstance(content, list | tuple):
        return type(content)(map(copied, content))
    return content


def load_checkpoint(path: Path) -> dict[str, Any]:
    """Read what `save_checkpoint` wrote.

    Raises:
        CheckpointError: the file is missing, damaged, or no checkpoint of a run.
    """
    if recognise(path) != "torch":
        raise CheckpointError(f"{path}: is no checkpoint of a run")
    content = load_plain(path)
    if not isinstance(content, dict) or content.get("format") != RUN_FORMAT:
        raise CheckpointError(f"{path}: is no checkpoint of a run")
    if content.get("version") != _VERSION:
        raise CheckpointError(
            f"{path}: is a checkpoint of version {content.get('version')!r:.80}; this program "
            f"reads version {_VERSION}"
        )
    return content


def refuse_changed_config(
    path: Path, saved: dict[str, Any], now: dict[str, Any], allowed: Collection[str] = ()
) -> list[str]:
    """Compare the config of a run to be resumed with the requested one.

    Args:
        path: of the checkpoint, for the message.
        saved: the config in the checkpoint.
        now: the requested config.
        allowed: keys that may differ.

    Returns:
        The allowed keys that differ, each with its two values.

    Raises:
        ConfigError: other keys differ, which the message lists; an allowed key does not differ; or
            a key differs that must not.
    """
    before, after = deciding_keys(saved), deciding_keys(now)
    changed = {
        key: f"{key}: {before.get(key)!r} there, {after.get(key)!r} now"
        for key in sorted(before.keys() | after.keys())
        if before.get(key) != after.get(key)
    }
    refused = [text for key, text in changed.items() if key not in allowed]
    if "optimizer.name" in changed:
        raise ConfigError(
            f"{path} cannot be continued with {changed['optimizer.name']}: its state is of that "
            "optimiser; set optimizer.name back, or begin another run (--output) from its "
            f"weights: --model.weights {path}"
        )
    if refused:
        raise ConfigError(
            f"{path} is of another experiment, so it cannot be continued: {'; '.join(refused)}; "
            "choose another --output, set these keys back, or name them: --allow-changed "
            f"{','.join(changed)}"
        )
    for key in allowed:
        if key not in changed:
            raise ConfigError(f"command line: --allow-changed: {key} is as it was in {path}")
    return list(changed.values())


def deciding_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of a config, as `section.key`, that determine the weights of a run."""
    flat = dotted_keys(config)
    return {key: value for key, value in flat.items() if not key.startswith(_FREE_KEYS)}


# Weights


def save_final_weights(path: Path, model: nn.Module) -> None:
    """Write the weights alone as safetensors; equal weights give equal bytes."""
    from safetensors.torch import save

    state = {name: value.detach().cpu().contiguous() for name, value in model.state_dict().items()}
    write_atomically(path, save(state, metadata={"format": "pt"}))


def load_weights(
    model: nn.Module, path: str | Path, new_head: bool = False, averaged: bool = False
) -> Loaded:
    """Load the weights of a file into a plain host or a TokenMixupModel, strictly.

    The file may be a checkpoint or the final weights of a run, a released checkpoint, a checkpoint
    of timm or DeiT, Google's npz of a ViT, or the state dict of a plain host. `load_named` says
    what may be left out.

    Args:
        model: changed in place, or left as it was if the file does not fit.
        path: of the file.
        new_head: leave the classifier and the ScoreNets out, for a data set of other classes.
        averaged: load the averaged weights that the file holds besides.

    Raises:
        CheckpointError: the file cannot be read, or does not fit; the message names the keys.
    """
    found = read_weights(path, averaged)
    try:
        if is_released(found.state_dict):
            loaded = load_released(model, found.state_dict, new_head)
        else:
            loaded = load_named(model, found.state_dict, found.kind, new_head)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None
    return replace(loaded, averaged=found.averaged)


@dataclass(frozen=True)
class WeightFile:
    """What a file holds: a state dict, and which kind of file it was."""

    state_dict: dict[str, Tensor]
    kind: str
    averaged: str = ""
    """The name of averaged weights that the file holds besides."""


def read_weights(path: str | Path, averaged: bool = False) -> WeightFile:
    """Read the state dict of a checkpoint or of a file of weights.

    Args:
        path: of the file.
        averaged: read the averaged weights of a training instead of its last ones.

    Raises:
        CheckpointError: what the file is instead, in one line.
    """
    path = Path(path)
    kind = recognise(path)
    check_hash(path)
    if averaged:
        content: Any = load_plain(path) if kind == "torch" else None
        key = _averaged_in(content)
        if not key:
            names = " or ".join(_AVERAGED)
            raise CheckpointError(f"{path}: holds no averaged weights, which would be {names}")
        return WeightFile(_tensors(path, content[key]), f"averaged weights, {key}")
    if kind == "safetensors":
        from safetensors.torch import load_file

        with _reading(path):
            return WeightFile(load_file(path, device="cpu"), kind)
    if kind == "npz":
        with _reading(path), np.load(path, allow_pickle=False) as file:
            _check_zip(path)
            arrays = {name: file[name] for name in file.files}
        try:
            return WeightFile(google_vit(arrays), NPZ)
        except (ValueError, RuntimeError, IndexError) as error:  # dimensions that are no ViT's
            raise CheckpointError(f"{path}: {error}") from None
    content = load_plain(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    if content.get("format") == RUN_FORMAT:
        return WeightFile(_tensors(path, content.get("model")), "checkpoint of a run")
    for key, layout in _LAYOUTS.items():
        if isinstance(content.get(key), dict):
            return WeightFile(_tensors(path, content[key]), layout, _averaged_in(content))
    return WeightFile(_tensors(path, content), "state dict")


def _averaged_in(content: Any) -> str:
    """The key of averaged weights in a checkpoint, "" without any."""
    found = content if isinstance(content, dict) else {}
    return next((key for key in _AVERAGED if isinstance(found.get(key), dict)), "")


def recognise(path: Path) -> str:
    """Tell `torch` (zip or older), `safetensors` and `npz` apart by a file's content.

    Raises:
        CheckpointError: it is missing, or nothing that holds weights.
    """
    if os.path.exists(path) and not os.path.isfile(path):  # opening a pipe waits for its writer
        raise CheckpointError(f"{path}: is a folder, a pipe or a device, not a file")
    try:
        with path.open("rb") as file:
            head = file.read(512)
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(
            f"{path}: cannot read the checkpoint: {reason}{_how_to_fetch(path)}"
        ) from None
    if not head:
        raise CheckpointError(f"{path}: is empty, not a checkpoint")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        raise CheckpointError(
            f"{path}: is a web page, not a checkpoint: the download brought a message of the site "
            "instead of the file; fetch it again"
        )
    if head.startswith(b"PK"):
        with _reading(path), zipfile.ZipFile(path) as archive:
            names = archive.namelist()
        if names and all(name.endswith(".npy") for name in names):
            return "npz"
        if any(name.endswith("/data.pkl") for name in names):
            return "torch"
        raise CheckpointError(f"{path}: is a zip archive without weights")
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= _SAFETENSORS_HEADER_LIMIT:
        return "safetensors"
    if head[:1] == b"\x80":  # torch's format before the zip
        return "torch"
    raise CheckpointError(
        f"{path}: is no checkpoint; allowed: files written by torch.save, and safetensors"
    )


def _how_to_fetch(path: Path) -> str:
    """For the message about a missing file: the command that fetches it, if the zoo lists it."""
    for name, entry in read_yaml(_ZOO)["checkpoints"].items():
        if entry["file"] == path.name and not path.exists():
            return f"; fetch it: {zoo_command('download', name, path.parent)}"
    return ""


def zoo_command(verb: str, name: str, folder: Path) -> str:
    """The command line that does something with a checkpoint of the zoo in a folder."""
    option = "" if folder == Path("weights") else f" --weights {folder}"
    return f"python -m experiments.zoo {verb} {name}{option}"


def load_plain(path: Path) -> Any:
    """Load what `torch.save` wrote: tensors, plain types and `argparse.Namespace` only.

    Raises:
        CheckpointError: it is damaged, or asks for anything else.
    """
    with (
        _reading(path),
        torch.serialization.safe_globals([argparse.Namespace]),
        warnings.catch_warnings(),
    ):
        _check_zip(path)
        # torch warns of pickles that it did not write, and then refuses them
        warnings.simplefilter("ignore", UserWarning)
        return torch.load(path, map_location="cpu", weights_only=True)


def _check_zip(path: Path) -> None:
    """Compare the parts of a zip archive with their checksums, which torch does not."""
    with path.open("rb") as file:
        if file.read(4) != b"PK\3\4":  # torch, too, looks at nothing else to tell its formats apart
            return
    with zipfile.ZipFile(path) as archive:
        broken = archive.testzip()
    if broken is not None:
        raise CheckpointError(
            f"{path}: is damaged or cut off: its content does not match its checksum ({broken})"
        )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Turn whatever a library raises about a file's content into one CheckpointError."""
    try:
        yield
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: is refused or damaged: {_refusal(str(error))}") from None
    except Exception as error:  # which one depends on the byte that is wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: is damaged or cut off: {reason[:200]}") from None


def _refusal(message: str) -> str:
    """A short form of torch's long explanation of what it does not unpickle."""
    asked = re.search(r"(?:Unsupported global:|unsupported) GLOBAL (\S+)", message)
    if asked:
        return f"it asks for {asked[1]}, and a checkpoint may hold tensors and plain types alone"
    detail = message.partition("WeightsUnpickler error: ")[2].strip().splitlines()
    return detail[0][:200] if detail else "it is no pickle that torch wrote"


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds no weights")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: is no state dict: {name!r:.60} is a {type(value).__name__}, not a tensor"
            )
    return content


# Hashes of weights: recorded when a file first arrives, checked at every use

LOCK_FILE = "zoo.lock.yaml"
_KNOWN = {"sha256", "size", "source", "recorded"}
_HEAD = """\
# Hashes of the weights in this folder, recorded when each file first arrived, because the zoo's
# manifest does not list them. Every later use checks them. To accept another file in place of one
# named here, delete its entry.
"""


def file_hash(path: Path) -> str:
    """SHA-256 of a file's content.

    Raises:
        CheckpointError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the file: {error.strerror}") from None


def known_files(folder: Path) -> dict[str, dict[str, Any]]:
    """The recorded hashes of a folder of weights: file name -> `_KNOWN` of it.

    Raises:
        CheckpointError: the lock file is damaged. It is never repaired, because it tells a replaced
            file from the right one.
    """
    path = folder / LOCK_FILE
    try:
        found = (read_yaml(path) or {}) if path.exists() else {}
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(found, dict) or not all(
        isinstance(entry, dict) and entry.keys() == _KNOWN for entry in found.values()
    ):
        raise CheckpointError(
            f"{path}: is damaged; allowed: file names with sha256, size, source and recorded"
        )
    return found


def record_hash(path: Path, source: str) -> str:
    """Hash a file, write the hash into the lock file beside it, and return it."""
    entry = {
        "sha256": file_hash(path),
        "size": path.stat().st_size,
        "source": source,
        "recorded": now(),
    }
    lock = path.parent / LOCK_FILE
    with exclusive(lock):
        entries = {**known_files(path.parent), path.name: entry}
        text = yaml_text(dict(sorted(entries.items())))
        write_atomically(lock, (_HEAD + text).encode())
    return str(entry["sha256"])


def check_hash(path: Path, name: str = "", listed: str | None = None) -> str | None:
    """Compare a file with its known hash, and return that hash, or None if none is known.

    Args:
        path: of the file.
        name: the file name of which the hash is recorded, if it is not the path's.
        listed: the hash in the zoo's manifest, which takes precedence over a recorded one.

    Raises:
        CheckpointError: the file has another hash.
    """
    known, where = listed, "in the zoo's manifest"
    if known is None:
        known = known_files(path.parent).get(name or path.name, {}).get("sha256")
        where = f"recorded in {path.parent / LOCK_FILE}"
    if known is not None and (found := file_hash(path)) != known:
        raise CheckpointError(
            f"{path}: is not the file that it should be: its SHA-256 is {found}, expected "
            f"{known} ({where})"
        )
    return known
