"""`experiments.visualize` on images: any host, a person's own images, their mistakes."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from experiments.config.reading import load_config
from experiments.data.augment import BatchMixer, eval_transform, mean_and_std, normalise
from experiments.data.facts import readable_names
from experiments.data.images import DigitImages
from experiments.documents import figures as style
from experiments.training.distributed import ONE_PROCESS
from experiments.visualize import __main__ as visualize
from experiments.visualize.scenes import read_image, scene_of_folder, scene_of_split, spread
from tests.helpers.commands import fails, outcome
from tests.helpers.picture_cases import weights_of
from tests.helpers.runs_helper import HTM, VTM, small_config, write_config

VIT = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "num_classes": 3,
    "kwargs": {"depth": 5, "embed_dim": 24, "num_heads": 3, "patch_size": 8},
}


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer pixels, less time; what is drawn is tested elsewhere."""
    monkeypatch.setattr(style, "DPI", 30)


def paint(path, colour, size=(40, 60), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def as_in_evaluation(config, images):
    """What the model sees of images, in a batch."""
    transform = eval_transform(config.data, config.model.image_size)
    pixels = torch.stack([transform(image) for image in images])
    return normalise(pixels, *mean_and_std(config.data))


def test_a_cct_on_its_validation_images(tmp_path, capsys):
    config = small_config(
        tmp_path, horizontal={**HTM, "tau": 1.0}, vertical=VTM, mixup={"label_smoothing": 0.1}
    )
    weights_of(config, 10, tmp_path / "weights.safetensors")
    given = ("--config", tmp_path / "small.yaml", "--checkpoint", tmp_path / "weights.safetensors")
    code, out, err = outcome(
        capsys, visualize, *given, "--out", tmp_path / "new" / "out", "--count", 3
    )
    assert (code, err) == (0, "")
    assert "3 of the 355 images of the split 'validation'" in out
    listed = [Path(line.strip()) for line in out.splitlines() if line.startswith("  ")]
    assert [path.name for path in listed] == [
        f"{stem}.{ending}"
        for stem in (
            *("tokenmixup", "htm_layer1", "htm_layer1_gain"),
            *("vtm_layer1", "vtm_layer1_attention"),
        )
        for ending in ("png", "svg")
    ]
    assert all(path.stat().st_size > 5000 for path in listed)


def test_what_a_scene_shows_is_what_a_training_step_would_do(tmp_path):
    """The same images and smoothed labels, given to the model itself."""
    config = small_config(
        tmp_path, horizontal={**HTM, "tau": 1.0}, mixup={"label_smoothing": 0.1, "mixup_alpha": 0.8}
    )
    path = tmp_path / "weights.safetensors"
    model = weights_of(config, 10, path)
    scene = scene_of_split(config, str(path), ONE_PROCESS, "a run", 6)
    digits = DigitImages("validation")
    images, labels = zip(*(digits[index] for index in spread(len(digits), 6)), strict=True)
    assert scene.labels.tolist() == list(labels) and scene.label_notes == ("",) * 6
    smoothing = dataclasses.replace(config.mixup, mixup_alpha=0.0)
    batch = as_in_evaluation(config, images)
    _, targets = BatchMixer(smoothing, 10, 0)(batch, torch.tensor(labels), 0, 0, 0)
    assert targets.max() == pytest.approx(0.91)
    model.eval()
    model.training = True
    with torch.no_grad():
        output = model(batch, targets)
    np.testing.assert_allclose(scene.recording.horizontal[0].targets, output.targets, rtol=1e-6)
    assert (output.targets != targets).any()
    small = np.stack(
        [np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)) for image in images]
    )
    np.testing.assert_allclose(scene.images, small / 255, atol=2 / 255)


