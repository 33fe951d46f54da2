"""Figures of Horizontal TokenMixup: what happened to each image, and who could gain from whom.

Dimensions: B batch, T patch tokens, E easy samples.
"""

from collections.abc import Iterator

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from experiments.documents import figures as style
from experiments.documents.figures import BLUE, EARLIER, GROUND, INK, MAP, VERMILION
from experiments.visualize import cells
from experiments.visualize.cells import heat, images_at, label_shares
from experiments.visualize.recording import HorizontalRecord, resized
from experiments.visualize.scenes import Scene

COLUMNS = (
    "image",
    "difficulty\nagainst τ",
    "saliency",
    "partner,\nits saliency",
    "token mask:\nfrom the partner",
    "mixed image",
    "mixed label",
)
_ROW_INCHES, _LINE_INCHES, _HEAD_INCHES, _FOOT_INCHES = 1.22, 0.13, 0.75, 0.95
_THUMBNAILS_UP_TO, _NUMBERS_UP_TO = 16, 12  # images, beyond which a cell is too small


def figures(scene: Scene) -> Iterator[tuple[str, Figure]]:
    """For each HTM layer, `htm_layerN` and `htm_layerN_gain`."""
    for layer in scene.recording.horizontal:
        figure = style.make_figure(rows_height(scene, layer, len(scene.images)))
        draw_rows(figure, scene, layer, list(range(len(scene.images))))
        yield f"htm_layer{layer.layer}", figure
        yield f"htm_layer{layer.layer}_gain", gain_figure(scene, layer)


def rows_height(scene: Scene, layer: HorizontalRecord, rows: int) -> float:
    """Inches that `draw_rows` needs."""
    row = _ROW_INCHES + _LINE_INCHES * scene.lines_below(layer.layer - 1)
    return row * rows + _HEAD_INCHES + _FOOT_INCHES


def draw_rows(panel: FigureBase, scene: Scene, layer: HorizontalRecord, chosen: list[int]) -> None:
    """One row per chosen image, one column per step of the method, in a figure or a part of one."""
    images, mixed = (images_at(scene, number) for number in (layer.layer - 1, layer.layer))
    given = resized(scene.recording.foreign(layer.layer - 1), layer.mask.shape[1])  # (B, T)
    taking = layer.mask.sum(1) > 0
    shown = [*chosen, *(layer.partner[index] for index in chosen if taking[index])]
    high = float(layer.saliency[shown].max())
    grid = panel.subplots(
        len(chosen), len(COLUMNS), squeeze=False, width_ratios=[1, 1, 1, 1, 1, 1, 1.25]
    )
    for row, index in zip(grid, chosen, strict=True):
        other, image, mask = int(layer.partner[index]), images[index], layer.mask[index]
        cells.show(row[0], image, scene.mixed_text(index, layer.layer - 1))
        cells.outline(row[0], given[index], len(image), EARLIER)
        _show_difficulty(row[1], scene, layer, index)
        cells.show(row[2], heat(image, layer.saliency[index], high))
        if taking[index]:
            picture = heat(images[other], layer.saliency[other], high)
            cells.show(row[3], picture, scene.mixed_text(other, layer.layer - 1))
            cells.show_chosen(row[4], image, mask, f"{mask.sum()} of {len(mask)} tokens")
            cells.show(row[5], mixed[index])
            cells.outline(row[5], given[index] & ~mask, len(image), EARLIER)
            cells.outline(row[5], mask, len(image))
        else:
            worthless = "no token of\nany partner is\nworth more"
            cells.empty(row[3], worthless if layer.easy[index] else "not easy,\nso not mixed")
            cells.empty(row[4], "")
            cells.show(row[5], image, "unchanged")
            cells.outline(row[5], given[index], len(image), EARLIER)
        cells.show_shares(row[6], label_shares(scene, layer, index))
    earlier = scene.recording.mixed_text(layer.layer - 1)
    first = f"image, mixed\nat {earlier}" if earlier else COLUMNS[0]
    for cell, text in zip(grid[0], (first, *COLUMNS[1:]), strict=True):
        # a fixed height, so that titles of one and two lines have the same baseline
        cell.set_title(text, fontsize=8, fontweight="bold", linespacing=1.25, pad=5, y=1.0)
    for column, unit in ((1, "CE / 10 (nats)"), (6, "share (%)")):
        for cell in grid[:-1, column]:
            cell.tick_params(labelbottom=False)
        grid[-1, column].set_xlabel(unit, fontsize=7.5, labelpad=2)
    text = "saliency of a token (% of attention)"
    cells.colour_scale(panel, list(grid[:, 2:5].flat), 100 * high, text, shrink=0.62, pad=0.015)
    seen = "; the layers before have mixed in what stands elsewhere" if layer.layer else ""
    style.title(panel, f"Horizontal TokenMixup at layer {layer.layer}  ·  {scene.run}")
    style.small_print(
        panel,
        f"{scene.about} {100 * layer.easy.mean():.0f}% of the batch of {len(scene.images)} is "
        "easy. Saliency is the share of this layer's attention that a token gets; a token comes "
        "from the partner where the partner's saliency is greater by more than ρ. A square of the "
        f"image is where a token stands{seen}."
        + (f" Pink: what it or its partner had taken from others at {earlier}." * bool(earlier)),
    )


