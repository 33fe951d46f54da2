"""What a pickle asks for, looked at before anything of it is loaded.

torch's `weights_only` runs no code of a file's choice, but it builds whatever tensors, byte arrays
and nested tuples the file describes: a hundred bytes may ask for more memory than there is, and a
tuple nested a million times ends the process where it is hashed. Here every instruction of the
pickle is followed on a stack of sizes instead of values.
"""

import io
import pickletools
import re
import zipfile
from pathlib import Path
from typing import IO, Any

from experiments.errors import CheckpointError

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
