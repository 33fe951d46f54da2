"""What the VTM wrappers of one model remember during a forward pass, and how they find each other.

Dimensions: B batch, D width, K kappa.
"""

import threading
import weakref
from typing import Any

import torch
from torch import Tensor


class _Pass:
    """The forward pass that a thread is in.

    Attributes:
        tokens: remembered tokens (B, K, D) by layer.
        inside: the node of a backward pass that runs this forward pass again, None outside of one.
        without_gradient: layers that remembered while gradients were off.
    """

    def __init__(self) -> None:
        self.begin(None)

    def begin(self, inside: Any) -> None:
        """Start anew."""
        self.tokens: dict[int, Tensor] = {}
        self.inside = inside
        self.without_gradient: set[int] = set()


class _Thread(threading.local):
    """Each thread's pass, which ends with the thread.

    The pass is an object of its own, because torch.compile does not follow every change of a
    thread-local object's attributes, but does follow those of the object in it.
    """

    def __init__(self) -> None:
        self.current = _Pass()


class VerticalMemory:
    """Tokens that the wrappers of one model remember during a forward pass.

    Each thread has a pass of its own. It begins with a call of layer 0, and is forgotten with the
    next one, with :meth:`clear` or with the thread, whichever comes first. Copying or pickling a
    model copies the bond between its wrappers, not the tokens.
    """

    def __init__(self) -> None:
        self._thread = _Thread()
        # Layers that remembered without gradients what a later layer attended to with them.
        self._cut_off: set[int] = set()

    def tokens(self) -> dict[int, Tensor]:
        """Remembered tokens of this thread's pass, layer index -> (B, K, D)."""
        return self._thread.current.tokens

    def clear(self) -> None:
        """Forget what this thread's pass remembered; passes of other threads stay.

        A backward pass that follows does not need it, with activation checkpointing neither.
        """
        self._thread.current.begin(None)

    def __reduce__(self) -> tuple[type["VerticalMemory"], tuple[()]]:
        return VerticalMemory, ()

    def enter(self, layer: int) -> None:
        """Have a layer join this thread's pass; layer 0 begins one.

        Raises:
            RuntimeError: a backward pass runs the layer again, and nothing tells of which step, or
                its tokens should have had a gradient and had none.
        """
        inside = None if torch.compiler.is_compiling() else torch._C._current_autograd_node()
        current = self._thread.current
        if layer == 0:
            current.begin(inside)  # whatever a pass that broke off may have left
        stranger = current.inside is not inside
        cut_off = torch.is_grad_enabled() and layer in self._cut_off
        if inside is not None and (stranger or cut_off):
            raise RuntimeError(
                f"VTM layer {layer} runs again in a backward pass, where the tokens that it "
                "remembers or attends to are not at hand. Reentrant activation checkpointing of "
                "single layers does this: use use_reentrant=False"
            )
        if stranger:
            current.begin(None)  # its tokens were those of a backward pass that is over

    def remember(self, layer: int, tokens: Tensor) -> None:
        """Keep the tokens (B, K, D) of a layer."""
        current = self._thread.current
        current.tokens[layer] = tokens
        if torch.is_grad_enabled():
            current.without_gradient.discard(layer)
        else:
            current.without_gradient.add(layer)

    def note_cut_off(self, layer: int) -> None:
        """Note, where a layer attends with gradients, which tokens were remembered without.

        This is right where a lower part of a model runs under no_grad, and wrong where reentrant
        checkpointing turned gradients off. Then the backward pass runs those layers again.
        """
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():
            lost = self._thread.current.without_gradient
            self._cut_off.update(index for index in lost if index < layer)


class _Construction(threading.local):
    """The memory of the model whose wrappers this thread is building, and its last index.

    The published interface gives wrappers nothing to tell which model they belong to but the
    order in which they are built. The memory is held weakly, so that it ends with its model.
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
