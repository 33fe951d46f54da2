"""Tokens as the squares of an image that they stand at: arrays in, arrays out.

Dimensions: B batch, T patch tokens, S side of the image in pixels.
"""

import math

import matplotlib.colors
import numpy as np

from experiments.documents.figures import MAP
from experiments.errors import ConfigError


def token_index(tokens: int, size: int) -> np.ndarray:
    """Which token stands at each pixel, (S, S).

    Raises:
        ConfigError: the tokens are not those of a square grid.
    """
    side = math.isqrt(tokens)
    if side * side != tokens:
        raise ConfigError(
            f"model: its {tokens} patch tokens form no square grid, so they cannot be shown as "
            "squares of the image; allowed: square patches"
        )
    along = np.arange(size) * side // size
    return along[:, None] * side + along


def token_grid(values: np.ndarray, size: int) -> np.ndarray:
    """Values of the tokens (..., T) as squares of an image (..., S, S)."""
    return values[..., token_index(values.shape[-1], size)]


def mix_patches(images: np.ndarray, partner: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """Tokens shown as image patches: each masked one is the partner's at the same position.

    Args:
        images: (B, S, S, 3).
        partner: (B,).
        mask: (B, T) bool.
    """
    pixels = token_grid(mask, images.shape[1])[..., None]
    return np.where(pixels, images[partner], images)


def heat(image: np.ndarray, values: np.ndarray, high: float, strength: float = 0.7) -> np.ndarray:
    """An image under the colours of its tokens' values.

    Args:
        image: (S, S, 3), 0 to 1.
        values: (T,), 0 to `high`.
        high: the value of the brightest colour.
        strength: share of the colour, the rest is the image in grey.
    """
    scaled = token_grid(values, len(image)) / (high or 1.0)
    colours = matplotlib.colormaps[MAP](np.clip(scaled, 0, 1))[..., :3]
    return strength * colours + (1 - strength) * _grey(image)


def spotlight(image: np.ndarray, chosen: np.ndarray, colour: str) -> np.ndarray:
    """The chosen tokens of an image (S, S, 3) tinted, all others faded; chosen is (T,) bool."""
    where = token_grid(chosen, len(image))[..., None]
    tint = np.array(matplotlib.colors.to_rgb(colour))
    faded = 0.45 * _grey(image) + 0.55 * 0.5
    return np.where(where, 0.55 * image + 0.45 * tint, faded)


def outlines(chosen: np.ndarray, size: int) -> list[tuple[tuple[float, float], ...]]:
    """Line segments ((x, y), (x, y)) between chosen (T,) and other tokens, in pixels of an image.

    A pixel's centre has whole coordinates, as in matplotlib's images.
    """
    side = math.isqrt(len(chosen))
    edge = [math.ceil(k * size / side) - 0.5 for k in range(side + 1)]
    grid = np.pad(chosen.reshape(side, side), 1)
    segments: list[tuple[tuple[float, float], ...]] = []
    for row, column in np.argwhere(grid[:, 1:] != grid[:, :-1]):  # borders on the right
        segments.append(((edge[column], edge[row - 1]), (edge[column], edge[row])))
    for row, column in np.argwhere(grid[1:] != grid[:-1]):  # borders below
        segments.append(((edge[column - 1], edge[row]), (edge[column], edge[row])))
    return segments


def _grey(image: np.ndarray) -> np.ndarray:
    return (image @ np.array([0.299, 0.587, 0.114]))[..., None]
