"""The parts in C that are built at installation, where there is a compiler for them."""

import ctypes
import importlib.util


def load(name: str) -> ctypes.CDLL | None:
    """The library of the module ``tokenmixup.<name>``, or None where it was not built.

    They are plain libraries without Python's interface: ctypes needs no headers of Python to build
    them, and lets other threads run while they compute.
    """
    found = importlib.util.find_spec(f"tokenmixup.{name}")
    return None if found is None or found.origin is None else ctypes.CDLL(found.origin)
