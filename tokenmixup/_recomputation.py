"""Activation checkpointing as a layer sees it: which of its calls is being run again.

``torch.utils.checkpoint`` with ``use_reentrant=False`` runs a region of a model a second time in
the backward pass, in any order of steps and in any thread. A layer on its own gets no word of it,
but the region can be told by the hooks that torch puts around it, for saved tensors. Its calls
come in the same order both times.
"""

import inspect
import weakref
from typing import Generic, NamedTuple, TypeVar

import torch
from torch.utils import checkpoint

Call = TypeVar("Call")

# Not public in torch. Where a later torch has it no more, no region is ever found, and the layers
# refuse to run in a backward pass instead of guessing.
_FRAME: type | None = getattr(checkpoint, "_CheckpointFrame", None)


class Region(NamedTuple):
    """A region that is checkpointed without reentrance.

    Attributes:
        frame: what torch keeps of the region, held by its graph, thus as long as it can run again.
        run: stands for the run in the backward pass that this is, None in the forward pass.
    """

    frame: object
    run: object | None


def checkpointed_region() -> Region | None:
    """The innermost checkpointed region that this thread is in."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(False)
    if hooks is None or _FRAME is None:
        return None
    pack = hooks[0]
    for cell in getattr(inspect.unwrap(pack), "__closure__", None) or ():
        held = cell.cell_contents
        if isinstance(held, _FRAME):
            return Region(held, None)
        if isinstance(held, weakref.ref) and isinstance(held(), _FRAME):
            return Region(held(), pack)
    return None


def in_backward() -> bool:
    """Whether a backward pass runs in this thread: any forward pass in it is one run again."""
    return torch._C._current_graph_task_id() != -1


class Calls(Generic[Call]):
    """What one layer noted of its calls in checkpointed regions.

    Notes go with the graph of their region, so they must not hold tensors that have a graph. Copies
    and pickles start empty.
    """

    def __init__(self) -> None:
        self._made: weakref.WeakKeyDictionary[object, list[Call]] = weakref.WeakKeyDictionary()
        self._repeated: weakref.WeakKeyDictionary[object, int] = weakref.WeakKeyDictionary()

    def __reduce__(self) -> tuple[type["Calls[Call]"], tuple[()]]:
        return Calls, ()

    def note(self, region: Region, call: Call) -> None:
        """Note a call of the forward pass."""
        self._made.setdefault(region.frame, []).append(call)

    def again(self, region: Region) -> Call | None:
        """What was noted of the call that is now made again, None where nothing was."""
        index = self._repeated.get(region.run, 0)
        self._repeated[region.run] = index + 1
        made = self._made.get(region.frame, [])
        return made[index] if index < len(made) else None
