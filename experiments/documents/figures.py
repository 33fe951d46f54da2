"""How every figure looks, and how it is written: the same input gives the same bytes.

A figure brings its own white ground and dark ink, so that it reads the same on paper, on a light
page and on a dark one. Colours are Okabe and Ito's and the map is cividis, which stay apart for
colour-blind readers and in grey.
"""

import textwrap
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import matplotlib
import matplotlib.style
from matplotlib.figure import Figure, FigureBase

from experiments.files import atomic_file

INK, SOFT, GRID, GROUND = "#1a1a1a", "#4d4d4d", "#e2e2e2", "#ffffff"
BLUE, ORANGE, GREEN, PINK = "#0072B2", "#E69F00", "#009E73", "#CC79A7"
VERMILION, SKY, BLACK = "#D55E00", "#56B4E9", "#000000"
SERIES = (BLUE, VERMILION, GREEN, PINK, ORANGE, SKY, BLACK)
DASHES = ("-", "--", "-.", ":")
OWN, PARTNER, EARLIER, REST = BLUE, ORANGE, PINK, "#999999"
MAP = "cividis"

WIDTH = 9.2
"""Inches of every figure: at the 830 pixels of a README its 8-point text is 10 pixels high."""
DPI = 130

_SETTINGS: dict[str, Any] = {
    "figure.facecolor": GROUND,
    "savefig.facecolor": GROUND,
    "axes.facecolor": GROUND,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": SOFT,
    "xtick.color": SOFT,
    "ytick.color": SOFT,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 8,
    "axes.labelsize": 8,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 8,
    "legend.frameon": False,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 8,
    "svg.fonttype": "path",  # reads the same where the font is missing
    "svg.hashsalt": "tokenmixup",  # names inside the file, otherwise random
    "image.composite_image": False,
}


@contextmanager
def house_style() -> Iterator[None]:
    """Draw and write in here; a person's own matplotlib settings stay out."""
    with matplotlib.rc_context(), matplotlib.style.context(["default", _SETTINGS]):
        yield


def make_figure(height: float, width: float = WIDTH) -> Figure:
    """An empty figure, inches."""
    return Figure(figsize=(width, height), layout="constrained")


def title(panel: FigureBase, text: str) -> None:
    """A title above a figure or a part of one."""
    panel.suptitle(text, fontsize=10.5, fontweight="bold", x=0.008, ha="left")


def small_print(panel: FigureBase, text: str) -> None:
    """What was run and how to read it, below a figure or a part of one."""
    figure = panel.get_figure(root=True)
    assert figure is not None
    lines = "\n".join(textwrap.wrap(text, int(17 * figure.get_figwidth())))  # letters an inch
    panel.supxlabel(lines, fontsize=7, color=SOFT, x=0.008, ha="left", linespacing=1.35)


def write(figure: Figure, stem: Path, caption: str) -> list[Path]:
    """Write `STEM.png` and `STEM.svg`, each whole or not at all, and give their paths.

    Args:
        figure: drawn in `house_style`, which must still be on.
        stem: path without an ending; its folder is made.
        caption: what the files say of themselves to a program that reads them.
    """
    stem.parent.mkdir(parents=True, exist_ok=True)
    png, svg = (stem.with_name(f"{stem.name}.{ending}") for ending in ("png", "svg"))
    with atomic_file(png) as file:
        figure.savefig(
            file,
            format="png",
            dpi=DPI,
            metadata={"Software": None, "Title": caption},
            pil_kwargs={"optimize": True},
        )
    with atomic_file(svg) as file:
        # without date and version, which would make each run's file another one
        nothing = {"Date": None, "Creator": None}
        figure.savefig(file, format="svg", metadata={**nothing, "Title": caption})
    return [png, svg]