@pytest.mark.parametrize("pool", ["token", pytest.param("avg", marks=pytest.mark.slow)])
def test_own_images_on_a_vit_with_and_without_a_class_token(tmp_path, capsys, pool):
    kwargs = {**VIT["kwargs"], "global_pool": pool, "class_token": pool == "token"}
    path = write_config(
        tmp_path,
        model={**VIT, "kwargs": kwargs},
        data={"dataset": "", "root": str(tmp_path / "missing")},
        horizontal={"layers": [1, 3], "tau": 1.0, "rho": 0.0},
        vertical={"layers": [2, 4], "kappa": 2},
    )
    config = load_config(path)
    model = weights_of(config, 3, tmp_path / "weights.safetensors")
    photos = tmp_path / "photos"
    paint(photos / "a.png", "red", size=(20, 90))
    paint(photos / "deep" / "er" / "b.jpg", "blue", size=(300, 10))
    paint(photos / "2" / "c.webp", "green", size=(33, 33))
    paint(photos / "grey.gif", 100, mode="L")
    paint(photos / "clear.png", (9, 9, 9, 0), mode="RGBA")
    (photos / "notes.txt").write_text("no image")
    paint(photos / ".hidden" / "d.png", "red")
    given = ("--config", path, "--checkpoint", tmp_path / "weights.safetensors")
    animate = ["--animate"] if pool == "token" else []
    folders = ("--images", photos, "--out", tmp_path / "out")
    code, out, err = outcome(capsys, visualize, *given, *folders, *animate)
    assert (code, err) == (0, "")
    assert "All 5 images of photos/, resized as in evaluation" in out
    assert (tmp_path / "out" / "tokenmixup.gif").exists() == bool(animate)
    stems = {p.stem for p in (tmp_path / "out").iterdir()}
    layers = [*(f"htm_layer{n}{end}" for n in (1, 3) for end in ("", "_gain"))]
    layers += [f"vtm_layer{n}{end}" for n in (2, 4) for end in ("", "_attention")]
    assert stems == {"tokenmixup", *layers}
    scene = scene_of_folder(
        config, str(tmp_path / "weights.safetensors"), ONE_PROCESS, photos, "run", 8
    )
    assert scene.label_notes == ("folder", *["predicted"] * 4)
    assert scene.label_text(0) == "class 2 (folder)" and scene.class_token == (pool == "token")
    names = ["2/c.webp", "a.png", "clear.png", "deep/er/b.jpg", "grey.gif"]
    images = []
    for name in names:
        with Image.open(photos / name) as image:
            seen = Image.new("RGB", image.size, "white") if name == "clear.png" else image
            images.append(seen.convert("RGB"))
    with torch.no_grad():
        predicted = model.eval()(as_in_evaluation(config, images)).argmax(1)
    assert scene.labels[1:].tolist() == predicted[1:].tolist()
    assert [attention.shares.shape[-1] for attention in scene.recording.attention] == [3, 5]
    assert scene.recording.mixed_at(4) == [1, 3]


def test_labels_from_folders_named_as_the_classes(tmp_path):
    for name in ("tabby cat", "dog"):
        for number in range(2):
            paint(tmp_path / "data" / "validation" / name / f"{number}.png", "red")
    paint(tmp_path / "own" / "Tabby-Cat" / "x.png", "red")
    paint(tmp_path / "own" / "dog" / "best ones" / "y.png", "red")
    paint(tmp_path / "own" / "bird" / "z.png", "red")
    config = small_config(
        tmp_path,
        data={"dataset": "", "root": str(tmp_path / "data"), "val_split": "validation"},
        horizontal=HTM,
    )
    weights_of(config, 2, tmp_path / "weights.safetensors")
    given = (config, str(tmp_path / "weights.safetensors"), ONE_PROCESS)
    scene = scene_of_folder(*given, tmp_path / "own", "run", 8)
    by_name = dict(zip(["Tabby-Cat", "bird", "dog"], range(3), strict=True))
    assert scene.names == ("dog", "tabby cat")
    assert scene.label_text(by_name["Tabby-Cat"]) == "tabby cat (folder)"
    assert scene.label_text(by_name["dog"]) == "dog (folder)"
    assert scene.label_notes[by_name["bird"]] == "predicted"
    assert scene_of_split(*given, "run", 4).label_text(3) == "tabby cat"


def test_photographs_stand_upright(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    upright = read_image(tmp_path / "a.png")
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 255, 255)


