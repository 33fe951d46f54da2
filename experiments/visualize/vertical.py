"""Figures of Vertical TokenMixup: what the lower layers remember, and who attends to it.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, S side of the image in pixels,
H heads, K kappa, L layers below the VTM layer.
"""

from typing import Any

import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import Normalize
from matplotlib.figure import Figure, FigureBase
from matplotlib.patches import Patch

from experiments.documents import figures as style
from experiments.documents.figures import DASHES, GROUND, INK, MAP, PARTNER, SERIES, SOFT
from experiments.visualize import cells
from experiments.visualize.recording import AttentionRecord
from experiments.visualize.scenes import Scene
from experiments.visualize.tokens import heat

_ROW_INCHES, _HEAD_INCHES, _FOOT_INCHES = 1.3, 0.35, 0.95
MOST_COLUMNS = 8
_KEY_COLUMNS = 5
_PAPER = {"facecolor": GROUND, "edgecolor": "none", "pad": 1.2}  # behind a number


def tokens_height(attention: AttentionRecord) -> float:
    """Inches that `draw_tokens` needs."""
    return _ROW_INCHES * (2 + len(attention.sources)) + _HEAD_INCHES + _FOOT_INCHES


def draw_tokens(
    panel: FigureBase, scene: Scene, attention: AttentionRecord, chosen: list[int]
) -> None:
    """One column an image: its chosen tokens in each lower layer, and who attends to them.

    Args:
        panel: a figure, or a part of one.
        scene: the batch.
        attention: of one of the VTM layers of its recording.
        chosen: indices of the images to show.
    """
    grid = panel.subplots(2 + len(attention.sources), len(chosen), squeeze=False)
    kappa = scene.recording.vertical[0].positions.shape[1]
    by_source = 100 * attention.shares.mean((1, 2)).cpu().numpy()  # (B, 1 + L), per cent
    for column, index in enumerate(chosen):
        image = scene.images[index]
        cells.show(grid[0, column], image, scene.label_text(index))
        for row, source in enumerate(attention.sources, start=1):
            layer = scene.recording.vertical[source]
            tokens = np.zeros(layer.saliency.shape[1], dtype=bool)
            tokens[layer.positions[index].cpu().numpy()] = True
            share = f"{by_source[index, row]:.1f}%"
            cells.show_chosen(grid[row, column], image, tokens, PARTNER, share)
    patches = scene.recording.vertical[0].saliency.shape[1]
    looks = remembered_share(attention, patches)
    high = float(looks[chosen].max())
    for column, index in enumerate(chosen):
        below = f"{100 - by_source[index, 0]:.1f}%" if len(attention.sources) > 1 else ""
        cells.show(grid[-1, column], heat(scene.images[index], looks[index], high), below)
    names = ["image", *(f"layer {source}\nremembers" for source in attention.sources)]
    for cell, name in zip(grid[:, 0], [*names, f"layer {attention.layer}\nattends"], strict=True):
        cell.set_ylabel(name, fontsize=8, fontweight="bold", linespacing=1.25)
    bar = panel.colorbar(
        ScalarMappable(Normalize(0, 100 * high), MAP),
        ax=list(grid[-1]),
        location="bottom",
        shrink=0.5,
        aspect=40,
        pad=0.05,
    )
    bar.set_label(
        f"attention of each token of layer {attention.layer} to remembered tokens (%)", fontsize=7.5
    )
    bar.outline.set_visible(False)
    style.title(panel, f"Vertical TokenMixup at layer {attention.layer}  ·  {scene.run}")
    style.small_print(
        panel,
        f"{scene.about} Each lower layer remembers the κ = {kappa} tokens of its input that have "
        f"most of its attention (orange). Below them: the share of layer {attention.layer}'s "
        "attention that goes to them, mean over its queries and heads.",
    )


