"""Figures of Horizontal TokenMixup: what happened to each image, and who could gain from whom.

Dimensions: B batch, T patch tokens, S side of the image in pixels, C classes, E easy samples.
"""

from typing import Any

import matplotlib.ticker
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle

from experiments.documents import figures as style
from experiments.documents.figures import BLUE, GROUND, INK, MAP, PARTNER, VERMILION
from experiments.visualize import cells
from experiments.visualize.recording import HorizontalRecord
from experiments.visualize.scenes import Scene
from experiments.visualize.tokens import heat, mix_patches

COLUMNS = (
    "image",
    "difficulty\nagainst τ",
    "saliency",
    "partner,\nits saliency",
    "token mask:\nfrom the partner",
    "mixed image",
    "mixed label",
)
_ROW_INCHES, _HEAD_INCHES, _FOOT_INCHES = 1.22, 0.75, 0.95
_THUMBNAILS_UP_TO, _NUMBERS_UP_TO = 16, 12  # images, beyond which a cell is too small


def rows_height(rows: int) -> float:
    """Inches that `draw_rows` needs."""
    return _ROW_INCHES * rows + _HEAD_INCHES + _FOOT_INCHES


def draw_rows(panel: FigureBase, scene: Scene, layer: HorizontalRecord, chosen: list[int]) -> None:
    """One row an image, one column a step of the method.

    Args:
        panel: a figure, or a part of one.
        scene: the batch.
        layer: one of the HTM layers of its recording.
        chosen: indices of the images to show.
    """
    saliency, mask = layer.saliency.cpu().numpy(), layer.mask.cpu().numpy()
    partner, targets = layer.partner.cpu().numpy(), layer.targets.cpu().numpy()
    mixed = mix_patches(scene.images, partner, mask)
    taking = mask.sum(1) > 0
    shown = [*chosen, *(int(partner[i]) for i in chosen if taking[i])]
    high = float(saliency[shown].max())
    grid = panel.subplots(
        len(chosen), len(COLUMNS), squeeze=False, width_ratios=[1, 1, 1, 1, 1, 1, 1.25]
    )
    for row, index in zip(grid, chosen, strict=True):
        other, image = int(partner[index]), scene.images[index]
        cells.show(row[0], image, scene.label_text(index))
        _difficulty(row[1], scene, layer, index)
        cells.show(row[2], heat(image, saliency[index], high))
        if taking[index]:
            picture = heat(scene.images[other], saliency[other], high)
            cells.show(row[3], picture, scene.label_text(other))
            count = f"{int(mask[index].sum())} of {mask.shape[1]} tokens"
            cells.show_chosen(row[4], image, mask[index], PARTNER, count)
            cells.show(row[5], mixed[index])
            cells.outline(row[5], mask[index], len(image), PARTNER)
        else:
            easy = bool(layer.easy[index])
            cells.empty(
                row[3],
                "no token of\nany partner is\nworth more" if easy else "not easy,\nso not mixed",
            )
            cells.empty(row[4], "")
            cells.show(row[5], image, "unchanged")
        cells.show_shares(
            row[6], scene, targets[index], int(scene.labels[index]), int(scene.labels[other])
        )
    cells.head(grid[0], COLUMNS)
    for column, unit in ((1, "CE / 10 (nats)"), (6, "share (%)")):
        for cell in grid[:-1, column]:
            cell.tick_params(labelbottom=False)
        grid[-1, column].set_xlabel(unit, fontsize=7.5, labelpad=2)
    _colour_scale(panel, grid, 100 * high)
    share = 100 * float(layer.easy.float().mean())
    seen = "; the layers before have mixed in what stands elsewhere" if layer.layer else ""
    style.title(panel, f"Horizontal TokenMixup at layer {layer.layer}  ·  {scene.run}")
    style.small_print(
        panel,
        f"{scene.about} {share:.0f}% of the batch of {len(scene.images)} is easy. Saliency is the "
        "share of this layer's attention that a token gets; a token comes from the partner where "
        "the partner's saliency is greater by more than ρ. A square of the image is where a token "
        f"stands{seen}.",
    )


def draw_gain(figure: Figure, scene: Scene, layer: HorizontalRecord) -> None:
    """The matrix that partners are assigned from, with the chosen ones marked.

    Args:
        figure: empty.
        scene: the batch.
        layer: one of the HTM layers of its recording.
    """
    easy = torch.nonzero(layer.easy.cpu())[:, 0].tolist()
    axes = figure.subplots()
    style.title(figure, f"Who gains what from whom at layer {layer.layer}  ·  {scene.run}")
    if not easy:
        cells.empty(axes, "No image of this batch is easy, so none gets a partner.")
        style.small_print(figure, scene.about)
        return
    gain = 100 * layer.gain.cpu().numpy()
    picture = axes.imshow(gain, cmap=MAP, vmin=0, vmax=max(float(gain.max()), 1e-9), aspect="equal")
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, pad=0.02)
    bar.set_label("gain: saliency won by taking tokens (% of attention)")
    bar.outline.set_visible(False)
    pairs = chosen_pairs(layer)
    _mark(axes, pairs)
    if gain.shape[1] <= _NUMBERS_UP_TO:
        _write_numbers(axes, gain, float(gain.max()))
    total = sum(gain[row, column] for row, column in pairs)
    _name_samples(axes, scene, easy)
    style.small_print(
        figure,
        f"{scene.about} Rows are the {len(easy)} easy images of the batch, columns all "
        f"{gain.shape[1]}. Framed: the partners, each used at most once, so that their gains sum "
        f"to the greatest possible total, here {total:.1f}%. A row without a frame gains nothing.",
    )


