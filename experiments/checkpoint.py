"""Weights of any kind, read without running anything and put into a model, strictly."""

import argparse
import hashlib
import io
import math
import os
import pickle
import pickletools
import re
import tarfile
import warnings
import zipfile
import zlib
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any, BinaryIO

import numpy as np
import torch
import yaml
from torch import Tensor, nn

from experiments.config import dotted_keys
from experiments.errors import CheckpointError, ConfigError
from experiments.files import atomic_file, exclusive, open_regular, write_atomically
from experiments.released import is_classifier, is_released, load_released
from tokenmixup import TokenMixupModel

_ALLOWED = re.compile(
    r"collections OrderedDict|argparse Namespace|torch\.nn\.parameter Parameter"
    r"|torch\._utils _rebuild_(tensor|tensor_v2|parameter)"
    r"|torch (Size|device|\w+Storage|bool|bfloat16|u?int\d+|complex\d+|float\d+(_e\w+)?)"
)
_DEEPEST_VALUE = 100
_LARGEST_VALUE = 100_000  # parts: numbers, or 16 characters of text
_LARGEST_WORK = 2_000_000  # parts of all that is built from other values; a tensor has about 20
_PICKLES_OF_LEGACY = 5  # magic number, version, system, content, names of the storages
_LARGEST_PICKLE = 1 << 28  # bytes; the data of tensors lie outside
_ZIP = b"PK\3\4"
_FILL = ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD", "REDUCE", "NEWOBJ")


class _Refused(Exception):
    pass


def refuse_harmful(path: Path) -> None:
    """Look through the pickle of a file that `torch.save` wrote, in its zip format or before.

    Raises:
        CheckpointError: it is damaged, asks for what no checkpoint holds, or describes values that
            are nested or repeated beyond measure.
    """
    try:
        with path.open("rb") as file:
            if file.read(4) != _ZIP:  # torch, too, looks at nothing else to tell the formats apart
                file.seek(0)
                for _ in range(_PICKLES_OF_LEGACY):
                    _follow(file)
                return
        with zipfile.ZipFile(path) as archive:
            for member in archive.infolist():
                if member.filename.lower().endswith("/data.pkl"):
                    if member.file_size > _LARGEST_PICKLE:
                        raise _Refused("its list of tensors is larger than any model's")
                    _follow(io.BytesIO(archive.read(member)))
    except _Refused as error:
        raise CheckpointError(f"{path}: is refused or damaged: {error}") from None
    except (
        OSError,
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
        MemoryError,
        NotImplementedError,
        zipfile.BadZipFile,
        RuntimeError,
        EOFError,
    ) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f"{path}: is refused or damaged or cut off: {reason[:200]}") from None


def _follow(file: IO[bytes]) -> None:
    """Follow one pickle to its end; a value on the stack is (depth, number of its parts)."""
    stack: list[tuple[int, int] | None] = []  # None is a mark
    memo: dict[Any, tuple[int, int]] = {}
    work = 0
    for code, argument, _ in pickletools.genops(file):
        name = code.name
        if name in ("GLOBAL", "STACK_GLOBAL", "INST") and not _ALLOWED.fullmatch(str(argument)):
            asked = str(argument or "something").replace(" ", ".")
            raise _Refused(
                f"it asks for {asked:.80}, and a checkpoint may hold tensors and plain types alone"
            )
        if name in ("BINGET", "LONG_BINGET", "GET"):
            stack.append(memo[argument])
        elif name in ("BINPUT", "LONG_BINPUT", "PUT", "MEMOIZE"):
            top = stack[-1]
            if top is None:
                raise _Refused("it keeps a mark")
            memo[len(memo) if name == "MEMOIZE" else argument] = top
        elif name == "MARK":
            stack.append(None)
        else:
            parts = _taken(stack, code.stack_before)
            depth = max((part[0] for part in parts), default=0) + (name not in _FILL)
            size = 1 + sum(part[1] for part in parts)
            if isinstance(argument, str | bytes):
                size += len(argument) // 16
            if name in ("REDUCE", "NEWOBJ"):
                work += size
            is_tuple = "TUPLE" in name
            if work > _LARGEST_WORK or (
                is_tuple and (depth > _DEEPEST_VALUE or size > _LARGEST_VALUE)
            ):
                raise _Refused("a value in it is nested or repeated beyond measure")
            stack.extend((depth, size) for _ in code.stack_after)


def _taken(
    stack: list[tuple[int, int] | None], wanted: list[pickletools.StackObject]
) -> list[tuple[int, int]]:
    """Take from the stack what an instruction consumes."""
    taken: list[tuple[int, int]] = []
    marked = pickletools.markobject in wanted
    while marked and (part := stack.pop()) is not None:
        taken.append(part)
    below = wanted[: wanted.index(pickletools.markobject)] if marked else wanted
    for _ in below:
        part = stack.pop()
        if part is None:
            raise _Refused("its instructions do not fit together")
        taken.append(part)
    return taken