def draw_attention(figure: Figure, scene: Scene, attention: AttentionRecord) -> None:
    """How much of a VTM layer's attention goes to remembered tokens, head by head.

    Args:
        figure: empty.
        scene: the batch.
        attention: of one of the VTM layers of its recording.
    """
    panels = [("all queries", shares_by_head(attention))]
    if scene.class_token:
        panels.append(("class token's query", shares_by_head(attention, slice(1))))
    height = _key_height(1 + len(attention.sources))
    ratios = [height, figure.get_figheight() - height]
    top, body = figure.subfigures(2, 1, squeeze=False, height_ratios=ratios)[:, 0]
    axes = body.subplots(1, len(panels), squeeze=False, sharey=True, sharex=True)[0]
    uniform = 100 * sum(attention.tokens[1:]) / sum(attention.tokens)
    for axis, (name, shares) in zip(axes, panels, strict=True):
        _bars(axis, shares, attention)
        even = axis.axvline(uniform, color=INK, linestyle=DASHES[1], linewidth=1.1)
        axis.set_xlabel(f"share of layer {attention.layer}'s attention, {name} (%)")
    high = max(float(shares[:, 1:].sum(1).max()) for _, shares in panels)
    axes[0].set_xlim(0, 1.18 * max(high, uniform))
    heads = attention.shares.shape[1]
    axes[0].set_yticks(range(heads + 1), [*(f"head {head}" for head in range(heads)), "mean"])
    axes[0].invert_yaxis()
    axes[0].set_ylabel("head of the attention")
    handles: list[Artist] = [
        Patch(**_look(number), label=f"layer {source}'s tokens")
        for number, source in enumerate(attention.sources)
    ]
    even.set_label(f"all of them, if every token got the same: {uniform:.1f}%")
    top.legend(handles=[*handles, even], loc="lower left", ncols=_KEY_COLUMNS)
    style.title(top, f"Attention of layer {attention.layer} to remembered tokens  ·  {scene.run}")
    style.small_print(
        body,
        f"{scene.about} Mean over the {len(scene.images)} images; the rest of the attention goes "
        f"to the layer's own {attention.tokens[0]} tokens.",
    )


def attention_height(attention: AttentionRecord) -> float:
    """Inches of the figure of `draw_attention`."""
    return 1.15 + 0.27 * (attention.shares.shape[1] + 1) + _key_height(1 + len(attention.sources))


def tokens_width(images: int) -> float:
    """Inches of a figure of `draw_tokens` for so many images."""
    return min(style.WIDTH, 0.75 + 1.25 * max(images, 4))


def shares_by_head(attention: AttentionRecord, queries: slice = slice(None)) -> np.ndarray:
    """(H + 1, 1 + L), per cent: each head's shares, then their mean, over images and queries."""
    shares = attention.shares[:, :, queries].mean((0, 2))
    whole = np.concatenate([shares.cpu().numpy(), shares.mean(0, keepdim=True).cpu().numpy()])
    return 100 * whole


def remembered_share(attention: AttentionRecord, patches: int) -> np.ndarray:
    """(B, T): of the attention of each of the T patch tokens, the share to remembered tokens."""
    shares = attention.shares[:, :, -patches:, 1:].sum(-1).mean(1)  # prefix tokens come first
    return shares.cpu().numpy()


def spread_over_classes(labels: np.ndarray, count: int) -> list[int]:
    """The first image of each class, then further images."""
    first = [int(np.flatnonzero(labels == label)[0]) for label in np.unique(labels)]
    rest = [index for index in range(len(labels)) if index not in first]
    return sorted((first + rest)[:count])


def _key_height(entries: int) -> float:
    return 0.4 + 0.19 * -(-entries // _KEY_COLUMNS)


def _bars(axis: Axes, shares: np.ndarray, attention: AttentionRecord) -> None:
    left = np.zeros(len(shares))
    for number in range(len(attention.sources)):
        values = shares[:, 1 + number]
        axis.barh(range(len(shares)), values, left=left, height=0.66, **_look(number))
        left = left + values
    gap = 0.015 * float(left.max())
    for row, value in enumerate(left):
        axis.text(value + gap, row, f"{value:.1f}", va="center", fontsize=7, color=INK, bbox=_PAPER)
    axis.axhline(len(shares) - 1.5, color=SOFT, linewidth=0.6)


def _look(number: int) -> dict[str, Any]:
    hatches = ("", "///", "...", "+++")
    hatch = hatches[number // len(SERIES) % len(hatches)]
    return {"facecolor": SERIES[number % len(SERIES)], "hatch": hatch, "edgecolor": GROUND}
