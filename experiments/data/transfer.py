"""Batches on the device: copied there, normalised there, and on a GPU beside the step before.

Dimensions: B batch.
"""

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor

from experiments.config.schema import RunConfig
from experiments.data.augment import mean_and_std, normalise

Loaded = tuple[Tensor, Tensor, list[str]]
"""Images (B, 3, H, W), in uint8 until they are normalised, labels (B,), and what was wrong."""

_Item = TypeVar("_Item")


def memory_format(config: RunConfig) -> torch.memory_format:
    """The layout of images and convolutions in memory."""
    return torch.channels_last if config.channels_last else torch.contiguous_format


class Transfer:
    """Puts what a loader gives on the device, in the configured layout and normalised.

    On a GPU a stream of its own copies and normalises the next batch while the device computes the
    step of the one before, and no batch makes the host wait. On a CPU nothing is done ahead.

    Args:
        config: tells mean, standard deviation and layout.
        device: of the batches.
        ahead: whether the next batch is begun before one is handed on; None: on a GPU.
    """

    def __init__(self, config: RunConfig, device: torch.device, ahead: bool | None = None) -> None:
        on_gpu = device.type == "cuda"
        self.ahead = on_gpu if ahead is None else ahead
        self._device = device
        self._layout = memory_format(config)
        self._mean, self._std = mean_and_std(config.data, device)
        self._streams: Any = torch.get_device_module(device)  # a CPU's do nothing
        self._own = torch.cuda.Stream(device) if on_gpu else self._streams.Stream()

    def __call__(self, batches: Iterable[Loaded]) -> Iterator[Loaded]:
        """The batches in their order; an error comes where its batch would have come."""
        begun = map(self._begin, batches)
        for batch, arrived in one_early(begun) if self.ahead else begun:
            self._consumer().wait_event(arrived)
            yield batch
            del batch  # before the next one is begun

    def _begin(self, batch: Loaded) -> tuple[Loaded, Any]:
        """Begin to copy and normalise; the batch is there when the event has come."""
        images, labels, problems = batch
        # The memory of a batch that was let go of is free for this stream at once, though steps
        # that the host has launched may still read it: what is written here comes after those.
        self._own.wait_stream(self._consumer())
        with self._streams.stream(self._own):
            images = images.to(self._device, non_blocking=True, memory_format=self._layout)
            images = normalise(images, self._mean, self._std)
            labels = labels.to(self._device, non_blocking=True)
            return (images, labels, problems), self._own.record_event()

    def _consumer(self) -> Any:
        return self._streams.current_stream(self._device)


def one_early(items: Iterable[_Item]) -> Iterator[_Item]:
    """The same items; each is asked for before the one before it is handed on.

    An error comes in its place, after all items before it.
    """
    asked_for: deque[_Item] = deque()
    try:
        for item in items:
            asked_for.append(item)
            del item
            if len(asked_for) > 1:
                yield asked_for.popleft()
    except Exception:
        while asked_for:
            yield asked_for.popleft()
        raise
    while asked_for:
        yield asked_for.popleft()
