"""The numbers in the figures are those of the recording; figures look as committed pictures.

Dimensions: B batch, T patch tokens, H heads.
"""

import dataclasses
import functools
import itertools

import matplotlib
import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.patches import Rectangle
from PIL import Image
from scipy.optimize import linear_sum_assignment

from experiments.documents import figures as style
from experiments.documents.figures import EARLIER, OWN, PARTNER, REST
from experiments.errors import ConfigError
from experiments.visualize import animation, horizontal, vertical
from experiments.visualize.cells import (
    Share,
    heat,
    label_shares,
    outlines,
    patchwork,
    spotlight,
    token_grid,
)
from experiments.visualize.horizontal import chosen_pairs
from experiments.visualize.recording import Recording
from tests.helpers import picture_cases
from tests.helpers.picture_cases import RHO, TAU, deep_scene, scene

TOLERANCE, SHARE = 40, 0.004
"""A pixel counts as another one from this difference of any channel on; so many may."""


@functools.cache
def plain(name):
    return drawn(name, scene())


def drawn(name, case):
    with style.house_style():
        return picture_cases.FIGURES[name](case)


def rows_of(figure, columns):
    """The cells of a grid, as they were made, row by row; what came after is left out."""
    cells = figure.axes
    return [cells[start : start + columns] for start in range(0, 4 * columns, columns)]


def test_tokens_become_squares():
    values = np.arange(4)
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert token_grid(values, 4).tolist() == expected
    assert token_grid(np.stack([values, values]), 4).shape == (2, 4, 4)
    with pytest.raises(ConfigError, match="8 patch tokens form no square grid"):
        token_grid(np.arange(8), 4)


@pytest.mark.parametrize("size", [6, 7])
def test_outlines_run_between_chosen_and_other_pixels(size):
    """7 pixels are no multiple of 3 tokens."""
    chosen = np.array([1, 1, 0, 0, 1, 0, 0, 0, 1], dtype=bool)
    pixels = np.pad(token_grid(chosen, size), 1)
    borders = int((pixels[1:] != pixels[:-1]).sum() + (pixels[:, 1:] != pixels[:, :-1]).sum())
    lengths = [abs(x - u) + abs(y - v) for (x, y), (u, v) in outlines(chosen, size)]
    assert sum(lengths) == borders
    for (x, y), (u, v) in outlines(chosen, size):
        assert (x == u) != (y == v)
        column, row = round(min(x, u) + 1.5), round(min(y, v) + 1.5)
        across = pixels[row, column - 1] if x == u else pixels[row - 1, column]
        assert pixels[row, column] != across


def test_difficulty_bars_against_tau():
    case = scene()
    layer = case.recording.horizontal[0]
    for row, difficulty in zip(rows_of(plain("htm"), 7), layer.difficulty.tolist(), strict=True):
        (bar,) = [patch for patch in row[1].patches if isinstance(patch, Rectangle)]
        assert bar.get_width() == pytest.approx(difficulty)
        assert row[1].lines[0].get_xdata()[0] == TAU
        easy = difficulty <= TAU
        words = [text.get_text() for text in row[1].texts]
        assert f"{difficulty:.3f}: {'easy' if easy else 'not easy'}" in words
        assert row[1].get_xlim()[1] > max(difficulty, TAU)


