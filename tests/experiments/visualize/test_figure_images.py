"""Figures of fixed inputs against committed pictures of them, and what every figure keeps to."""

import dataclasses

import matplotlib
import matplotlib.colors
import numpy as np
import pytest
from PIL import Image

from experiments.documents import figures as style
from tests.helpers import picture_cases

TOLERANCE, SHARE = 40, 0.004
"""A pixel counts as another one from this difference of any channel on; so many may."""


def differing(one, other):
    """Share of the pixels that differ."""
    gap = np.abs(one.astype(int) - other.astype(int)).max(axis=-1)
    return float((gap > TOLERANCE).mean())


@pytest.mark.parametrize("name", picture_cases.FIGURES)
def test_figures_look_as_they_did(name):
    with Image.open(picture_cases.REFERENCES / f"{name}.png") as image:
        expected = np.asarray(image.convert("RGB"))
    found = picture_cases.picture(name)
    assert found.shape == expected.shape
    assert differing(found, expected) <= SHARE, (
        "look at the figure; if it is as it should be, python tests/helpers/picture_cases.py"
    )


def test_one_wrong_token_is_more_than_the_tolerance():
    case = picture_cases.scene()
    right = picture_cases.picture("vtm", case)
    first, *others = case.recording.vertical
    positions = first.positions.copy()
    positions[0, 0] = next(t for t in range(16) if t not in positions[0].tolist())
    wrong = [dataclasses.replace(first, positions=positions), *others]
    recording = dataclasses.replace(case.recording, vertical=wrong)
    found = picture_cases.picture("vtm", picture_cases.scene(recording=recording))
    assert differing(found, right) > SHARE


@pytest.mark.parametrize("name", ["htm_gain", "vtm_attention"])
def test_files_have_their_ground_and_the_same_bytes_each_time(name, tmp_path):
    """Whatever a person's own settings of matplotlib are; without a ground, dark ink on dark."""
    written = []
    for number, settings in enumerate(({}, {"font.size": 30, "figure.facecolor": "red"})):
        with matplotlib.rc_context(settings), style.house_style():
            figure = picture_cases.FIGURES[name](picture_cases.scene())
            written.append(style.write(figure, tmp_path / str(number) / name, "a caption"))
    for first, second in zip(*written, strict=True):
        assert first.read_bytes() == second.read_bytes()
    png, svg = written[0]
    with Image.open(png) as image:
        pixels = np.asarray(image.convert("RGBA"))
    assert (pixels[..., 3] == 255).all()
    assert pixels[[0, 0, -1, -1], [0, -1, 0, -1], :3].tolist() == [[255] * 3] * 4
    text = svg.read_text()
    assert "<dc:date>" not in text and "<title>a caption</title>" in text
    patch = text[text.index('<g id="patch_1">') :].partition("</g>")[0]
    assert "fill: #ffffff" in patch and "opacity" not in patch


def luminance(colour):
    linear = to_linear(np.array(matplotlib.colors.to_rgb(colour)))
    return float(linear @ [0.2126, 0.7152, 0.0722])


def to_linear(values):
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def to_srgb(linear):
    linear = np.clip(linear, 0, 1)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)


def test_text_stands_out_from_its_ground():
    """WCAG 2.2 asks for 4.5 to 1 of text."""
    for ink in (style.INK, style.SOFT):
        assert (luminance(style.GROUND) + 0.05) / (luminance(ink) + 0.05) >= 7


# Machado, Oliveira and Fernandes 2009, severity 1: what dichromats see, in linear RGB
DICHROMATS = {
    "protan": [[0.152, 1.053, -0.205], [0.115, 0.786, 0.099], [-0.004, -0.048, 1.052]],
    "deutan": [[0.367, 0.861, -0.228], [0.280, 0.673, 0.047], [-0.012, 0.043, 0.969]],
    "tritan": [[1.256, -0.077, -0.179], [-0.078, 0.931, 0.148], [0.005, 0.691, 0.304]],
}


@pytest.mark.parametrize("kind", DICHROMATS)
def test_colours_that_meet_stay_apart_for_colour_blind_readers(kind):
    def seen(colour):
        linear = to_linear(np.array(matplotlib.colors.to_rgb(colour)))
        return to_srgb(np.array(DICHROMATS[kind]) @ linear)

    meetings = [(style.OWN, style.PARTNER), (style.PARTNER, style.REST), (style.OWN, style.REST)]
    meetings += [(style.BLUE, style.VERMILION)]  # easy and not
    meetings += [(style.SERIES[n], style.SERIES[n + 1]) for n in range(3)]
    for one, other in meetings:
        assert np.linalg.norm(seen(one) - seen(other)) > 0.2, (one, other)


def test_the_simulation_finds_colours_that_do_not_stay_apart():
    pair = [to_linear(np.array(matplotlib.colors.to_rgb(c))) for c in ("#d04030", "#7a6a28")]
    seen = [to_srgb(np.array(DICHROMATS["deutan"]) @ one) for one in pair]
    assert (
        np.linalg.norm(seen[0] - seen[1])
        < 0.2
        < np.linalg.norm(to_srgb(pair[0]) - to_srgb(pair[1]))
    )
