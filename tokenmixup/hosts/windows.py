"""What hosts share that attend within windows of their token grid.

Dimensions: B batch, T patch tokens, R x C their grid, W windows, n positions in a window, D width,
H heads.
"""

from abc import abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenmixup.hosts.base import Args, HostAdapter, Kwargs, TokenLayout

NO_MEMORY = (
    "its queries attend to the tokens of their own window alone, and remembered tokens, which come "
    "from anywhere in the image, belong to none"
)


@dataclass(frozen=True)
class Windows:
    """How a layer cuts its grid into windows.

    Attributes:
        grid: (R, C).
        window: rows and columns of a window.
        shift: by which the grid is rolled first, to the left and upwards.
        pads_first: whether the grid is padded to whole windows before it is rolled, or after.
    """

    grid: tuple[int, int]
    window: tuple[int, int]
    shift: tuple[int, int]
    pads_first: bool = False

    @property
    def padded(self) -> tuple[int, int]:
        """Rows and columns of whole windows, (R', C')."""
        rows, columns = (
            size + -size % side for size, side in zip(self.grid, self.window, strict=True)
        )
        return rows, columns

    def cut(self, tokens: Tensor) -> Tensor:
        """Tokens (B, T, D), and zeros where the grid is padded -> (B, W, n, D)."""
        grid, (rows, columns) = tokens.unflatten(1, self.grid), self.window
        first, second = (self._pad, self._roll) if self.pads_first else (self._roll, self._pad)
        grid = second(first(grid))
        windows = grid.unflatten(2, (-1, columns)).unflatten(1, (-1, rows))
        return windows.transpose(2, 3).flatten(3, 4).flatten(1, 2)

    def join(self, windows: Tensor) -> Tensor:
        """What :meth:`cut` cut, one number of each token: (B, W, n) -> (B, T)."""
        (rows, columns), (side, other) = self.padded, self.window
        grid = windows.unflatten(2, self.window).unflatten(1, (rows // side, columns // other))
        grid = grid.transpose(2, 3).flatten(3, 4).flatten(1, 2)
        own = (slice(None), *map(slice, self.grid))
        grid = self._unroll(grid)[own] if self.pads_first else self._unroll(grid[own])
        return grid.flatten(1)

    def padding_bias(self, like: Tensor) -> Tensor | None:
        """For scores, (1, W, 1, n, n): padded positions, as queries, attend to no token.

        As keys they take their share of a window's attention. None where nothing is padded.
        """
        if self.padded == self.grid:
            return None
        tokens = self.cut(like.new_ones((1, self.grid[0] * self.grid[1], 1)))  # (1, W, n, 1)
        outside = (tokens == 0) & (tokens.mT == 1)
        return outside.to(like.dtype).masked_fill(outside, float("-inf")).unsqueeze(2)

    def shift_bias(self, like: Tensor) -> Tensor | None:
        """For scores, (1, W, 1, n, n): -100 between tokens of opposite borders.

        The rolling brings them into one window. None where nothing is shifted.
        """
        if not any(self.shift):
            return None
        parts = []
        for size, side, by in zip(self.padded, self.window, self.shift, strict=True):
            place = torch.arange(size, device=like.device)
            inner, outer = place >= size - side, place >= size - by
            parts.append(inner.long() + outer if by else torch.zeros_like(place))
        labels = (3 * parts[0].unsqueeze(1) + parts[1]).flatten().view(1, -1, 1)
        labels = Windows(self.padded, self.window, (0, 0)).cut(labels)  # (1, W, n, 1)
        apart = labels != labels.mT
        return apart.to(like.dtype).mul(-100).unsqueeze(2)

    def _roll(self, grid: Tensor) -> Tensor:
        return _rolled(grid, [-by for by in self.shift])

    def _unroll(self, grid: Tensor) -> Tensor:
        return _rolled(grid, list(self.shift))

    def _pad(self, grid: Tensor) -> Tensor:
        if self.padded == self.grid:
            return grid
        (rows, columns), (all_rows, all_columns) = self.grid, self.padded
        return F.pad(grid, (0, 0, 0, all_columns - columns, 0, all_rows - rows))


def _rolled(grid: Tensor, shift: list[int]) -> Tensor:
    return torch.roll(grid, shift, dims=(1, 2)) if any(shift) else grid


class WindowedHost(HostAdapter):
    """Base of the adapters for hosts that attend within windows of a grid, shifted or not.

    A token's saliency is, as in every host, the mean over heads and over all queries of the image
    of the attention that it receives: that from other windows is 0.
    """

    @abstractmethod
    def windows(self, layer: nn.Module, args: Args, kwargs: Kwargs) -> Windows:
        """How the layer cuts its tokens in this call."""

    @abstractmethod
    def window_query_key(self, layer: nn.Module, windows: Tensor) -> tuple[Tensor, Tensor, float]:
        """Queries and keys (B', H, n, d), and the scale, of normalised windows (B', n, D)."""

    @abstractmethod
    def relative_bias(self, layer: nn.Module) -> Tensor:
        """What the layer adds to the scores of each window, (1, H, n, n)."""

    def shift_bias(self, layer: nn.Module, windows: Windows, like: Tensor) -> Tensor | None:
        """What it adds where windows are shifted, (1, W, 1, n, n)."""
        return windows.shift_bias(like)

    def layout(self, host: nn.Module) -> TokenLayout:
        """Of the first layer: these hosts have stages."""
        return self.layouts(host)[0]

    def query_key(
        self, layer: nn.Module, tokens: Tensor, args: Args, kwargs: Kwargs, class_row: bool
    ) -> tuple[Tensor, Tensor, float]:
        """Window by window, (B, W, H, n, d)."""
        windows = self.windows(layer, args, kwargs).cut(self.normalise(layer, tokens))
        query, key, scale = self.window_query_key(layer, windows.flatten(0, 1))
        size = windows.shape[:2]
        return query.unflatten(0, size), key.unflatten(0, size), scale

    def score_bias(
        self, layer: nn.Module, args: Args, kwargs: Kwargs, class_row: bool
    ) -> Tensor | None:
        """The layer's own, and one that leaves out the queries of padding."""
        windows, bias = self.windows(layer, args, kwargs), self.relative_bias(layer).unsqueeze(0)
        for more in (self.shift_bias(layer, windows, bias), windows.padding_bias(bias)):
            bias = bias if more is None else bias + more
        return bias

    def token_saliency(
        self, layer: nn.Module, saliency: Tensor, args: Args, kwargs: Kwargs
    ) -> Tensor:
        """Rolled back to the grid; a mean over the n queries of a window becomes one over T."""
        windows = self.windows(layer, args, kwargs)
        joined = windows.join(saliency)
        return joined * (saliency.shape[2] / joined.shape[1])

    def no_memory(self, layer: nn.Module) -> str | None:
        """A window's keys are its own tokens."""
        return NO_MEMORY


class GridHost(WindowedHost):
    """Base of those whose layers take their grid itself, (B, R, C, D)."""

    def tokens(self, args: Args, kwargs: Kwargs) -> Tensor:
        """The grid, row by row."""
        return args[0].flatten(1, 2)

    def with_tokens(self, tokens: Tensor, args: Args, kwargs: Kwargs) -> tuple[Args, Kwargs]:
        """As a grid again."""
        return (tokens.view_as(args[0]), *args[1:]), kwargs
