"""Figures of Vertical TokenMixup: what the lower layers remember, and who attends to it.

Dimensions: B batch, N tokens, T patch tokens, H heads, K kappa, L layers below the VTM layer.
"""

from collections.abc import Iterator
from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch

from experiments.documents import figures as style
from experiments.documents.figures import DASHES, EARLIER, GROUND, INK, SERIES, SOFT
from experiments.visualize import cells
from experiments.visualize.cells import chosen_tokens, heat, images_at
from experiments.visualize.recording import AttentionRecord
from experiments.visualize.scenes import Scene

MOST_COLUMNS = 8
_ROW_INCHES, _LINE_INCHES, _HEAD_INCHES, _FOOT_INCHES = 1.3, 0.13, 0.35, 0.95
_KEY_COLUMNS = 5
_HATCHES = ("", "///", "...", "+++")
_PAPER = {"facecolor": GROUND, "edgecolor": "none", "pad": 1.2}  # behind a number


def figures(scene: Scene) -> Iterator[tuple[str, Figure]]:
    """For each VTM layer, `vtm_layerN`, `vtm_layerN_from8` … and `vtm_layerN_attention`."""
    count = len(scene.images)
    for attention in scene.recording.attention:
        name = f"vtm_layer{attention.layer}"
        for first in range(0, count, MOST_COLUMNS):
            chosen = list(range(first, min(count, first + MOST_COLUMNS)))
            width = min(style.WIDTH, 0.75 + 1.25 * max(len(chosen), 4))
            figure = style.make_figure(tokens_height(scene, attention), width)
            draw_tokens(figure, scene, attention, chosen)
            yield f"{name}_from{first}" if first else name, figure
        yield f"{name}_attention", attention_figure(scene, attention)


def tokens_height(scene: Scene, attention: AttentionRecord) -> float:
    """Inches that `draw_tokens` needs."""
    # of text below the first row and the last one, which has a share as well
    lines = scene.lines_below(-1) + 1 + scene.lines_below(attention.layer)
    rows = _ROW_INCHES * (2 + attention.layer) + _LINE_INCHES * lines
    return rows + _HEAD_INCHES + _FOOT_INCHES


def draw_tokens(
    panel: FigureBase, scene: Scene, attention: AttentionRecord, chosen: list[int]
) -> None:
    """One column per chosen image, in a figure or a part of one.

    A row for each lower layer shows the tokens that it remembers, the last row who attends to them,
    each on the images as HTM has mixed them up to that layer.
    """
    sources = scene.recording.vertical[: attention.layer]
    patches, kappa = sources[0].saliency.shape[1], sources[0].positions.shape[1]
    by_source = 100 * attention.shares.mean((1, 2))  # (B, 1 + L), per cent
    looks = remembered_share(attention, patches)
    high = float(looks[chosen].max())
    seen = [images_at(scene, layer) for layer in range(1 + attention.layer)]
    mixed = scene.recording.foreign(attention.layer).sum(1) > 0
    grid = panel.subplots(2 + len(sources), len(chosen), squeeze=False)
    for column, index in zip(grid.T, chosen, strict=True):
        image = scene.images[index]
        cells.show(column[0], image, scene.mixed_text(index, -1))
        for cell, layer, share in zip(column[1:-1], sources, by_source[index, 1:], strict=True):
            tokens = chosen_tokens(layer.positions[index], patches)
            _outline_mixed(cell, scene, layer.layer, index)
            cells.show_chosen(cell, seen[layer.layer][index], tokens, f"{share:.1f}%")
        below = [f"{100 - by_source[index, 0]:.1f}%"] if len(sources) > 1 else []
        if mixed[index]:
            below.append(scene.mixed_text(index, attention.layer))
        picture = heat(seen[attention.layer][index], looks[index], high)
        cells.show(column[-1], picture, "\n".join(below))
        _outline_mixed(column[-1], scene, attention.layer, index)
    names = [f"layer {source.layer}\nremembers" for source in sources]
    names = ["image", *names, f"layer {attention.layer}\nattends"]
    for cell, name in zip(grid[:, 0], names, strict=True):
        cell.set_ylabel(name, fontsize=8, fontweight="bold", linespacing=1.25)
    text = f"attention of each token of layer {attention.layer} to remembered tokens (%)"
    cells.colour_scale(panel, list(grid[-1]), 100 * high, text, shrink=0.5, pad=0.05)
    style.title(panel, f"Vertical TokenMixup at layer {attention.layer}  ·  {scene.run}")
    style.small_print(
        panel,
        f"{scene.about} Each lower layer remembers the κ = {kappa} tokens of its input that have "
        f"most of its attention (orange). Below them: the share of layer {attention.layer}'s "
        "attention that goes to them, mean over its queries and heads."
        + _about_mixing(scene, attention, mixed[chosen]),
    )


