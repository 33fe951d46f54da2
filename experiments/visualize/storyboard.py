"""The method's steps in order, on the image of a batch that takes most tokens: what a GIF shows.

Dimensions: T patch tokens, S side of the image in pixels, L layers below the VTM layer.
"""

from dataclasses import dataclass, replace

import numpy as np
import torch

from experiments.documents.figures import OWN, PARTNER, REST
from experiments.errors import DataError
from experiments.visualize.cells import label_shares
from experiments.visualize.horizontal import most_mixed
from experiments.visualize.recording import AttentionRecord, HorizontalRecord
from experiments.visualize.scenes import Scene
from experiments.visualize.tokens import heat, mix_patches, spotlight, token_grid
from experiments.visualize.vertical import remembered_share

_MOVES = 9
"""Frames in which tokens travel."""


@dataclass(frozen=True)
class Bar:
    """One bar of a step: a share of something."""

    name: str
    share: float
    colour: str


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
    partner: int | None = None
    right: np.ndarray | None = None
    """(S, S, 3)."""
    right_name: str = ""
    moving: tuple[np.ndarray, float] | None = None
    """Patches (S, S, 4), and how much of the way from right to left they have gone."""
    bars: tuple[Bar, ...] = ()
    limit: float | None = None
    """Where a line crosses the bars, in the unit of their shares."""


def steps_of(scene: Scene) -> list[Step]:
    """HTM's first layer, then VTM's last.

    Raises:
        DataError: no image of the batch was mixed, and the model has no VTM.
    """
    recording = scene.recording
    steps: list[Step] = []
    sample = 0
    if recording.horizontal:
        layer = recording.horizontal[0]
        sample = most_mixed(layer, scene.labels, 1)[0]
        if bool(layer.mask[sample].any()):
            steps += _horizontal(scene, layer, sample)
    if recording.attention:
        steps += _vertical(scene, recording.attention[-1], sample)
    if not steps:
        raise DataError(
            f"{scene.run}: nothing to animate: no image of this batch was mixed (is the model "
            "trained, and tau large enough?) and the config has no vertical section"
        )
    return steps


def _horizontal(scene: Scene, layer: HorizontalRecord, sample: int) -> list[Step]:
    saliency, mask = layer.saliency.cpu().numpy(), layer.mask.cpu().numpy()
    partners = layer.partner.cpu().numpy()
    other, image = int(partners[sample]), scene.images[sample]
    donor, chosen = scene.images[other], mask[sample]
    alone = Step(
        title=f"Horizontal TokenMixup, layer {layer.layer}",
        text="One image of the batch.",
        seconds=1.6,
        sample=sample,
        left=image,
        left_name=scene.label_text(sample),
    )
    pair = replace(alone, partner=other, right=donor, right_name=scene.label_text(other))
    steps = [alone]

    if layer.difficulty is not None and scene.tau is not None:
        value = float(layer.difficulty[sample])
        text = f"1  Difficulty {value:.3f} is at most τ = {scene.tau:g}: the image is easy."
        bars = (Bar(f"difficulty {value:.3f} (CE / 10, nats)", value, OWN),)
        steps.append(replace(alone, text=text, seconds=2.2, bars=bars, limit=scene.tau))

    high = float(saliency[[sample, other]].max())
    seen = heat(image, saliency[sample], high)
    text = "2  Saliency: how much attention each token gets."
    steps.append(replace(alone, text=text, seconds=2.2, left=seen))

    row = torch.nonzero(layer.easy.cpu())[:, 0].tolist().index(sample)
    gain = 100 * float(layer.gain[row, other])
    text = f"3  Partner: best for the batch as a whole; here {gain:.0f}% of attention is gained."
    donor_seen = heat(donor, saliency[other], high)
    steps.append(replace(pair, text=text, seconds=2.6, left=seen, right=donor_seen))

    taken = f"{int(chosen.sum())} of {len(chosen)} tokens"
    text = f"4  Mask: the {taken} more salient there by more than ρ."
    lit = {"left": spotlight(image, chosen, PARTNER), "right": spotlight(donor, chosen, PARTNER)}
    steps.append(replace(pair, text=text, seconds=2.4, left=lit["left"], right=lit["right"]))

    text = "5  Mix: these tokens replace those at the same places."
    patches = np.dstack([donor, token_grid(chosen, len(donor))])
    for part in np.linspace(0, 1, _MOVES):
        eased = float(part * part * (3 - 2 * part))
        seconds = 0.5 if part == 0 else 0.09
        steps.append(replace(pair, text=text, seconds=seconds, moving=(patches, eased)))
    mixed = mix_patches(scene.images, partners, mask)[sample]
    steps.append(replace(pair, text=text, seconds=1.6, left=mixed, left_name="mixed"))

    own, donated = int(scene.labels[sample]), int(scene.labels[other])
    colours = {donated: PARTNER, own: OWN, None: REST}
    shares = tuple(
        Bar("others" if label is None else scene.class_text(label), share, colours[label])
        for label, share in label_shares(layer.targets[sample].cpu().numpy(), own, donated)
    )
    text = "6  Label: mixed by the saliency that came from each."
    last = replace(steps[-1], text=text, seconds=3.0, right=None, bars=shares)
    return [*steps, last]


def _vertical(scene: Scene, attention: AttentionRecord, sample: int) -> list[Step]:
    image = scene.images[sample]
    base = Step(
        title=f"Vertical TokenMixup, layer {attention.layer}",
        text="",
        seconds=2.2,
        sample=sample,
        left=image,
        left_name=scene.label_text(sample),
    )
    steps = []
    for source in attention.sources:
        layer = scene.recording.vertical[source]
        chosen = np.zeros(layer.saliency.shape[1], dtype=bool)
        chosen[layer.positions[sample].cpu().numpy()] = True
        text = f"Layer {source} remembers its {int(chosen.sum())} most salient tokens."
        steps.append(replace(base, text=text, left=spotlight(image, chosen, PARTNER)))
    patches = scene.recording.vertical[0].saliency.shape[1]
    looks = remembered_share(attention, patches)[sample]
    shares = attention.shares[sample].mean((0, 1)).cpu().numpy()  # (1 + L)
    bars = [Bar(f"own tokens of layer {attention.layer}", float(shares[0]), OWN)]
    for source, share in zip(attention.sources, shares[1:], strict=True):
        bars.append(Bar(f"remembered by layer {source}", float(share), PARTNER))
    text = f"Layer {attention.layer} attends to them beside its own tokens (bright: more)."
    left = heat(image, looks, float(looks.max()))
    return [*steps, replace(base, text=text, seconds=3.2, left=left, bars=tuple(bars))]