@pytest.mark.parametrize(
    ("mode", "colour", "transparency"),
    [
        ("RGBA", (200, 0, 0, 51), None),
        ("LA", (0, 51), None),
        ("P", 0, 0),
        ("RGB", (9, 9, 9), (9, 9, 9)),
    ],
)
def test_transparent_images_are_put_on_white(tmp_path, mode, colour, transparency):
    image = Image.new(mode, (2, 1), colour)
    options = {} if transparency is None else {"transparency": transparency}
    image.save(tmp_path / "a.png", **options)
    found = read_image(tmp_path / "a.png")
    shares = {"RGBA": (200, 0, 0), "LA": (0, 0, 0)}  # a fifth of it, the rest white
    solid = shares.get(mode, (255, 255, 255))
    expected = tuple(round(0.2 * value + 0.8 * 255) for value in solid)
    assert found.mode == "RGB" and found.getpixel((1, 0)) == expected


def test_names_of_wordnet_become_words():
    assert readable_names(("n02123045", "n01440764")) == ("tabby", "tench")
    assert readable_names(("n02123045", "dog")) == ("n02123045", "dog")
    assert readable_names(("n99999999",)) == ("n99999999",)


def test_images_are_evenly_spread():
    assert spread(10, 5) == [0, 2, 4, 6, 8]
    assert spread(3, 5) == [0, 1, 2]


@pytest.fixture
def ready(tmp_path):
    config = small_config(tmp_path, horizontal=HTM)
    weights_of(config, 10, tmp_path / "weights.safetensors")
    return ("--config", tmp_path / "small.yaml", "--checkpoint", tmp_path / "weights.safetensors")


def test_mistakes_are_one_line(tmp_path, capsys, ready):
    (tmp_path / "empty" / "inner").mkdir(parents=True)
    (tmp_path / "empty" / "inner" / "read.me").write_text("no image")
    good = paint(tmp_path / "broken" / "good.png", "red")
    cut = tmp_path / "broken" / "cut.png"
    cut.write_bytes(good.read_bytes()[:60])
    plain = write_config(tmp_path, "plain")
    missing = {"dataset": "", "root": str(tmp_path / "missing")}
    no_classes = write_config(tmp_path, "no_classes", data=missing, horizontal=HTM)
    images = [*ready, "--out", tmp_path / "out", "--images"]
    for words, expected in (
        ([*images, tmp_path / "nowhere"], "nowhere is no folder; give a folder of images"),
        ([*images, good], "good.png is no folder; give a folder of images"),
        ([*images, tmp_path / "empty"], "empty holds no images; expected files such as NAME.jpg"),
        ([*images, cut.parent], f"--images: cannot read {cut}"),
        (["--config", plain, "--checkpoint", "x"], "plain.yaml: there is nothing to draw"),
        ([*ready[:2]], "--checkpoint: missing"),
        ([*ready, "--count", "0"], "--count: got '0'; allowed: a whole number from 1 to 64"),
        ([*ready, "--animate", "--imagse", "x"], "unknown option; the nearest is images"),
        ([*ready[:2], "--checkpoint", tmp_path / "no"], "no"),
        (["--config", no_classes, *images[2:], good.parent], "model.num_classes: got null"),
    ):
        assert expected in fails(capsys, visualize, *words), words
    assert not (tmp_path / "out").exists()


def test_pictures_are_written_where_there_is_nothing_to_animate(tmp_path, capsys):
    """The weights, of a plain model, have no ScoreNet."""
    weights_of(small_config(tmp_path, "plain"), 10, tmp_path / "weights.safetensors")
    path = write_config(tmp_path, "small", horizontal={**HTM, "tau": 0.0})
    given = ("--config", path, "--checkpoint", tmp_path / "weights.safetensors", "--count", 2)
    code, out, err = outcome(capsys, visualize, *given, "--out", tmp_path / "out", "--animate")
    assert code == 2 and err.count("\n") == 1
    assert "nothing to animate: no image of this batch was mixed" in err
    assert "left as initialised: scorenets.1" in out
    written = set((tmp_path / "out").iterdir())
    assert written == {Path(line.strip()) for line in out.partition("figures:\n")[2].splitlines()}
    assert written


def test_help(capsys):
    code, out, _ = outcome(capsys, visualize, "--compare", "--help")
    assert code == 0 and "--compare RUN..." in out and "--animate" in out
