"""A fixed scene and fixed curves, and small pictures of their figures to compare with.

`python -m tests.helpers.picture_cases` writes the references in tests/data/pictures/ again; look at
each before you commit it. They hold no text, so that fonts do not matter.

Dimensions: B = 4 images of 16 x 16 pixels, T = 16 patch tokens, C = 10 classes, H = 2 heads,
K = 3 remembered tokens.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from matplotlib.axis import Axis
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from PIL import Image
from torch import Tensor

from experiments.checkpoint import save_final_weights
from experiments.config.schema import RunConfig
from experiments.documents import figures as style
from experiments.models.build import build_model
from experiments.visualize import horizontal, vertical
from experiments.visualize.curves import Group, History, draw_curves
from experiments.visualize.recording import (
    AttentionRecord,
    HorizontalRecord,
    Recording,
    VerticalRecord,
)
from experiments.visualize.scenes import Scene
from tokenmixup import TokenMixupModel
from tokenmixup.functional import decide_mixing, mix_targets, saliency_gain, salient_positions

REFERENCES = Path(__file__).parent.parent / "data" / "pictures"
B, SIZE, T, CLASSES, HEADS, KAPPA, RHO, TAU = 4, 16, 16, 10, 2, 3, 0.01, 0.1


def fixed(*shape: int, shift: float = 0.0) -> np.ndarray:
    """Numbers between 0 and 1 without visible pattern, the same on every machine."""
    count = int(np.prod(shape))
    return (np.sin(np.arange(1, count + 1) * 12.9898 + shift) * 43.758 % 1).reshape(shape)


def smoothed_labels() -> Tensor:
    """(B, C), each image of its own class."""
    return torch.nn.functional.one_hot(torch.arange(B), CLASSES).double() * 0.9 + 0.01


def horizontal_record(layer: int = 1, below: HorizontalRecord | None = None) -> HorizontalRecord:
    """HTM at a layer, after that of a lower layer."""
    saliency = torch.from_numpy(fixed(B, T, shift=layer - 1.0))
    saliency = saliency / saliency.sum(1, keepdim=True)
    difficulty = torch.tensor([0.05, 0.09, 0.15, 0.07])
    easy = difficulty <= TAU
    # no label depends on another one: the parts are mixed as labels of B classes are
    targets, parts = smoothed_labels(), torch.eye(B, dtype=torch.float64)
    if below is not None:
        targets, parts = torch.from_numpy(below.targets), torch.from_numpy(below.parts)
    decision = decide_mixing(saliency, targets, easy, RHO)
    targets, parts = (mix_targets(one, saliency, decision) for one in (targets, parts))
    return HorizontalRecord(
        layer=layer,
        saliency=saliency.numpy(),
        difficulty=difficulty.numpy(),
        easy=easy.numpy(),
        gain=saliency_gain(saliency, easy, RHO).numpy(),
        partner=decision.partner.numpy(),
        mask=decision.mask.numpy(),
        targets=targets.numpy(),
        parts=parts.numpy(),
    )


def vertical_records(top: int = 2) -> tuple[list[VerticalRecord], AttentionRecord]:
    """VTM at a layer."""
    below = []
    for layer in range(top):
        saliency = torch.from_numpy(fixed(B, T, shift=1.0 + layer))
        positions = salient_positions(saliency, KAPPA)
        below.append(VerticalRecord(layer, saliency.numpy(), positions.numpy()))
    shares = fixed(B, HEADS, T, 1 + top, shift=5.0)
    shares[..., 0] += 4.0
    return below, AttentionRecord(top, shares / shares.sum(-1, keepdims=True))


def scene(**changes: Any) -> Scene:
    rows, columns = np.mgrid[0:SIZE, 0:SIZE] / SIZE
    waves = [np.stack([rows, columns, (rows * (n + 1)) % 1], axis=-1) for n in range(B)]
    below, attention = vertical_records()
    parts = {
        "images": np.stack(waves),
        "labels": np.arange(B),
        "label_notes": ("", "folder", "predicted", ""),
        "recording": Recording([horizontal_record()], below, [attention]),
        "run": "a run",
        "about": "Four fixed images.",
        "tau": TAU,
    }
    return Scene(**{**parts, **changes})


def deep_scene() -> Scene:
    """HTM at layers 1 and 3, VTM at layers 2 and 4."""
    first = horizontal_record()
    below, last = vertical_records(4)
    middle = vertical_records(2)[1]
    return scene(recording=Recording([first, horizontal_record(3, first)], below, [middle, last]))


def weights_of(config: RunConfig, classes: int, path: Path) -> TokenMixupModel:
    """Write weights that are no longer the initial ones, so that each image differs."""
    model = build_model(config, classes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_final_weights(path, model)
    return model


def history_of(seed: int, mixed: bool) -> History:
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
    return History(Path(f"run{seed}"), seed, "", rows)


def groups() -> list[Group]:
    return [
        Group("mixed (3 seeds)", [history_of(seed, True) for seed in (1, 2, 3)]),
        Group("plain", [history_of(4, False)]),
    ]


FIGURES: dict[str, Callable[[Scene], Figure]] = {
    "htm": lambda case: next(horizontal.figures(case))[1],
    "htm_gain": lambda case: horizontal.gain_figure(case, case.recording.horizontal[0]),
    "vtm": lambda case: next(vertical.figures(case))[1],
    "htm_second": lambda _: dict(horizontal.figures(deep_scene()))["htm_layer3"],
    "vtm_second": lambda _: dict(vertical.figures(deep_scene()))["vtm_layer4"],
    "vtm_attention": lambda case: vertical.attention_figure(case, case.recording.attention[0]),
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
