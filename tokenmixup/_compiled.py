"""The parts in C that are built at installation, where there is a compiler for them."""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from typing import Any


@functools.cache
def load(module: str, function: str, result: Any, *arguments: Any) -> Callable[..., Any] | None:
    """A function of ``tokenmixup.<module>``, or None where that was not built.

    They are plain libraries without Python's interface: ctypes needs no headers of Python to build
    them, and lets other threads run while they compute.

    Args:
        module: built from ``<module>.c``.
        function: its name there.
        result: type of what it returns, of ctypes, or None.
        arguments: types of its arguments.
    """
    found = importlib.util.find_spec(f"tokenmixup.{module}")
    if found is None or found.origin is None:
        return None
    loaded: Callable[..., Any] = getattr(ctypes.CDLL(found.origin), function)
    untyped: Any = loaded
    untyped.restype, untyped.argtypes = result, arguments
    return loaded
