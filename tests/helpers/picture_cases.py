"""A fixed scene and fixed curves, and small pictures of their figures to compare with.

`python tests/helpers/picture_cases.py` writes the references to tests/data/pictures/ anew; look at each
before you commit it. They hold no text, so that fonts do not matter.

Dimensions: B = 4 images of 16 x 16 pixels, T = 16 patch tokens, C = 10 classes, H = 2 heads,
K = 3 remembered tokens.
"""

import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent.parent))

import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image

from experiments.documents import figures as style
from experiments.visualize import horizontal, vertical
from experiments.visualize.curves import Group, Run
from experiments.visualize.recording import (
    AttentionRecord,
    HorizontalRecord,
    Recording,
    VerticalRecord,
)
from experiments.visualize.scenes import Scene
from experiments.visualize.training import draw_curves
from tokenmixup.functional import horizontal_mixup, saliency_gain, salient_positions

REFERENCES = Path(__file__).parent.parent / "data" / "pictures"
B, SIZE, T, CLASSES, HEADS, KAPPA, RHO, TAU = 4, 16, 16, 10, 2, 3, 0.01, 0.1


def fixed(*shape: int, shift: float = 0.0) -> np.ndarray:
    """Numbers between 0 and 1 without visible pattern, the same on every machine."""
    count = int(np.prod(shape))
    return (np.sin(np.arange(1, count + 1) * 12.9898 + shift) * 43.758 % 1).reshape(shape)


def horizontal_record() -> HorizontalRecord:
    saliency = torch.from_numpy(fixed(B, T))
    saliency = saliency / saliency.sum(1, keepdim=True)
    labels = torch.arange(B)
    targets = torch.nn.functional.one_hot(labels, CLASSES).double() * 0.9 + 0.01
    difficulty = torch.tensor([0.05, 0.09, 0.15, 0.07])
    easy = difficulty <= TAU
    result = horizontal_mixup(torch.zeros(B, T, 2), targets, saliency, easy, RHO)
    return HorizontalRecord(
        layer=1,
        saliency=saliency,
        difficulty=difficulty,
        easy=easy,
        gain=saliency_gain(saliency, easy, RHO),
        partner=result.partner,
        mask=result.mask,
        targets=result.targets,
    )


def vertical_records() -> tuple[list[VerticalRecord], AttentionRecord]:
    below = []
    for layer in (0, 1):
        saliency = torch.from_numpy(fixed(B, T, shift=1.0 + layer))
        below.append(VerticalRecord(layer, saliency, salient_positions(saliency, KAPPA)))
    shares = torch.from_numpy(fixed(B, HEADS, T, 3, shift=5.0)) + torch.tensor([4.0, 0.0, 0.0])
    shares = shares / shares.sum(-1, keepdim=True)
    return below, AttentionRecord(2, (0, 1), shares, (T, KAPPA, KAPPA))


def scene(**changes) -> Scene:
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    waves = [np.stack([rows, columns, (rows * (n + 1)) % 1], axis=-1) for n in range(B)]
    below, attention = vertical_records()
    parts = {
        "images": np.stack(waves),
        "labels": np.arange(B),
        "label_notes": ("", "folder", "predicted", ""),
        "recording": Recording([horizontal_record()], below, [attention]),
        "num_classes": CLASSES,
        "run": "a run",
        "about": "Four fixed images.",
        "tau": TAU,
    }
    return Scene(**{**parts, **changes})


def run_of(seed: int, mixed: bool) -> Run:
    """Six epochs of eight steps."""
    rows = []
    for epoch in range(1, 7):
        wave = 0.1 * float(fixed(6, shift=seed)[epoch - 1])
        train = {"split": "train", "epoch": epoch, "step": 8 * epoch, "steps": 8}
        train["loss"] = 2 / epoch + wave
        if mixed:
            train["htm/layer1/mixed_share"] = 0.1 * epoch + wave
            train["htm/layer1/tokens_mixed"] = epoch + wave
        rows.append(train)
        top1 = 100 - 50 / epoch + 10 * wave
        row = {"split": "validation", "epoch": epoch, "step": 8 * epoch}
        rows.append({**row, "loss": 1 / epoch + wave, "top1": top1})
    return Run(Path(f"run{seed}"), seed, rows, 8.0)


def groups() -> list[Group]:
    return [
        Group("mixed (3 seeds)", [run_of(seed, True) for seed in (1, 2, 3)]),
        Group("plain", [run_of(4, False)]),
    ]


def rows_figure(case: Scene) -> Figure:
    figure = style.make_figure(horizontal.rows_height(B))
    horizontal.draw_rows(figure, case, case.recording.horizontal[0], list(range(B)))
    return figure


def gain_figure(case: Scene) -> Figure:
    layer = case.recording.horizontal[0]
    width, height = horizontal.gain_size(layer)
    figure = style.make_figure(height, width)
    horizontal.draw_gain(figure, case, layer)
    return figure


def tokens_figure(case: Scene) -> Figure:
    attention = case.recording.attention[0]
    figure = style.make_figure(vertical.tokens_height(attention), vertical.tokens_width(B))
    vertical.draw_tokens(figure, case, attention, list(range(B)))
    return figure


def attention_figure(case: Scene) -> Figure:
    attention = case.recording.attention[0]
    figure = style.make_figure(vertical.attention_height(attention))
    vertical.draw_attention(figure, case, attention)
    return figure


FIGURES: dict[str, Callable[[Scene], Figure]] = {
    "htm": rows_figure,
    "htm_gain": gain_figure,
    "vtm": tokens_figure,
    "vtm_attention": attention_figure,
    "training_curves": lambda _: draw_curves(groups()),
}


def picture(name: str, case: Scene | None = None) -> np.ndarray:
    """A figure without any text, in few pixels, (height, width, 3)."""
    with style.house_style():
        figure = FIGURES[name](case or scene())
        canvas = FigureCanvasAgg(figure)
        figure.set_dpi(48)
        canvas.draw()
        for axis in figure.findobj(Axis):
            axis.set_tick_params(which="both", labelleft=False, labelright=False)
            axis.set_tick_params(which="both", labeltop=False, labelbottom=False)
        for text in figure.findobj(Text):
            text.set_visible(False)
        canvas.draw()
    return np.asarray(canvas.buffer_rgba())[..., :3].copy()


if __name__ == "__main__":
    REFERENCES.mkdir(parents=True, exist_ok=True)
    for name in FIGURES:
        Image.fromarray(picture(name)).save(REFERENCES / f"{name}.png", optimize=True)
        print(REFERENCES / f"{name}.png")