def test_rows_show_mixed_images_masks_and_labels():
    case = scene()
    layer = case.recording.horizontal[0]
    mask, partner = layer.mask, layer.partner
    assert mask[[0, 1, 3]].any(1).all() and not mask[2].any()
    for index, row in enumerate(rows_of(plain("htm"), 7)):
        expected = case.images[index].copy()
        for token in np.flatnonzero(mask[index]):
            y, x = 4 * (token // 4), 4 * (token % 4)
            expected[y : y + 4, x : x + 4] = case.images[partner[index], y : y + 4, x : x + 4]
        shown = row[5].images[0].get_array()
        np.testing.assert_array_equal(shown, expected)
        shares = [bar.get_width() for bar in row[6].patches]
        target = layer.targets[index]
        parts = [target[index]] + ([target[partner[index]]] if mask[index].any() else [])
        assert shares == pytest.approx([100 * p for p in [*parts, 1 - sum(parts)]])
    figure = plain("htm")
    texts = [cell.get_xlabel() for row in rows_of(figure, 7) for cell in row[:1]]
    assert texts == ["class 0", "class 1\n(folder)", "class 2\n(predicted)", "class 3"]
    assert [c.get_xlabel() for c in rows_of(figure, 7)[3]][1::5] == ["CE / 10 (nats)", "share (%)"]


@pytest.mark.parametrize(
    ("labels", "parts", "expected"),
    [  # the partner of sample 0 is sample 1
        (
            [1, 1, 0, 0],
            [0.6, 0.4, 0, 0],
            [("class 1", 0.3, OWN), ("3 others (smoothing)", 0.7, REST)],
        ),
        (
            [1, 0, 2, 2],
            [0.6, 0.1, 0, 0.3],
            [
                ("class 1", 0.3, OWN),
                ("class 0", 0.5, PARTNER),
                ("class 2", 0.15, EARLIER),
                ("1 others (smoothing)", 0.05, REST),
            ],
        ),
    ],
)
def test_a_class_has_one_bar(labels, parts, expected):
    layer = scene().recording.horizontal[0]
    targets = np.array([[0.5, 0.3, 0.15, 0.05]])
    layer = dataclasses.replace(
        layer, targets=targets, parts=np.array([parts]), partner=np.array([1])
    )
    found = label_shares(scene(labels=np.array(labels)), layer, 0)
    assert found == [Share(name, pytest.approx(share), colour) for name, share, colour in expected]


def test_more_classes_than_there_is_room_for_share_a_bar():
    layer = scene().recording.horizontal[0]
    layer = dataclasses.replace(
        layer, targets=np.full((1, 7), 1 / 7), parts=np.array([[0.3, 0.1, 0.2, 0.05, 0.15, 0.2]])
    )
    layer = dataclasses.replace(layer, partner=np.array([1]))
    found = label_shares(scene(labels=np.arange(6)), layer, 0)
    assert [share.name for share in found] == [
        *("class 0", "class 1", "class 2", "class 5", "2 more, earlier", "1 others (smoothing)")
    ]
    assert sum(share.share for share in found) == pytest.approx(1)


def test_a_patchwork_has_the_pixels_of_each_token_s_sample():
    images, origin = scene().images, np.arange(64).reshape(4, 16) * 7 % 4
    found = patchwork(images, origin)
    for sample, y, x in itertools.product(range(4), range(16), range(16)):
        giver = origin[sample, 4 * (y // 4) + x // 4]
        np.testing.assert_array_equal(found[sample, y, x], images[giver, y, x])


def slowly_mixed(case, layer):
    """Which sample's patch each token has, by copying patch after patch."""
    now = [[sample] * 16 for sample in range(4)]
    for record in case.recording.horizontal:
        before = [list(row) for row in now]
        for sample, token in np.argwhere(record.mask) if record.layer <= layer else []:
            now[sample][token] = before[record.partner[sample]][token]
    return np.array(now)


def outlined(cell, colour):
    """The outlines of one colour in a cell, as sets of segments."""
    wanted = matplotlib.colors.to_rgba(colour)
    lines = [one for one in cell.collections if tuple(one.get_colors()[0]) == wanted]
    return [{tuple(map(tuple, line)) for line in one.get_segments()} for one in lines]


def test_the_second_htm_layer_shows_what_the_first_mixed():
    """HTM at layers 1 and 3; at 3 each image has what it took at 1, and so has its partner."""
    case = deep_scene()
    layer = case.recording.horizontal[1]
    before, after = slowly_mixed(case, 1), slowly_mixed(case, 3)
    own = np.arange(4)[:, None]
    assert (after != np.where(layer.mask, layer.partner[:, None], own)).any(), "earlier ones show"
    images, mixed = patchwork(case.images, before), patchwork(case.images, after)
    figure = drawn("htm_second", case)
    for index, row in enumerate(rows_of(figure, 7)):
        np.testing.assert_array_equal(row[0].images[0].get_array(), images[index])
        np.testing.assert_array_equal(row[5].images[0].get_array(), mixed[index])
        given = before[index] != index
        assert outlined(row[0], EARLIER) == [set(outlines(given, 16))]
        assert outlined(row[5], EARLIER) == [set(outlines(given & ~layer.mask[index], 16))]
        if layer.mask[index].any():
            giver = layer.partner[index]
            seen = heat(images[giver], layer.saliency[giver], layer.saliency[[0, 1, 3]].max())
            assert np.abs(row[3].images[0].get_array() - seen).max() < 0.2
        # with 10 classes and smoothing 0.1, a class that no image of the mix has gets 1%
        *_, others = label_shares(case, layer, index)
        assert others.colour == REST and others.share <= 0.0901
        givers = {f"+ class {one}" for one in set(before[index]) - {index}}
        words = row[0].get_xlabel().split("\n")
        assert {word for word in words if word[0] == "+"} == givers
    assert figure.axes[0].get_title() == "image, mixed\nat layer 1"
    names = [share.name for share in label_shares(case, layer, 0)]
    assert names == ["class 0", "class 3", "class 2", "class 1", "6 others (smoothing)"]
    with style.house_style():
        gains = horizontal.gain_figure(case, layer)
    thumbnails = gains.axes[0].images[1:5]
    for image, expected in zip(thumbnails, images, strict=True):
        np.testing.assert_array_equal(image.get_array(), expected)


@pytest.mark.parametrize(("number", "htm"), [(0, "layer 1"), (1, "layers 1 and 3")])
def test_vtm_shows_the_images_as_they_are_at_each_layer(number, htm):
    """VTM at layers 2 and 4 above HTM at 1 and 3."""
    case = deep_scene()
    attention = case.recording.attention[number]
    figure = drawn(("vtm", "vtm_second")[number], case)
    cells = [figure.axes[start : start + 4] for start in range(0, 4 * (attention.layer + 2), 4)]
    for layer, row in enumerate(cells[1:]):
        origin = slowly_mixed(case, layer)
        images = patchwork(case.images, origin)
        for index, cell in enumerate(row):
            foreign = origin[index] != index
            assert outlined(cell, EARLIER) == [set(outlines(foreign, 16))]
            if layer < attention.layer:
                chosen = np.zeros(16, dtype=bool)
                chosen[case.recording.vertical[layer].positions[index]] = True
                expected = spotlight(images[index], chosen, PARTNER)
                values = attention.shares[index, :, :, 1 + layer]
                assert cell.get_xlabel() == f"{100 * values.mean():.1f}%"
            else:
                looks = vertical.remembered_share(attention, 16)
                expected = heat(images[index], looks[index], float(looks.max()))
                givers = {f"+ class {one}" for one in set(origin[index]) - {index}}
                words = cell.get_xlabel().split("\n")
                whole = attention.shares[index, :, :, 1:].sum(-1).mean()
                assert words[0] == f"{100 * whole:.1f}%"
                assert {word for word in words if word[0] == "+"} == givers
            np.testing.assert_array_equal(cell.images[0].get_array(), expected)
    names = [f"layer {layer}\nremembers" for layer in range(attention.layer)]
    labels = [row[0].get_ylabel() for row in cells]
    assert labels == ["image", *names, f"layer {attention.layer}\nattends"]
    caption = " ".join(figure.get_supxlabel().split())
    assert f"HTM at {htm} mixed 3 of these 4 images" in caption
    assert (origin != np.arange(4)[:, None]).any(1).sum() == 3
    by_head = drawn("vtm_attention", scene(recording=case.recording))
    assert "has mixed 3 of the images" in " ".join(
        text.get_text() for text in by_head.findobj(matplotlib.text.Text)
    ).replace("\n", " ")


@pytest.mark.parametrize(("name", "columns"), [("htm", 7), ("vtm", 4)])
def test_long_names_of_classes_stay_in_their_columns(name, columns):
    """ImageNet's, beside each other and with a note; in the second HTM layer and the last VTM."""
    names = ("golden retriever", "hammerhead shark", "great white shark", "Christmas stocking")
    case = dataclasses.replace(
        deep_scene(), names=(*names, *"abcdef"), label_notes=("predicted",) * 4
    )
    with style.house_style():
        figures = dict((horizontal if name == "htm" else vertical).figures(case))
        figure = figures["htm_layer3" if name == "htm" else "vtm_layer4"]
        FigureCanvasAgg(figure).draw()
        rows = len(figure.axes) // columns
        for row in range(rows):
            cells = figure.axes[row * columns : (row + 1) * columns]
            boxes = [c.xaxis.label.get_window_extent() for c in cells if c.get_xlabel()]
            assert boxes[0].x0 >= 0 and boxes[-1].x1 <= figure.bbox.x1
            for left, right in itertools.pairwise(boxes):
                assert left.x1 < right.x0


def test_vtm_below_htm_is_drawn_on_clean_images():
    case = scene(
        recording=dataclasses.replace(
            scene().recording, horizontal=[picture_cases.horizontal_record(3)]
        )
    )
    figure = drawn("vtm", case)
    assert "mixed" not in figure.get_supxlabel()
    assert all(outlined(cell, EARLIER) == [set()] for cell in figure.axes[4:16])


def test_the_gain_matrix_and_its_partners():
    case = scene()
    layer = case.recording.horizontal[0]
    axes = plain("htm_gain").axes[0]
    gaps = layer.saliency[None] - layer.saliency[[0, 1, 3]][:, None] - RHO
    expected = 100 * np.maximum(gaps, 0).sum(-1)  # (3 easy, 4)
    np.testing.assert_allclose(axes.images[0].get_array(), expected)
    rows, columns = linear_sum_assignment(expected, maximize=True)
    wanted = set(zip(rows.tolist(), columns.tolist(), strict=True))
    assert set(chosen_pairs(layer)) == wanted and len(wanted) == 3
    framed = {(round(p.get_y() + 0.43), round(p.get_x() + 0.43)) for p in axes.patches}
    assert framed == wanted
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "3"]
    numbers = {text.get_text() for text in axes.texts}
    assert {f"{value:.1f}" for value in expected.flat} == numbers


def test_cells_without_content_say_why():
    layer = scene().recording.horizontal[0]
    none = {"easy": layer.easy & False, "gain": layer.gain[:0], "mask": layer.mask & False}
    none = dataclasses.replace(layer, difficulty=None, **none)
    case = scene(recording=Recording([none]), tau=None)
    texts = [text.get_text() for axes in drawn("htm_gain", case).axes for text in axes.texts]
    assert texts == ["No image of this batch is easy, so none gets a partner."]
    for row in rows_of(drawn("htm", case), 7):
        words = [text.get_text() for cell in (row[1], row[3]) for text in cell.texts]
        assert words == ["no ScoreNet:\nall are mixed", "not easy,\nso not mixed"]


@pytest.mark.parametrize("class_token", [False, True])
def test_bars_of_attention_by_head(class_token):
    case = scene(class_token=class_token)
    shares = case.recording.attention[0].shares  # (B, H, N, 3)
    axes = drawn("vtm_attention", case).axes
    assert len(axes) == 1 + class_token
    for axis, queries in zip(axes, (slice(None), slice(1)), strict=False):
        bars = [p for p in axis.patches if isinstance(p, Rectangle)]
        heads = [shares[:, h, queries].mean((0, 1)) for h in (0, 1)]
        expected = [*heads, (heads[0] + heads[1]) / 2]
        for source in (0, 1):
            for row in range(3):
                bar = bars[3 * source + row]
                assert bar.get_width() == pytest.approx(100 * expected[row][1 + source])
                before = 0 if source == 0 else 100 * expected[row][1]
                assert bar.get_x() == pytest.approx(before)
        even = [line for line in axis.lines if line.get_linestyle() == "--"]
        assert even[0].get_xdata()[0] == pytest.approx(100 * 6 / 22)


def test_attention_of_patch_tokens_leaves_prefix_tokens_out():
    attention = scene().recording.attention[0]
    found = vertical.remembered_share(attention, 14)  # as if the first two were prefix tokens
    expected = attention.shares[:, :, 2:, 1:].sum(-1).mean(1)
    np.testing.assert_allclose(found, expected)


def test_the_storyboard_follows_the_method():
    case = scene()
    layer = case.recording.horizontal[0]
    steps = animation.steps_of(case)
    order = [step.text[:1] for step in steps if step.text[0].isdigit()]
    assert order == sorted(order) and set(order) == set("123456")
    sample = steps[0].sample
    mixed = patchwork(case.images, slowly_mixed(case, layer.layer))[sample]
    moves = [step for step in steps if step.moving is not None]
    patches, way = moves[-1].moving
    landed = np.where(patches[..., 3:] > 0, patches[..., :3], moves[-1].left)
    assert way == 1 and moves[0].moving[1] == 0
    np.testing.assert_array_equal(landed, mixed)
    label = next(step for step in steps if step.text.startswith("6"))
    np.testing.assert_array_equal(label.left, mixed)
    assert sum(bar.share for bar in label.bars) == pytest.approx(1)
    assert [bar.colour for bar in label.bars] == [OWN, PARTNER, REST]
    last = steps[-1]
    assert last.title == "Vertical TokenMixup, layer 2"
    looks = vertical.remembered_share(case.recording.attention[0], 16)[sample]
    np.testing.assert_array_equal(last.left, heat(mixed, looks, float(looks.max())))
    assert np.array_equal(last.framed, layer.mask[sample]) and "pink: queries" in last.text
    assert last.left_name == f"class 0 with class {layer.partner[sample]}" and sample == 0
    assert [step.framed is None for step in steps if "remembers" in step.text] == [True, False]
    assert sum(bar.share for bar in last.bars) == pytest.approx(1)
    assert sum("remembers" in step.text for step in steps) == 2
    assert 10 < sum(step.seconds for step in steps) < 40


def test_the_animation_is_a_gif_of_the_storyboard(tmp_path):
    case = scene()
    path = animation.write_animation(case, tmp_path / "new")
    with Image.open(path) as image:
        assert image.format == "GIF" and image.info["loop"] == 0
        seconds = 0
        for number in range(image.n_frames):
            image.seek(number)
            seconds += image.info["duration"] / 1000
        last = np.asarray(image.convert("RGB"))
    for colour in (OWN, EARLIER, "white"):  # of frames and ground; the last image has pink lines
        exact = 255 * np.array(matplotlib.colors.to_rgb(colour))
        assert (np.abs(last - exact).max(-1) < 1).sum() > 300, colour
    assert seconds == pytest.approx(sum(s.seconds for s in animation.steps_of(case)), abs=0.2)


def test_a_batch_of_more_images_than_columns_has_several_pages(monkeypatch):
    monkeypatch.setattr(vertical, "MOST_COLUMNS", 3)
    names = [name for name, _ in vertical.figures(scene())]
    assert names == ["vtm_layer2", "vtm_layer2_from3", "vtm_layer2_attention"]


@pytest.mark.parametrize("name", picture_cases.FIGURES)
def test_figures_look_as_they_did(name):
    with Image.open(picture_cases.REFERENCES / f"{name}.png") as image:
        expected = np.asarray(image.convert("RGB"))
    found = picture_cases.picture(name)
    assert found.shape == expected.shape
    gap = np.abs(found.astype(int) - expected.astype(int)).max(axis=-1)
    assert (gap > TOLERANCE).mean() <= SHARE, (
        "look at the figure; if it is as it should be, python -m tests.helpers.picture_cases"
    )


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