_LABEL = b"sha256:"
_COMMENT_LENGTH = len(_LABEL) + 2 * hashlib.sha256().digest_size


def save_sealed(path: Path, content: Any) -> None:
    """Write `content` with its checksum, atomically."""
    with atomic_file(path) as file:
        _save(content, file)
        # a zip file without a comment ends in the length of it, two bytes
        file.seek(-2, os.SEEK_END)
        file.write(_COMMENT_LENGTH.to_bytes(2, "little"))
        digest = _digest(file, file.tell())
        file.write(_LABEL + digest)


def refuse_damaged(path: Path) -> None:
    """Raise a CheckpointError unless the file is what `save_sealed` wrote, to the last bit."""
    try:
        with path.open("rb") as file:
            length = file.seek(0, os.SEEK_END) - _COMMENT_LENGTH
            file.seek(max(length, 0))
            comment = file.read()
            whole = comment.startswith(_LABEL) and length > 0
            if whole and comment == _LABEL + _digest(file, length):
                return
    except OSError as error:
        raise CheckpointError(f"{path}: cannot read the checkpoint: {error.strerror}") from None
    reason = "its content does not match its checksum" if whole else "its end is missing"
    raise CheckpointError(f"{path}: is damaged or cut off: {reason}")


def _save(content: Any, file: BinaryIO) -> None:
    try:
        torch.save(content, file)
    except RuntimeError as error:
        # where the file cannot be written, torch's closing of its archive hides why
        if isinstance(error.__context__, OSError):
            raise error.__context__ from None
        raise


def _digest(file: BinaryIO, length: int) -> bytes:
    """SHA-256 of the first bytes of a file, in hexadecimal; the file stands after them then."""
    digest = hashlib.sha256()
    file.seek(0)
    while length:
        block = file.read(min(length, 1 << 20))
        if not block:
            break
        digest.update(block)
        length -= len(block)
    return digest.hexdigest().encode()


LOCK_FILE = "zoo.lock.yaml"
_HEAD = """\
# Hashes of the weights in this folder, each recorded when the file first came, because the zoo's
# manifest does not know it. Every later use checks them. To accept another file in place of one
# named here, delete its entry.
"""


@dataclass(frozen=True)
class Recorded:
    """What is known of a file since it first came."""

    sha256: str
    size: int
    source: str
    recorded: str
    """UTC, ISO 8601."""


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


