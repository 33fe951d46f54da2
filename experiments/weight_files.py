"""Weights in a file of any kind, recognised by its content; nothing in it can run.

Read are tensors and plain types alone, and the `argparse.Namespace` that timm's checkpoints hold.
"""

import argparse
import os
import pickle
import re
import tarfile
import warnings
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from experiments.errors import CheckpointError
from experiments.files import open_regular
from experiments.pickle_check import refuse_harmful
from experiments.vit_npz import is_vit_npz, refuse_inflated_npz, vit_state_dict
from experiments.zoo_lock import refuse_changed

RUN_FORMAT = "tokenmixup.run"
NPZ = "npz of a ViT"
_LARGEST_INFLATION = 4  # tied weights stand under several names
_SAFETENSORS_HEADER_LIMIT = 100_000_000  # the format's own


@dataclass(frozen=True)
class WeightFile:
    """What a file holds: a state dict, and which kind of file it was."""

    state_dict: dict[str, Tensor]
    kind: str


def read_weights(path: str | Path) -> WeightFile:
    """Read the state dict of a checkpoint or of a file of weights.

    Raises:
        CheckpointError: what the file is instead, in one line.
    """
    path = Path(path)
    kind = recognise(path)
    refuse_changed(path)
    if kind == "safetensors":
        return WeightFile(_read_safetensors(path), kind)
    if kind == "npz":
        return WeightFile(_read_npz(path), NPZ)
    content = load_plain(path)
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a state dict")
    if content.get("format") == RUN_FORMAT:
        return WeightFile(_tensors(path, content.get("model")), "checkpoint of a run")
    if isinstance(content.get("state_dict"), dict):
        return WeightFile(_tensors(path, content["state_dict"]), "checkpoint of timm")
    return WeightFile(_tensors(path, content), "state dict")


def recognise(path: Path) -> str:
    """Tell `torch` (zip or older), `safetensors` and `npz` apart by a file's content.

    Raises:
        CheckpointError: it is missing, or nothing that holds weights.
    """
    try:
        with open_regular(path) as file:
            size = os.fstat(file.fileno()).st_size
            head = file.read(512)
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise CheckpointError(f"{path}: cannot read the checkpoint: {reason}") from None
    if not head:
        raise CheckpointError(f"{path}: is empty, not a checkpoint")
    if head.lstrip()[:1] == b"<":
        raise CheckpointError(
            f"{path}: is a web page, not a checkpoint: the download brought a message of the site "
            "instead of the file; fetch it again"
        )
    if head.startswith(b"PK"):
        return _recognise_zip(path)
    header = int.from_bytes(head[:8], "little")
    if head[8:9] == b"{" and header <= _SAFETENSORS_HEADER_LIMIT:
        if header + 8 > size:
            raise CheckpointError(f"{path}: is cut off: its header is longer than the file")
        return "safetensors"
    if head[:1] == b"\x80" and not tarfile.is_tarfile(path):  # torch's format before the zip
        return "torch"
    raise CheckpointError(
        f"{path}: is no checkpoint; allowed: files written by torch.save, and safetensors"
    )


def load_plain(path: Path) -> Any:
    """Load what `torch.save` wrote, as long as it is tensors and plain types.

    Raises:
        CheckpointError: it is damaged, asks for anything else, or for more than the file holds.
    """
    refuse_harmful(path)
    content = _unpickled(path)
    _refuse_inflated(path, content)
    return content


def _unpickled(path: Path) -> Any:
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            # torch warns of pickles that it did not write, and then refuses them
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(f"{path}: {_refusal(str(error))}") from None
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        TypeError,
        KeyError,
        IndexError,
        AttributeError,
        OverflowError,
        MemoryError,
        AssertionError,
    ) as error:
        # what torch raises on a damaged file depends on the byte that is wrong
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: is damaged or cut off: {reason}") from None


