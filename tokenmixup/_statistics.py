"""The statistics of a training step, which cost nothing until somebody reads them."""

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import Tensor


class Statistics(Mapping[str, Tensor]):
    """0-d tensors by name, computed when the first is read.

    Copies and pickles are plain dicts.

    Args:
        values: what computes the tensors, or the tensors themselves: libraries that cast or move
            what a model returns build a mapping anew from its items.
    """

    def __init__(self, values: Mapping[str, Tensor] | Callable[[], Mapping[str, Tensor]]) -> None:
        self._compute = None if isinstance(values, Mapping) else values
        self._values = values if isinstance(values, Mapping) else {}

    def _read(self) -> Mapping[str, Tensor]:
        if self._compute is not None:
            with torch.no_grad():
                self._values = self._compute()
            self._compute = None
        return self._values

    def __getitem__(self, name: str) -> Tensor:
        return self._read()[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._read())

    def __len__(self) -> int:
        return len(self._read())

    def __repr__(self) -> str:
        return repr(dict(self))

    def __reduce__(self) -> tuple[type[dict[str, Tensor]], tuple[dict[str, Tensor]]]:
        return dict, (dict(self),)
