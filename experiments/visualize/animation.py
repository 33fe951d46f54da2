"""The storyboard drawn frame by frame, as a GIF."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from experiments.documents import figures as style
from experiments.documents.figures import GROUND, INK, OWN, PARTNER
from experiments.files import atomic_file
from experiments.visualize.scenes import Scene
from experiments.visualize.storyboard import Step, steps_of

NAME = "tokenmixup.gif"
_INCHES, _DPI = (7.2, 4.3), 100
_STRIP = 12  # images of the batch that fit above
_LEFT, _RIGHT = 0.0, 1.65  # where the two large images begin, in sides of one
_BARS, _BAR_LENGTH = 1.25, 1.2


def write_animation(scene: Scene, folder: Path) -> Path:
    """Write `tokenmixup.gif`, and give its path.

    Raises:
        DataError: no image of the batch was mixed and the model has no VTM.
    """
    steps = steps_of(scene)
    folder.mkdir(parents=True, exist_ok=True)
    with style.house_style():
        frames = [_frame(scene, step) for step in steps]
    palette = _common_palette(frames)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path = folder / NAME
    with atomic_file(path) as file:
        indexed[0].save(
            file,
            format="GIF",
            save_all=True,
            append_images=indexed[1:],
            duration=[round(1000 * step.seconds) for step in steps],
            loop=0,
            optimize=True,
        )
    return path


def _frame(scene: Scene, step: Step) -> Image.Image:
    figure = Figure(figsize=_INCHES, dpi=_DPI)
    canvas = FigureCanvasAgg(figure)
    figure.text(0.03, 0.94, f"{step.title}  ·  {scene.run}", fontsize=11, fontweight="bold")
    figure.text(0.03, 0.875, step.text, fontsize=10, color=INK)
    _strip(figure, scene, step)
    axes = figure.add_axes((0.03, 0.02, 0.94, 0.64))
    _large(axes, step)
    canvas.draw()
    return Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3].copy())


def _strip(figure: Figure, scene: Scene, step: Step) -> None:
    count = min(_STRIP, len(scene.images))
    shown = list(range(count))
    for number in (step.sample, step.partner):
        if number is not None and number not in shown:
            others = [n for n in shown if n not in (step.sample, step.partner)]
            shown[shown.index(max(others))] = number
    axes = figure.add_axes((0.03, 0.68, 0.94, 0.16))
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


def _large(axes: Axes, step: Step) -> None:
    _picture(axes, step.left, _LEFT, step.left_name, OWN)
    if step.right is not None:
        _picture(axes, step.right, _RIGHT, step.right_name, PARTNER)
    if step.moving is not None:
        patches, way = step.moving
        x = _RIGHT + way * (_LEFT - _RIGHT)
        axes.imshow(patches, extent=(x, x + 1, 0, 1), interpolation="none", zorder=3)
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
    axes.set(xlim=(-0.02, 2.95), ylim=(-0.16, 1.02), aspect="equal", anchor="W")
    axes.axis("off")


def _picture(axes: Axes, image: np.ndarray, x: float, name: str, colour: str) -> None:
    axes.imshow(image, extent=(x, x + 1, 0, 1), interpolation="none", vmin=0, vmax=1)
    frame = Rectangle((x, 0), 1, 1, fill=False, edgecolor=colour, linewidth=2.5, zorder=2)
    axes.add_patch(frame)
    axes.text(x + 0.5, -0.04, name, fontsize=9.5, ha="center", va="top", color=INK)


def _common_palette(frames: list[Image.Image]) -> Image.Image:
    """One palette for all frames, so that what stays is the same in each and need not be stored."""
    width, height = frames[0].size
    whole = Image.new("RGB", (width, height * len(frames)), GROUND)
    for number, frame in enumerate(frames):
        whole.paste(frame, (0, height * number))
    return whole.quantize(256, dither=Image.Dither.NONE)
