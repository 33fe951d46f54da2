"""A GIF of the method's steps on the image of a batch that takes most tokens.

Dimensions: T patch tokens, S side of the image in pixels, L layers below the VTM layer.
"""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from experiments.documents import figures as style
from experiments.documents.figures import EARLIER, GROUND, INK, OWN, PARTNER
from experiments.errors import DataError
from experiments.files import atomic_file
from experiments.visualize.cells import (
    Share,
    chosen_tokens,
    heat,
    images_at,
    label_shares,
    outlines,
    spotlight,
    token_grid,
)
from experiments.visualize.horizontal import most_mixed
from experiments.visualize.recording import AttentionRecord, HorizontalRecord
from experiments.visualize.scenes import Scene
from experiments.visualize.vertical import remembered_share

NAME = "tokenmixup.gif"
_COLOURS = (GROUND, INK, OWN, PARTNER, EARLIER)
_MOVES = 9  # frames in which tokens travel
_INCHES, _DPI = (7.2, 4.3), 100
_STRIP = 12  # images of the batch in the upper row
_LEFT, _RIGHT = 0.0, 1.65  # left edges of the two large images, in units of their side
_BARS, _BAR_LENGTH = 1.25, 1.2


@dataclass(frozen=True)
class Step:
    """What one frame shows."""

    title: str
    text: str
    seconds: float
    sample: int
    """Index of the image within the batch."""
    left: np.ndarray
    """(S, S, 3)."""
    left_name: str
    framed: np.ndarray | None = None
    """Tokens (T,) of the left image that a line surrounds."""
    partner: int | None = None
    right: np.ndarray | None = None
    """(S, S, 3)."""
    right_name: str = ""
    moving: tuple[np.ndarray, float] | None = None
    """Patches (S, S, 4), and the fraction of the way from right to left that they have moved."""
    bars: tuple[Share, ...] = ()
    limit: float | None = None
    """Where a line crosses the bars, in the unit of their shares."""


def write_animation(scene: Scene, folder: Path) -> Path:
    """Write `tokenmixup.gif`, and give its path."""
    steps = steps_of(scene)
    folder.mkdir(parents=True, exist_ok=True)
    with style.house_style():
        frames = [_frame(scene, step) for step in steps]
    # one palette for all frames, so that unchanged parts are equal and stored once
    width, height = frames[0].size
    whole = Image.new("RGB", (width, height * len(frames)), GROUND)
    for number, frame in enumerate(frames):
        whole.paste(frame, (0, height * number))
    # lines are few pixels: without an entry of their own, their colours would be lost
    own = [round(255 * part) for name in _COLOURS for part in to_rgb(name)]
    common = whole.quantize(256 - len(_COLOURS), dither=Image.Dither.NONE).getpalette() or []
    palette = Image.new("P", (1, 1))
    palette.putpalette([*common, *own])
    first, *others = (frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames)
    path = folder / NAME
    with atomic_file(path) as file:
        first.save(
            file,
            format="GIF",
            save_all=True,
            append_images=others,
            duration=[round(1000 * step.seconds) for step in steps],
            loop=0,
            optimize=True,
        )
    return path


# What the frames show


def steps_of(scene: Scene) -> list[Step]:
    """HTM's first layer, then VTM's last.

    Raises:
        DataError: no image of the batch was mixed, and the model has no VTM.
    """
    recording = scene.recording
    layer = recording.horizontal[0] if recording.horizontal else None
    sample = most_mixed(layer, scene.labels, 1)[0] if layer is not None else 0
    base = Step("", "", 2.2, sample, scene.images[sample], scene.label_text(sample))
    steps: list[Step] = []
    if layer is not None and layer.mask[sample].any():
        steps += _horizontal(scene, layer, base)
    if recording.attention:
        steps += _vertical(scene, recording.attention[-1], base)
    if not steps:
        raise DataError(
            f"{scene.run}: nothing to animate: no image of this batch was mixed (is the model "
            "trained, and tau large enough?) and the config has no vertical section"
        )
    return steps