def _recognise_zip(path: Path) -> str:
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError):
        raise CheckpointError(f"{path}: is damaged or cut off: the end of it is missing") from None
    for member in members:
        name = member.filename
        if name.startswith(("/", "\\")) or ".." in re.split(r"[/\\]", name):
            raise CheckpointError(f"{path}: holds {name!r:.80}, a name outside of the archive")
    if len({member.filename.lower() for member in members}) < len(members):
        raise CheckpointError(f"{path}: is damaged or cut off: it holds a name twice")
    if members and all(member.filename.endswith(".npy") for member in members):
        return "npz"
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        raise CheckpointError(f"{path}: is a compressed archive; torch.save never compresses")
    if sum(member.file_size for member in members) > path.stat().st_size:
        raise CheckpointError(f"{path}: is damaged or cut off: its parts overlap")
    if any(member.filename.endswith("/data.pkl") for member in members):
        return "torch"
    raise CheckpointError(f"{path}: is a zip archive without weights")


def _read_safetensors(path: Path) -> dict[str, Tensor]:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path, device="cpu")
    except (
        SafetensorError,
        OSError,
        ValueError,
        RuntimeError,
        KeyError,
        TypeError,
        OverflowError,
        MemoryError,
    ) as error:
        raise CheckpointError(f"{path}: is damaged or cut off: {error}") from None


def _read_npz(path: Path) -> dict[str, Tensor]:
    try:
        refuse_inflated_npz(path)
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
    except (
        OSError,
        EOFError,
        ValueError,
        KeyError,
        RuntimeError,
        NotImplementedError,
        MemoryError,
        zlib.error,
        zipfile.BadZipFile,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: is damaged or cut off: {reason}") from None
    if not is_vit_npz(arrays):
        raise CheckpointError(
            f"{path}: is an npz of other arrays than a ViT's: {', '.join(sorted(arrays)[:4])}"
        )
    try:
        return vit_state_dict(arrays)
    except (ValueError, RuntimeError, IndexError) as error:  # dimensions that are no ViT's
        raise CheckpointError(f"{path}: {error}") from None


def _tensors(path: Path, content: Any) -> dict[str, Tensor]:
    if not isinstance(content, dict) or not content:
        raise CheckpointError(f"{path}: holds no weights")
    for name, value in content.items():
        if not isinstance(name, str) or not isinstance(value, Tensor):
            raise CheckpointError(
                f"{path}: is no state dict: {_name(name)} is a {type(value).__name__}, not a tensor"
            )
    return content


def _name(key: Any) -> str:
    """A key for a message; the text of one that is no text may have no end."""
    return repr(key[:60]) if isinstance(key, str) else f"a key of the type {type(key).__name__}"


def _refuse_inflated(path: Path, content: Any) -> None:
    """Raise a CheckpointError where tensors claim more than a file of this size can hold.

    A tensor of one number may call itself a million times a million, by a stride of zero, and a
    thousand names may stand for one tensor: what copies them would fill the memory.
    """
    left = _LARGEST_INFLATION * (path.stat().st_size + (1 << 20))
    seen, waiting = {id(content)}, [content]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Tensor):
            own = value.numel() * value.element_size()
            left -= own
            if left < 0 or own > value.untyped_storage().nbytes():
                raise CheckpointError(
                    f"{path}: is refused or damaged: its tensors claim more than the file holds"
                )
            continue
        inner: list[Any] = []
        if isinstance(value, dict):
            inner = list(value.values())
        elif isinstance(value, list | tuple):
            inner = list(value)
        elif isinstance(value, argparse.Namespace):
            inner = list(vars(value).values())
        for each in inner:
            if isinstance(each, Tensor) or id(each) not in seen:
                seen.add(id(each))
                waiting.append(each)


def _refusal(message: str) -> str:
    """torch's long explanation of what it does not unpickle, in short."""
    asked = re.search(r"(?:Unsupported global:|unsupported) GLOBAL (\S+)", message)
    if asked:
        reason = f"it asks for {asked[1]}, and a checkpoint may hold tensors and plain types alone"
    else:
        detail = message.partition("WeightsUnpickler error: ")[2].strip().splitlines()
        reason = detail[0] if detail else "it is no pickle that torch wrote"
    return f"is refused or damaged: {reason}"