def read_lock(folder: Path) -> dict[str, Recorded]:
    """The recorded hashes of a folder of weights: file name -> what is known of it.

    Raises:
        CheckpointError: the lock file is damaged. It is never repaired: it is what tells a
            replaced file from the right one.
    """
    path = folder / LOCK_FILE
    try:
        content: Any = yaml.safe_load(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise CheckpointError(f"{path}: cannot read the recorded hashes: {error}") from None
    try:
        return {str(name): Recorded(**entry) for name, entry in (content or {}).items()}
    except (AttributeError, TypeError):
        raise CheckpointError(
            f"{path}: is damaged; allowed: file names with sha256, size, source and recorded"
        ) from None


def record_hash(path: Path, source: str) -> Recorded:
    """Hash a file and note it in the lock file beside it."""
    entry = Recorded(
        sha256=file_hash(path),
        size=path.stat().st_size,
        source=source,
        recorded=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    folder = path.parent
    with exclusive(folder / LOCK_FILE):
        entries = {**read_lock(folder), path.name: entry}
        plain = {name: asdict(entries[name]) for name in sorted(entries)}
        text = _HEAD + yaml.safe_dump(plain, sort_keys=False)
        write_atomically(folder / LOCK_FILE, text.encode())
    return entry


def refuse_changed(path: Path) -> None:
    """Raise a CheckpointError where a file is not the one whose hash was recorded."""
    entry = read_lock(path.parent).get(path.name)
    if entry is not None:
        refuse_wrong_hash(path, entry.sha256, f"recorded in {path.parent / LOCK_FILE}")


def refuse_wrong_hash(path: Path, expected: str, where: str) -> None:
    """Raise a CheckpointError where a file's hash is another one than `where` says."""
    found = file_hash(path)
    if found != expected:
        raise CheckpointError(
            f"{path}: is not the file that it should be: its SHA-256 is {found}, expected "
            f"{expected} ({where})"
        )


_LARGEST_UNPACKED = 1 << 24  # bytes that any file may unpack to
_LARGEST_RATIO = 8  # weights hardly compress at all
_BLOCK = r"Transformer/encoderblock_(\d+)/"
_RULES = (
    (r"cls", "cls_token"),
    (r"embedding/(kernel|bias)", r"patch_embed.proj.\1"),
    (r"Transformer/posembed_input/pos_embedding", "pos_embed"),
    (_BLOCK + r"LayerNorm_0/(scale|bias)", r"blocks.\1.norm1.\2"),
    (_BLOCK + r"LayerNorm_2/(scale|bias)", r"blocks.\1.norm2.\2"),
    (
        _BLOCK + r"MultiHeadDotProductAttention_1/(query|key|value)/(kernel|bias)",
        r"blocks.\1.attn.qkv.\3:\2",
    ),
    (_BLOCK + r"MultiHeadDotProductAttention_1/out/(kernel|bias)", r"blocks.\1.attn.proj.\2"),
    (_BLOCK + r"MlpBlock_3/Dense_0/(kernel|bias)", r"blocks.\1.mlp.fc1.\2"),
    (_BLOCK + r"MlpBlock_3/Dense_1/(kernel|bias)", r"blocks.\1.mlp.fc2.\2"),
    (r"Transformer/encoder_norm/(scale|bias)", r"norm.\1"),
    (r"head/(kernel|bias)", r"head.\1"),
)


def refuse_inflated_npz(path: Path) -> None:
    """Compare what the arrays of an npz claim with what it holds, before any is read.

    Raises:
        ValueError: an array is not of numbers, is larger than its part of the archive, or the whole
            unpacks to a multiple of the file that no weights reach.
    """
    total = 0
    with zipfile.ZipFile(path) as archive:
        for member in archive.infolist():
            with archive.open(member) as file:
                version = np.lib.format.read_magic(file)
                if version == (1, 0):
                    shape, _, kind = np.lib.format.read_array_header_1_0(file)
                else:
                    shape, _, kind = np.lib.format.read_array_header_2_0(file)
            if kind.hasobject:
                raise ValueError("Object arrays cannot be loaded: they are pickles")
            if kind.kind not in "fiu":
                raise ValueError(f"{member.filename} is of the type {kind}, not numbers")
            count = math.prod(shape)
            if min(shape, default=0) < 0 or count * kind.itemsize > member.file_size:
                raise ValueError(f"{member.filename} claims the shape {shape}, which it lacks")
            total += member.file_size
    if total > _LARGEST_UNPACKED + _LARGEST_RATIO * path.stat().st_size:
        raise ValueError(f"it unpacks to {total:,} bytes, far more than weights would")


def is_vit_npz(arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether the names are those of a released ViT."""
    return "embedding/kernel" in arrays and "Transformer/encoder_norm/scale" in arrays


def vit_state_dict(arrays: Mapping[str, np.ndarray]) -> dict[str, Tensor]:
    """Arrays under Google's names -> state dict under the names of timm's VisionTransformer.

    Raises:
        ValueError: a name that no released ViT has, or an attention without one of its parts.
    """
    state: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = {}
    unknown = []
    for name, array in arrays.items():
        target = _target(name)
        if target is None:
            unknown.append(name)
            continue
        ours, _, part = target.partition(":")
        tensor = _converted(name, torch.from_numpy(np.array(array, dtype=np.float32)))
        if part:
            parts.setdefault(ours, {})[part] = tensor
        else:
            state[ours] = tensor
    if unknown:
        raise ValueError(f"names that no released ViT has: {', '.join(sorted(unknown)[:8])}")
    for ours, found in parts.items():
        missing = [part for part in ("query", "key", "value") if part not in found]
        if missing:
            raise ValueError(f"{ours} lacks its {', '.join(missing)}")
        state[ours] = torch.cat([found[part] for part in ("query", "key", "value")])
    return state


def _target(name: str) -> str | None:
    for pattern, replacement in _RULES:
        match = re.fullmatch(pattern, name)
        if match:
            ours = match.expand(replacement)
            return re.sub(r"\.(kernel|scale)\b", ".weight", ours)
    return None


def _converted(name: str, array: Tensor) -> Tensor:
    """flax puts input dimensions first and keeps the heads apart; torch does neither."""
    if name == "embedding/kernel":
        return array.permute(3, 2, 0, 1).contiguous()  # (P, P, 3, D) -> (D, 3, P, P)
    if name.endswith("/out/kernel"):
        return array.flatten(0, 1).t().contiguous()  # (H, d, D) -> (D, H * d)
    if re.search(r"/(query|key|value)/kernel$", name):
        return array.flatten(1).t().contiguous()  # (D, H, d) -> (H * d, D)
    if re.search(r"/(query|key|value)/bias$", name):
        return array.flatten()  # (H, d) -> (H * d,)
    if name.endswith("/kernel"):
        return array.t().contiguous()  # (in, out) -> (out, in)
    return array


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