def _horizontal(scene: Scene, layer: HorizontalRecord, base: Step) -> Iterator[Step]:
    sample, image = base.sample, base.left
    other, chosen = int(layer.partner[sample]), layer.mask[sample]
    donor = scene.images[other]
    alone = replace(base, title=f"Horizontal TokenMixup, layer {layer.layer}")
    yield replace(alone, text="One image of the batch.", seconds=1.6)

    if layer.difficulty is not None and scene.tau is not None:
        value = float(layer.difficulty[sample])
        text = f"1  Difficulty {value:.3f} is at most τ = {scene.tau:g}: the image is easy."
        bar = Share(f"difficulty {value:.3f} (CE / 10, nats)", value, OWN)
        yield replace(alone, text=text, bars=(bar,), limit=scene.tau)

    high = float(layer.saliency[[sample, other]].max())
    seen = heat(image, layer.saliency[sample], high)
    text = "2  Saliency: how much attention each token gets."
    yield replace(alone, text=text, left=seen)

    pair = replace(alone, partner=other, right=donor, right_name=scene.label_text(other))
    gain = 100 * layer.gain[layer.easy[:sample].sum(), other]  # rows are the easy samples
    text = f"3  Partner: best for the batch as a whole; here {gain:.0f}% of attention is gained."
    donor_seen = heat(donor, layer.saliency[other], high)
    yield replace(pair, text=text, seconds=2.6, left=seen, right=donor_seen)

    text = f"4  Mask: the {chosen.sum()} of {len(chosen)} tokens more salient there by more than ρ."
    left, right = (spotlight(picture, chosen, PARTNER) for picture in (image, donor))
    yield replace(pair, text=text, seconds=2.4, left=left, right=right)

    mixing = replace(pair, text="5  Mix: these tokens replace those at the same places.")
    patches = np.dstack([donor, token_grid(chosen, len(donor))])
    for part in np.linspace(0, 1, _MOVES):
        eased = float(part * part * (3 - 2 * part))
        yield replace(mixing, seconds=0.5 if part == 0 else 0.09, moving=(patches, eased))
    mixing = replace(_as_mixed(scene, mixing, layer.layer), framed=None)
    yield replace(mixing, seconds=1.6)

    bars = tuple(label_shares(scene, layer, sample))
    text = "6  Label: mixed by the saliency that came from each."
    yield replace(mixing, text=text, seconds=3.0, right=None, bars=bars)


def _vertical(scene: Scene, attention: AttentionRecord, base: Step) -> Iterator[Step]:
    sample, number = base.sample, attention.layer
    base = replace(base, title=f"Vertical TokenMixup, layer {number}")
    sources = scene.recording.vertical[:number]
    patches = sources[0].saliency.shape[1]
    for source in sources:
        positions = source.positions[sample]
        text = f"Layer {source.layer} remembers its {len(positions)} most salient tokens."
        step = _as_mixed(scene, base, source.layer)
        left = spotlight(step.left, chosen_tokens(positions, patches), PARTNER)
        yield replace(step, text=text, left=left)
    looks = remembered_share(attention, patches)[sample]
    own, *others = (float(share) for share in attention.shares[sample].mean((0, 1)))  # 1 + L
    bars = [Share(f"own tokens of layer {number}", own, OWN)]
    for source, share in zip(sources, others, strict=True):
        bars.append(Share(f"remembered by layer {source.layer}", share, PARTNER))
    step = _as_mixed(scene, base, number)
    pink = "" if step.framed is None else "; pink: queries from a partner"
    text = f"Layer {number} attends to them beside its own tokens (bright: more{pink})."
    left = heat(step.left, looks, float(looks.max()))
    yield replace(step, text=text, seconds=3.2, left=left, bars=tuple(bars))


def _as_mixed(scene: Scene, step: Step, layer: int) -> Step:
    """A step whose image is that of a layer, after HTM."""
    sample, mixed = step.sample, scene.recording.foreign(layer)[step.sample]
    if not mixed.any():
        return step
    name = f"{scene.label_text(sample)} with {', '.join(scene.givers(sample, layer))}"
    left = images_at(scene, layer)[sample]
    return replace(step, left=left, left_name=name, framed=mixed)


