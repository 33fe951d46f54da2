"""What the VTM wrappers of one model remember in a forward pass, and how they find each other.

Dimensions: B batch, D width, K kappa.
"""

import threading
import weakref

from torch import Tensor


class _Pass:
    """A forward pass: remembered tokens (B, K, D) by layer."""

    def __init__(self) -> None:
        self.tokens: dict[int, Tensor] = {}


class _Thread(threading.local):
    """The pass of one thread, which ends with the thread.

    The pass is an object of its own: torch.compile follows its attributes, but not every change of
    a thread-local's. :meth:`VerticalMemory.clear` replaces the dict: torch.compile would guard
    the keys of an old one.
    """

    def __init__(self) -> None:
        self.current = _Pass()


class VerticalMemory:
    """Tokens that the wrappers of one model remember in a forward pass.

    Each thread has a pass of its own. A call of layer 0 begins a pass; the next one,
    :meth:`clear` or the end of the thread forgets it. Copies and pickles of a model have their own
    memory, without tokens.
    """

    def __init__(self) -> None:
        self._thread = _Thread()

    def __reduce__(self) -> tuple[type["VerticalMemory"], tuple[()]]:
        return VerticalMemory, ()

    def tokens(self) -> dict[int, Tensor]:
        """Remembered tokens of this thread's pass, layer index -> (B, K, D)."""
        return self._thread.current.tokens

    def clear(self) -> None:
        """Forget what this thread's pass remembered; passes of other threads stay."""
        self._thread.current.tokens = {}


class _Construction(threading.local):
    """The memory of the model whose wrappers this thread is building, and the last index.

    The published interface does not tell a wrapper which model it belongs to: only the order of
    construction does. The memory is held weakly, so that it ends with its model.
    """

    memory: weakref.ref[VerticalMemory] | None = None
    last_index: int = -1


_construction = _Construction()


def memory_for(layer_index: int) -> VerticalMemory:
    """The memory of the wrapper that this thread built last, or a new one for a new model."""
    memory = None if _construction.memory is None else _construction.memory()
    if memory is None or layer_index <= _construction.last_index:
        memory = VerticalMemory()
        _construction.memory = weakref.ref(memory)
    _construction.last_index = layer_index
    return memory
