"""State of forward passes: what the hooks of one model share during a training step.

Dimensions: B batch, C classes, D width, K kappa.
"""

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from tokenmixup.functional import MixingDecision


class StepRecord:
    """One training forward pass.

    Attributes:
        targets: soft targets (B, C) as mixed so far, None where none were given.
        scorenet_losses: losses of each sample (B,), one of each HTM layer.
        stats: 0-d tensors by name.
        memory: remembered tokens (B, K, D) by layer.
        decisions: by HTM layer, the targets before its mixing and what it decided.
        positions: by layer, the positions (B, K) that it remembers.
        grad_enabled: whether the pass began with gradients on.

    Activation checkpointing runs layers again in the backward pass. They then find here what they
    decided, instead of deciding anew.
    """

    def __init__(self, targets: Tensor | None) -> None:
        self.targets = targets
        self.scorenet_losses: list[Tensor] = []
        self.stats: dict[str, Tensor] = {}
        self.memory: dict[int, Tensor] = {}
        self.decisions: dict[int, tuple[Tensor, MixingDecision]] = {}
        self.positions: dict[int, Tensor] = {}
        self.grad_enabled = torch.is_grad_enabled()


class Session:
    """Finds the step that a hook belongs to; one for each model, separate for each thread.

    Copies and pickles of a model get an empty session of their own.
    """

    def __init__(self) -> None:
        self._running: dict[int, StepRecord] = {}
        self._in_backward: dict[int, weakref.ref[StepRecord]] = {}
        self._traced: StepRecord | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"_running": {}, "_in_backward": {}, "_traced": None}

    @contextmanager
    def step(self, targets: Tensor | None) -> Iterator[StepRecord]:
        """Run the host's forward pass in here; whatever happens, nothing of it stays behind."""
        thread = threading.get_ident()
        assert thread not in self._running, "a TokenMixupModel cannot run inside itself"
        record = self._running[thread] = StepRecord(targets)
        try:
            yield record
        finally:
            del self._running[thread]

    def begin_traced(self, targets: Tensor | None) -> StepRecord:
        """As :meth:`step`, for torch.compile, which runs no other thread while it traces."""
        self._traced = StepRecord(targets)
        return self._traced

    def end_traced(self) -> None:
        """End what :meth:`begin_traced` began."""
        self._traced = None

    def current(self) -> tuple[StepRecord | None, bool]:
        """The step that this thread is in, and whether a backward pass is running it again."""
        if torch.compiler.is_compiling():
            return self._traced, False
        thread = threading.get_ident()
        record = self._running.get(thread)
        if record is not None:
            return record, False
        # Activation checkpointing: outside of any forward pass, but inside a backward pass of one.
        # torch.utils.checkpoint itself asks the engine in this way.
        reference = self._in_backward.get(thread)
        if reference is None or torch._C._current_graph_task_id() == -1:
            return None, False
        record = reference()
        return record, record is not None

    def mark_backward(self, record: StepRecord, output: Tensor) -> None:
        """Have the backward pass that starts at ``output`` announce its step before anything else.

        The graph of ``output`` keeps the record alive for exactly as long as it may be needed.
        """
        self._in_backward = {t: ref for t, ref in self._in_backward.items() if ref() is not None}
        if output.requires_grad:

            def announce(_: Tensor) -> None:
                self._in_backward[threading.get_ident()] = weakref.ref(record)

            output.register_hook(announce)