def chosen_pairs(layer: HorizontalRecord) -> list[tuple[int, int]]:
    """Rows and columns of the gain matrix at which a partner was chosen."""
    easy = torch.nonzero(layer.easy.cpu())[:, 0].tolist()
    return [
        (row, int(layer.partner[sample]))
        for row, sample in enumerate(easy)
        if bool(layer.mask[sample].any())
    ]


def gain_size(layer: HorizontalRecord) -> tuple[float, float]:
    """Width and height of the figure of `draw_gain`, inches."""
    rows, columns = layer.gain.shape
    side = 4.6 / max(columns, 6)
    return 7.0, max(2.6, min(6.4, side * (rows + 1.5)) + 1.5)


def most_mixed(layer: HorizontalRecord, labels: np.ndarray, count: int) -> list[int]:
    """Samples that took most tokens from a partner, of different classes as far as there are."""
    order = torch.argsort(layer.mask.sum(1), descending=True, stable=True).tolist()
    first = [i for n, i in enumerate(order) if labels[i] not in labels[order[:n]]]
    return (first + [index for index in order if index not in first])[:count]


def _difficulty(cell: Axes, scene: Scene, layer: HorizontalRecord, index: int) -> None:
    if layer.difficulty is None or scene.tau is None:
        cells.empty(cell, "no ScoreNet:\nall are mixed")
        return
    difficulty = layer.difficulty.cpu().numpy()
    easy = bool(layer.easy[index])
    colour = BLUE if easy else VERMILION
    cell.barh([0], [difficulty[index]], color=colour, height=0.42)
    cell.axvline(scene.tau, ymax=0.76, color=INK, linewidth=1.1, linestyle=(0, (3, 1.5)))
    high = max(float(difficulty.max()) * 1.12, scene.tau * 1.6)
    cell.set(xlim=(0, high), ylim=(-1, 1), yticks=[])
    cell.set_box_aspect(1)
    cell.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(3))
    text = f"{difficulty[index]:.3f}: {'easy' if easy else 'not easy'}"
    cell.text(0.04, 0.96, text, transform=cell.transAxes, fontsize=7, va="top", color=INK)
    cell.text(scene.tau, -0.9, f" τ = {scene.tau:g}", fontsize=6.5, va="bottom", color=INK)


def _colour_scale(panel: FigureBase, grid: Any, high: float) -> None:
    scale = ScalarMappable(Normalize(0, high), MAP)
    bar = panel.colorbar(
        scale, ax=list(grid[:, 2:5].flat), location="bottom", shrink=0.62, aspect=40, pad=0.015
    )
    bar.set_label("saliency of a token (% of attention)", fontsize=7.5)
    bar.outline.set_visible(False)


def _mark(axes: Axes, pairs: list[tuple[int, int]]) -> None:
    for row, column in pairs:
        for ink, width in ((GROUND, 4.0), (VERMILION, 2.2)):
            place = (column - 0.43, row - 0.43)
            axes.add_patch(Rectangle(place, 0.86, 0.86, fill=False, edgecolor=ink, linewidth=width))


def _write_numbers(axes: Axes, gain: np.ndarray, high: float) -> None:
    for (row, column), value in np.ndenumerate(gain):
        ink = GROUND if value < 0.55 * high else INK
        axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7.5, color=ink)


def _name_samples(axes: Axes, scene: Scene, easy: list[int]) -> None:
    count = len(scene.images)
    axes.set_ylabel("easy image that takes tokens")
    axes.set_xlabel("image that gives tokens")
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if count > _THUMBNAILS_UP_TO:
        axes.xaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(matplotlib.ticker.MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(
            lambda row, _: str(easy[round(row)]) if 0 <= round(row) < len(easy) else ""
        )
        return
    axes.set_xticks(range(count), [str(number) for number in range(count)])
    axes.set_yticks(range(len(easy)), [str(number) for number in easy])
    for column in range(count):
        _thumbnail(axes, scene.images[column], column, -1.05)
    for row, sample in enumerate(easy):
        _thumbnail(axes, scene.images[sample], -1.05, row)
    axes.set(xlim=(-1.55, count - 0.5), ylim=(len(easy) - 0.5, -1.55))


def _thumbnail(axes: Axes, image: np.ndarray, x: float, y: float) -> None:
    extent = (x - 0.44, x + 0.44, y + 0.44, y - 0.44)
    axes.imshow(image, extent=extent, interpolation="none", vmin=0, vmax=1, aspect="equal")