def _outline_mixed(cell: Axes, scene: Scene, layer: int, index: int) -> None:
    """A line around the tokens that came from another image up to a layer."""
    foreign = scene.recording.foreign(layer)[index]
    cells.outline(cell, foreign, len(scene.images[0]), EARLIER)


def _about_mixing(scene: Scene, attention: AttentionRecord, mixed: np.ndarray) -> str:
    """What HTM had done to the images before, where it had; `mixed` says which of them."""
    layers = scene.recording.mixed_text(attention.layer)
    if not layers:
        return ""
    return (
        f" HTM at {layers} mixed {mixed.sum()} of these {len(mixed)} images: from there on each is "
        "drawn as mixed. Outlined in pink: tokens, in the last row queries, from another image."
    )


def attention_figure(scene: Scene, attention: AttentionRecord) -> Figure:
    """How much of a VTM layer's attention goes to remembered tokens, head by head."""
    _, heads, own, entries = attention.shares.shape
    remembered = (entries - 1) * scene.recording.vertical[0].positions.shape[1]
    layers = scene.recording.mixed_text(attention.layer)
    mixed = np.count_nonzero(scene.recording.foreign(attention.layer).any(1))
    panels = [("all queries", shares_by_head(attention.shares))]
    if scene.class_token:
        panels.append(("class token's query", shares_by_head(attention.shares[:, :, :1])))
    key_height = 0.4 + 0.19 * -(-entries // _KEY_COLUMNS)
    height = 1.15 + 0.27 * (heads + 1) + key_height
    figure = style.make_figure(height)
    ratios = [key_height, height - key_height]
    top, body = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios)[:, 0]
    axes = body.subplots(1, len(panels), squeeze=False, sharey=True, sharex=True)[0]
    uniform = 100 * remembered / (own + remembered)
    for axis, (name, shares) in zip(axes, panels, strict=True):
        _bars(axis, shares[:, 1:])
        even = axis.axvline(uniform, color=INK, linestyle=DASHES[1], linewidth=1.1)
        axis.set_xlabel(f"share of layer {attention.layer}'s attention, {name} (%)")
    high = max(float(shares[:, 1:].sum(1).max()) for _, shares in panels)
    axes[0].set_xlim(0, 1.18 * max(high, uniform))
    axes[0].set_yticks(range(heads + 1), [*(f"head {head}" for head in range(heads)), "mean"])
    axes[0].invert_yaxis()
    axes[0].set_ylabel("head of the attention")
    handles: list[Artist] = [
        Patch(**_look(number), label=f"layer {number}'s tokens")
        for number in range(attention.layer)
    ]
    even.set_label(f"all of them, if every token got the same: {uniform:.1f}%")
    top.legend(handles=[*handles, even], loc="lower left", ncols=_KEY_COLUMNS)
    style.title(top, f"Attention of layer {attention.layer} to remembered tokens  ·  {scene.run}")
    style.small_print(
        body,
        f"{scene.about} Mean over the {len(scene.images)} images; the rest of the attention goes "
        f"to the layer's own {own} tokens."
        + (f" HTM at {layers} has mixed {mixed} of the images before." if layers else ""),
    )
    return figure


def shares_by_head(shares: np.ndarray) -> np.ndarray:
    """(B, H, N, 1 + L) -> (H + 1, 1 + L), per cent: each head's mean shares, then their mean."""
    by_head = shares.mean((0, 2))
    return 100 * np.concatenate([by_head, by_head.mean(0, keepdims=True)])


def remembered_share(attention: AttentionRecord, patches: int) -> np.ndarray:
    """(B, T): of the attention of each of the T patch tokens, the share to remembered tokens."""
    return attention.shares[:, :, -patches:, 1:].sum(-1).mean(1)  # after the prefix tokens


def spread_over_classes(labels: np.ndarray, count: int) -> list[int]:
    """The first image of each class, then further images."""
    first = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]
    rest = [index for index in range(len(labels)) if index not in first]
    return sorted((first + rest)[:count])


def _bars(axis: Axes, shares: np.ndarray) -> None:
    """Stacked bars of each head's shares (H + 1, L), and their sums as numbers."""
    left = np.zeros(len(shares))
    for number, values in enumerate(shares.T):
        axis.barh(range(len(shares)), values, left=left, height=0.66, **_look(number))
        left = left + values
    gap = 0.015 * float(left.max())
    for row, value in enumerate(left):
        axis.text(value + gap, row, f"{value:.1f}", va="center", fontsize=7, color=INK, bbox=_PAPER)
    axis.axhline(len(shares) - 1.5, color=SOFT, linewidth=0.6)


def _look(number: int) -> dict[str, Any]:
    """Style of a lower layer's bars; hatches distinguish layers that share a colour."""
    hatch = _HATCHES[number // len(SERIES) % len(_HATCHES)]
    return {"facecolor": SERIES[number % len(SERIES)], "hatch": hatch, "edgecolor": GROUND}
