"""The state that the hooks of one model share during a training step.

Dimensions: B batch, C classes, D width, K kappa.
"""

import threading
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.hooks import unserializable_hook

from tokenmixup.functional import MixingDecision
from tokenmixup.hosts.base import Remembered

_Announce = Callable[[Tensor], None]
_may_be_saved: Callable[[_Announce], _Announce] = unserializable_hook
"""Tensors are saved without this hook, and without a warning."""


def backward_pass() -> int:
    """Number of the backward pass that this thread runs, -1 where it runs none.

    A forward pass inside a backward pass is activation checkpointing, which runs layers again.
    torch.utils.checkpoint itself asks the engine in this way.
    """
    return torch._C._current_graph_task_id()


def in_backward() -> bool:
    """Whether activation checkpointing runs the calling layer again."""
    return not torch.compiler.is_compiling() and backward_pass() != -1


class StepRecord:
    """One training forward pass.

    Attributes:
        targets: soft targets (B, C) as mixed so far, None where none were given.
        scorenet_losses: losses of each sample (B,), one of each HTM layer.
        stats: what computes 0-d tensors by name, of one layer each.
        memory: remembered tokens (B, K, D) by layer.
        entering: by layer that is running, its tokens (B, N, D) and its arguments.
        attending: by VTM layer whose attention is running, what it attends to.
        decisions: by HTM layer, the targets before its mixing and what it decided.
        positions: by layer, the positions (B, K) that it remembers.
        attended: VTM layers whose attention got its remembered tokens.
        grad_enabled: whether the pass began with gradients on.
        measuring: whether a layer's saliency is being computed: its modules see its own tokens.
        num_tokens: N of the layers of each stage that has begun.

    Activation checkpointing runs layers again in the backward pass. They then find their decisions
    here instead of deciding again.
    """

    def __init__(self, targets: Tensor | None) -> None:
        self.targets = targets
        self.scorenet_losses: list[Tensor] = []
        self.stats: list[Callable[[], dict[str, Tensor]]] = []
        self.memory: dict[int, Tensor] = {}
        self.entering: dict[int, tuple[Tensor, tuple[Any, ...], dict[str, Any]]] = {}
        self.attending: dict[int, Remembered] = {}
        self.decisions: dict[int, tuple[Tensor, MixingDecision]] = {}
        self.positions: dict[int, Tensor] = {}
        self.attended: set[int] = set()
        self.grad_enabled = torch.is_grad_enabled()
        self.measuring = False
        self.num_tokens: dict[int, int] = {}


class _Thread(threading.local):
    """What one thread is in."""

    running: StepRecord | None = None
    backward_of: weakref.ref[StepRecord] | None = None
    backward_task: int = -1


class Session:
    """Finds the step that a hook belongs to; one for each model, separate for each thread.

    Copies and pickles of a model get an empty session of their own.
    """

    def __init__(self) -> None:
        self._thread = _Thread()
        self._traced: StepRecord | None = None

    def __reduce__(self) -> tuple[type["Session"], tuple[()]]:
        return Session, ()

    @contextmanager
    def step(self, targets: Tensor | None) -> Iterator[StepRecord]:
        """A training pass of the host; its state is dropped at the end, also after an error."""
        if self._thread.running is not None:
            raise RuntimeError(
                "a TokenMixupModel was called inside a training step of its own: something that "
                "its host runs calls the model again"
            )
        record = self._thread.running = StepRecord(targets)
        try:
            yield record
        finally:
            self._thread.running = None

    def begin_traced(self, targets: Tensor | None) -> StepRecord:
        """As :meth:`step`, for torch.compile, which traces in one thread.

        After a graph break the traced part runs as it stands, also if the rest fails: always call
        :meth:`end_traced`.
        """
        self._traced = StepRecord(targets)
        return self._traced

    def end_traced(self) -> None:
        """End what :meth:`begin_traced` began."""
        self._traced = None

    def current(self) -> tuple[StepRecord | None, bool]:
        """The step that this thread is in, and whether a backward pass is running it again."""
        if torch.compiler.is_compiling():
            return self._traced, False
        thread = self._thread
        if thread.running is not None:
            return thread.running, False
        # Activation checkpointing: outside of any forward pass, but inside the backward pass of
        # one, and with gradients.
        if thread.backward_of is None or not torch.is_grad_enabled():
            return None, False
        if backward_pass() != thread.backward_task:
            return None, False
        record = thread.backward_of()
        return record, record is not None

    def mark_backward(self, record: StepRecord | None, output: Tensor) -> None:
        """Make the backward pass through ``output`` announce its step first.

        The graph of ``output`` keeps the record alive exactly as long as it may be needed. None
        stands for a pass in evaluation, which may share a backward pass with a training step.
        """
        if output.requires_grad:

            def announce(_: Tensor) -> None:
                self._thread.backward_of = None if record is None else weakref.ref(record)
                self._thread.backward_task = backward_pass()

            output.register_hook(_may_be_saved(announce))