def gain_figure(scene: Scene, layer: HorizontalRecord) -> Figure:
    """The matrix that partners are assigned from, with the chosen ones marked."""
    rows, columns = layer.gain.shape
    height = max(2.6, min(6.4, 4.6 / max(columns, 6) * (rows + 1.5)) + 1.5)
    figure = style.make_figure(height, width=7.0)
    axes = figure.subplots()
    style.title(figure, f"Who gains what from whom at layer {layer.layer}  ·  {scene.run}")
    if not rows:
        cells.empty(axes, "No image of this batch is easy, so none gets a partner.")
        style.small_print(figure, scene.about)
        return figure
    gain = 100 * layer.gain
    high = float(gain.max())
    picture = axes.imshow(gain, cmap=MAP, vmin=0, vmax=max(high, 1e-9), aspect="equal")
    bar = figure.colorbar(picture, ax=axes, shrink=0.7, pad=0.02)
    bar.set_label("gain: saliency won by taking tokens (% of attention)")
    bar.outline.set_visible(False)
    pairs = chosen_pairs(layer)
    for row, column in pairs:
        for ink, width in ((GROUND, 4.0), (VERMILION, 2.2)):
            place = (column - 0.43, row - 0.43)
            axes.add_patch(Rectangle(place, 0.86, 0.86, fill=False, edgecolor=ink, linewidth=width))
    if columns <= _NUMBERS_UP_TO:
        for (row, column), value in np.ndenumerate(gain):
            text = axes.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=7.5)
            text.set_color(GROUND if value < 0.55 * high else INK)
    _name_samples(axes, scene, layer)
    total = sum(gain[pair] for pair in pairs)
    earlier = scene.recording.mixed_text(layer.layer - 1)
    style.small_print(
        figure,
        f"{scene.about} Rows are the {rows} easy images of the batch, columns all {columns}. "
        "Framed: the partners, each used at most once, so that their gains sum to the greatest "
        f"possible total, here {total:.1f}%. A row without a frame gains nothing."
        + f" The images are shown as HTM had mixed them at {earlier}."
        * bool(earlier),
    )
    return figure


def chosen_pairs(layer: HorizontalRecord) -> list[tuple[int, int]]:
    """Rows and columns of the gain matrix at which a partner was chosen."""
    return [
        (row, int(layer.partner[sample]))
        for row, sample in enumerate(np.flatnonzero(layer.easy))
        if layer.mask[sample].any()
    ]


def most_mixed(layer: HorizontalRecord, labels: np.ndarray, count: int) -> list[int]:
    """The samples with most tokens from a partner, first one of each class, then further ones."""
    order = np.argsort(-layer.mask.sum(1), kind="stable").tolist()
    first = [i for n, i in enumerate(order) if labels[i] not in labels[order[:n]]]
    return (first + [index for index in order if index not in first])[:count]


def _show_difficulty(cell: Axes, scene: Scene, layer: HorizontalRecord, index: int) -> None:
    if layer.difficulty is None or scene.tau is None:
        cells.empty(cell, "no ScoreNet:\nall are mixed")
        return
    difficulty, easy = layer.difficulty, layer.easy[index]
    cell.barh([0], [difficulty[index]], color=BLUE if easy else VERMILION, height=0.42)
    cell.axvline(scene.tau, ymax=0.76, color=INK, linewidth=1.1, linestyle=(0, (3, 1.5)))
    high = max(float(difficulty.max()) * 1.12, scene.tau * 1.6)
    cell.set(xlim=(0, high), ylim=(-1, 1), yticks=[])
    cell.set_box_aspect(1)
    cell.xaxis.set_major_locator(MaxNLocator(3))
    text = f"{difficulty[index]:.3f}: {'easy' if easy else 'not easy'}"
    cell.text(0.04, 0.96, text, transform=cell.transAxes, fontsize=7, va="top", color=INK)
    cell.text(scene.tau, -0.9, f" τ = {scene.tau:g}", fontsize=6.5, va="bottom", color=INK)


def _name_samples(axes: Axes, scene: Scene, layer: HorizontalRecord) -> None:
    easy = np.flatnonzero(layer.easy).tolist()
    count = len(scene.images)
    images = images_at(scene, layer.layer - 1)
    axes.set_ylabel("easy image that takes tokens")
    axes.set_xlabel("image that gives tokens")
    axes.xaxis.set_label_position("top")
    axes.tick_params(length=0, labeltop=True, labelbottom=False)
    for spine in axes.spines.values():
        spine.set_visible(False)
    if count > _THUMBNAILS_UP_TO:
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        axes.yaxis.set_major_formatter(
            lambda row, _: str(easy[round(row)]) if 0 <= round(row) < len(easy) else ""
        )
        return
    axes.set_xticks(range(count), [str(number) for number in range(count)])
    axes.set_yticks(range(len(easy)), [str(number) for number in easy])
    for column in range(count):
        _thumbnail(axes, images[column], column, -1.05)
    for row, sample in enumerate(easy):
        _thumbnail(axes, images[sample], -1.05, row)
    axes.set(xlim=(-1.55, count - 0.5), ylim=(len(easy) - 0.5, -1.55))


def _thumbnail(axes: Axes, image: np.ndarray, x: float, y: float) -> None:
    extent = (x - 0.44, x + 0.44, y + 0.44, y - 0.44)
    axes.imshow(image, extent=extent, interpolation="none", vmin=0, vmax=1, aspect="equal")