# How a frame is drawn


def _frame(scene: Scene, step: Step) -> Image.Image:
    figure = Figure(figsize=_INCHES, dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    figure.text(0.03, 0.94, f"{step.title}  ·  {scene.run}", fontsize=11, fontweight="bold")
    figure.text(0.03, 0.875, step.text, fontsize=10, color=INK)
    _draw_batch(figure.add_axes((0.03, 0.68, 0.94, 0.16)), scene, step)
    axes = figure.add_axes((0.03, 0.02, 0.94, 0.64))
    _draw_image(axes, step.left, _LEFT, step.left_name, OWN)
    if step.framed is not None:
        size = len(step.left)
        lines = [
            [(_LEFT + (x + 0.5) / size, 1 - (y + 0.5) / size) for x, y in line]
            for line in outlines(step.framed, size)
        ]
        axes.add_collection(LineCollection(lines, colors=EARLIER, linewidths=2.0, zorder=3))
    if step.right is not None:
        _draw_image(axes, step.right, _RIGHT, step.right_name, PARTNER)
    if step.moving is not None:
        patches, way = step.moving
        x = _RIGHT + way * (_LEFT - _RIGHT)
        axes.imshow(patches, extent=(x, x + 1, 0, 1), interpolation="none", zorder=3)
    _draw_bars(axes, step)
    axes.set(xlim=(-0.02, 2.95), ylim=(-0.16, 1.02), aspect="equal", anchor="W")
    axes.axis("off")
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _draw_batch(axes: Axes, scene: Scene, step: Step) -> None:
    """The images of the batch in a row, with the sample and its partner framed."""
    shown = list(range(min(_STRIP, len(scene.images))))
    for number in (step.sample, step.partner):
        if number is not None and number not in shown:
            others = [n for n in shown if n not in (step.sample, step.partner)]
            shown[shown.index(max(others))] = number
    for place, number in enumerate(shown):
        extent = (place + 0.04, place + 0.96, 0.04, 0.96)
        axes.imshow(scene.images[number], extent=extent, interpolation="none", vmin=0, vmax=1)
        colour = {step.sample: OWN, step.partner: PARTNER}.get(number)
        if colour is not None:
            frame = Rectangle((place + 0.02, 0.02), 0.96, 0.96, fill=False, clip_on=False)
            frame.set(edgecolor=colour, linewidth=3.0)
            axes.add_patch(frame)
    axes.set(xlim=(0, _STRIP), ylim=(0, 1), aspect="equal", anchor="W")
    axes.axis("off")


def _draw_image(axes: Axes, image: np.ndarray, x: float, name: str, colour: str) -> None:
    axes.imshow(image, extent=(x, x + 1, 0, 1), interpolation="none", vmin=0, vmax=1)
    frame = Rectangle((x, 0), 1, 1, fill=False, edgecolor=colour, linewidth=2.5, zorder=2)
    axes.add_patch(frame)
    axes.text(x, -0.04, name, fontsize=9.5, va="top", color=INK)


def _draw_bars(axes: Axes, step: Step) -> None:
    highest = max([bar.share for bar in step.bars] + [1.6 * (step.limit or 0)], default=0)
    gap = min(0.24, 0.9 / max(1, len(step.bars)))
    for row, bar in enumerate(step.bars):
        y, length = 0.8 - gap * row, _BAR_LENGTH * bar.share / highest
        axes.add_patch(Rectangle((_BARS, y - 0.07), length, 0.1, color=bar.colour))
        axes.text(_BARS, y + 0.05, bar.name, fontsize=9, color=INK)
        if not step.limit:
            value = f"{100 * bar.share:.0f}%"
            axes.text(_BARS + 0.02 + length, y - 0.02, value, fontsize=9, va="center", color=INK)
    if step.limit:
        x = _BARS + _BAR_LENGTH * step.limit / highest
        axes.plot([x, x], [0.67, 0.83], color=INK, linestyle="--", linewidth=1.5)
        axes.text(x, 0.64, f"τ = {step.limit:g}", fontsize=9, ha="center", va="top", color=INK)
