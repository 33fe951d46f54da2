"""`experiments.visualize`: any host, a person's own images, their mistakes, training curves."""

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from PIL import Image

from experiments import cli
from experiments.checkpoint import save_final_weights
from experiments.config import as_plain, load_config
from experiments.data.augment import BatchMixer, eval_transform
from experiments.data.datasets import DigitImages, readable_names
from experiments.documents import figures as style
from experiments.errors import DataError
from experiments.models.build import build_model
from experiments.training.distributed import ONE_PROCESS
from experiments.training.folder import CONFIG_FILE
from experiments.training.metrics import METRICS_FILE
from experiments.visualize import __main__ as visualize
from experiments.visualize import pages
from experiments.visualize.curves import QUANTITIES, band, read_groups
from experiments.visualize.own_images import OwnImages
from experiments.visualize.scenes import scene_of_folder, scene_of_weights, spread
from tests.helpers.runs_helper import HTM, VTM, small_config, write_config

VIT = {
    "name": "vit_tiny_patch16_224",
    "image_size": 32,
    "num_classes": 3,
    "kwargs": {"depth": 4, "embed_dim": 24, "num_heads": 3, "patch_size": 8},
}


@pytest.fixture(autouse=True)
def coarse(monkeypatch):
    """Fewer pixels, less time; what is drawn is tested elsewhere."""
    monkeypatch.setattr(style, "DPI", 30)


def weights_of(config, classes, path):
    model = build_model(config, classes)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    save_final_weights(path, model)
    return model


def paint(path, colour, size=(40, 60), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, colour).save(path)
    return path


def run(capsys, *words):
    code = cli.run(visualize.main, [str(word) for word in words])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_a_cct_on_its_validation_images(tmp_path, capsys):
    config = small_config(
        tmp_path, horizontal={**HTM, "tau": 1.0}, vertical=VTM, mixup={"label_smoothing": 0.1}
    )
    weights_of(config, 10, tmp_path / "weights.safetensors")
    given = ("--config", tmp_path / "small.yaml", "--checkpoint", tmp_path / "weights.safetensors")
    code, out, err = run(capsys, *given, "--out", tmp_path / "new" / "out", "--count", 3)
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
    scene = scene_of_weights(config, str(path), ONE_PROCESS, "a run", 6)
    digits = DigitImages("validation")
    transform = eval_transform(config.data, 16)
    images, labels = zip(*(digits[index] for index in spread(len(digits), 6)), strict=True)
    assert scene.labels.tolist() == list(labels) and scene.label_notes == ("",) * 6
    smoothing = dataclasses.replace(config.mixup, mixup_alpha=0.0)
    batch = torch.stack([transform(image) for image in images])
    _, targets = BatchMixer(smoothing, 10, 0)(batch, torch.tensor(labels), 0, 0, 0)
    assert targets.max() == pytest.approx(0.91)
    model.eval()
    model.training = True
    with torch.no_grad():
        output = model(batch, targets)
    torch.testing.assert_close(scene.recording.horizontal[0].targets, output.targets)
    assert (output.targets != targets).any()
    small = np.stack(
        [np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)) for image in images]
    )
    np.testing.assert_allclose(scene.images, small / 255, atol=2 / 255)


@pytest.mark.parametrize("pool", ["token", "avg"])
def test_own_images_on_a_vit_with_and_without_a_class_token(tmp_path, capsys, pool):
    kwargs = {**VIT["kwargs"], "global_pool": pool, "class_token": pool == "token"}
    path = write_config(
        tmp_path,
        model={**VIT, "kwargs": kwargs},
        data={"dataset": "", "root": str(tmp_path / "missing")},
        horizontal={"layers": [1], "tau": 1.0, "rho": 0.0},
        vertical={"layers": [3], "kappa": 2},
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
    code, out, err = run(capsys, *given, *folders, *animate)
    assert (code, err) == (0, "")
    assert "All 5 images of photos/, resized as in evaluation" in out
    assert (tmp_path / "out" / "tokenmixup.gif").exists() == bool(animate)
    stems = {p.stem for p in (tmp_path / "out").iterdir()}
    assert stems == {
        "htm_layer1",
        "htm_layer1_gain",
        "vtm_layer3",
        "vtm_layer3_attention",
        "tokenmixup",
    }
    scene = scene_of_folder(
        config, str(tmp_path / "weights.safetensors"), ONE_PROCESS, photos, "run", 8
    )
    assert scene.label_notes == ("folder", *["predicted"] * 4)
    assert scene.label_text(0) == "class 2 (folder)" and scene.class_token == (pool == "token")
    transform = eval_transform(config.data, 32)
    names = ["2/c.webp", "a.png", "clear.png", "deep/er/b.jpg", "grey.gif"]
    images = []
    for name in names:
        with Image.open(photos / name) as image:
            images.append(transform(image.convert("RGB")))
    with torch.no_grad():
        predicted = model.eval()(torch.stack(images)).argmax(1)
    assert scene.labels[1:].tolist() == predicted[1:].tolist()
    assert [attention.sources for attention in scene.recording.attention] == [(0, 1, 2)]


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
    assert scene_of_weights(*given, "run", 4).label_text(3) == "tabby cat"


def test_photographs_stand_upright(tmp_path):
    image = Image.new("RGB", (4, 2), "black")
    image.putpixel((0, 0), (255, 255, 255))
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    image.save(tmp_path / "a.png", exif=exif)
    upright = OwnImages(tmp_path).read(0)
    assert upright.size == (2, 4) and upright.getpixel((1, 0)) == (255, 255, 255)


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


def test_mistakes_with_images_are_one_line(tmp_path, capsys, ready):
    empty = tmp_path / "empty"
    (empty / "inner").mkdir(parents=True)
    (empty / "inner" / "read.me").write_text("no image")
    broken = tmp_path / "broken"
    good = paint(broken / "good.png", "red")
    (broken / "cut.png").write_bytes(good.read_bytes()[:60])
    for folder, expected in (
        (tmp_path / "nowhere", "nowhere does not exist; give a folder of images"),
        (good, "good.png is a file; give a folder of images"),
        (empty, "empty holds no images; expected files such as NAME.jpg or NAME.png"),
        (broken, "cannot read {}".format(broken / "cut.png")),
    ):
        code, _, err = run(capsys, *ready, "--images", folder, "--out", tmp_path / "out")
        assert code == 2 and err.count("\n") == 1
        assert err.startswith("error: --images: ") and expected in err
    assert not (tmp_path / "out").exists()


def test_mistakes_on_the_command_line_are_one_line(tmp_path, capsys, ready):
    plain = write_config(tmp_path, "plain")
    for words, expected in (
        (["--config", plain, "--checkpoint", "x"], "plain.yaml: there is nothing to draw"),
        ([*ready[:2]], "--checkpoint: missing"),
        ([*ready, "--count", "0"], "--count: got '0'; allowed: a number from 1 to 64"),
        ([*ready, "--animate", "--imagse", "x"], "unknown option; the nearest is images"),
        ([*ready[:2], "--checkpoint", tmp_path / "no"], "no"),
        (["--compare"], "--compare: run folders must follow"),
        (["--compare", tmp_path], "holds no run (looked for config.yaml)"),
        (["--compare", "a", "--checkpoint", "x"], "--checkpoint: unknown option"),
    ):
        code, _, err = run(capsys, *words)
        assert code == 2 and err.count("\n") == 1 and expected in err, words


def test_a_place_that_cannot_be_written_is_told(tmp_path, capsys):
    runs = [write_run(tmp_path, "run", 1)]
    for out in (paint(tmp_path / "a.png", "red"), tmp_path / "a.png" / "inner"):
        code, _, err = run(capsys, "--compare", *runs, "--out", out)
        assert code == 2 and err.count("\n") == 1 and f"--out: cannot write to {out}" in err


def test_without_data_the_number_of_classes_must_be_told(tmp_path, capsys):
    path = write_config(
        tmp_path, data={"dataset": "", "root": str(tmp_path / "missing")}, horizontal=HTM
    )
    paint(tmp_path / "own" / "a.png", "red")
    given = ("--config", path, "--checkpoint", "x", "--images", tmp_path / "own")
    code, _, err = run(capsys, *given)
    assert code == 2 and "model.num_classes: got null" in err and err.count("\n") == 1


def test_pictures_are_told_where_there_is_nothing_to_animate(tmp_path, capsys):
    path = write_config(tmp_path, "small", horizontal={**HTM, "tau": 0.0})
    weights_of(load_config(path), 10, tmp_path / "weights.safetensors")
    given = ("--config", path, "--checkpoint", tmp_path / "weights.safetensors", "--count", 2)
    code, out, err = run(capsys, *given, "--out", tmp_path / "out", "--animate")
    assert code == 2 and err.count("\n") == 1
    assert "nothing to animate: no image of this batch was mixed" in err
    assert "the figures above are written" in err
    written = set((tmp_path / "out").iterdir())
    assert written == {Path(line.strip()) for line in out.partition("figures:\n")[2].splitlines()}
    assert written


def test_weights_without_a_scorenet_are_told(tmp_path, capsys):
    weights_of(small_config(tmp_path, "plain"), 10, tmp_path / "plain.safetensors")
    path = write_config(tmp_path, "small", horizontal=HTM)
    given = ("--config", path, "--checkpoint", tmp_path / "plain.safetensors", "--count", 2)
    code, out, _ = run(capsys, *given, "--out", tmp_path / "out")
    assert code == 0 and "not in the file, left as initialised: scorenets.1" in out


def test_help(capsys):
    code, out, _ = run(capsys, "--compare", "--help")
    assert code == 0 and "--compare RUN..." in out and "--animate" in out


# Curves of run folders


def write_run(tmp_path, name, seed, steps=(10, 20), factor=1.0, **sections):
    config = small_config(tmp_path, name, seed=seed, **sections)
    folder = Path(config.output)
    folder.mkdir(parents=True)
    (folder / CONFIG_FILE).write_text(yaml.safe_dump(as_plain(config)))
    rows = []
    for number, step in enumerate(steps, start=1):
        place = {"epoch": number, "step": step, "steps": 10}
        row = {"split": "train", **place, "loss": factor * (step + seed)}
        row |= {"htm/layer0/mixed_share": 0.2, "htm/layer1/mixed_share": 0.4}
        rows += [row, {"split": "validation", **place, "top1": 90.0 + seed, "loss": None}]
    (folder / METRICS_FILE).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_runs_that_differ_by_their_seed_alone_form_a_band(tmp_path):
    folders = [
        write_run(tmp_path, "mixed_seed1", 1, horizontal=HTM),
        write_run(tmp_path, "plain", 1),
        write_run(tmp_path, "mixed_seed4", 4, steps=(10, 20, 30), horizontal=HTM),
        write_run(tmp_path, "other_rho", 4, horizontal={**HTM, "rho": 0.1}),
    ]
    mixed, plain, other = read_groups(folders)
    assert [g.label for g in (mixed, plain, other)] == ["mixed (2 seeds)", "plain", "other_rho"]
    loss, validation, top1, share, tokens = (band(mixed, quantity) for quantity in QUANTITIES)
    np.testing.assert_allclose(loss.epochs, [1, 2])  # only where both runs are
    np.testing.assert_allclose(loss.mean, [12.5, 22.5])
    np.testing.assert_allclose(loss.deviation, [np.sqrt(4.5)] * 2)
    np.testing.assert_allclose(top1.mean, [92.5, 92.5])
    np.testing.assert_allclose(share.mean, [30, 30])  # per cent, over both layers
    assert validation is None and tokens is None
    assert band(plain, QUANTITIES[0]).deviation is None


def test_the_same_seed_twice_is_no_band(tmp_path):
    folders = [write_run(tmp_path, name, 1) for name in ("one", "two")]
    with pytest.raises(DataError, match="same experiment with the same seed 1"):
        read_groups(folders)


def test_a_run_before_its_first_evaluation_is_told(tmp_path):
    folder = write_run(tmp_path, "early", 1, steps=())
    with pytest.raises(DataError, match="no epoch was finished and evaluated yet"):
        read_groups([folder])


def test_groups_of_one_name_are_told_apart_by_their_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    folders = [
        write_run(tmp_path / "a", "run", 1),
        write_run(tmp_path / "b", "run", 1, horizontal=HTM),
    ]
    assert [group.label for group in read_groups(folders)] == [str(folder) for folder in folders]


def test_comparing_on_the_command_line(tmp_path, capsys):
    folders = [write_run(tmp_path, f"run{seed}", seed) for seed in (1, 2)]
    code, out, _ = run(capsys, "--compare", *folders, "--out", tmp_path / "out")
    assert code == 0
    for ending in ("png", "svg"):
        path = tmp_path / "out" / f"training_curves.{ending}"
        assert str(path) in out and path.stat().st_size > 5000


def test_the_overview_takes_htm_and_vtm_from_the_runs_that_have_them(tmp_path, monkeypatch):
    drawn = []
    for name in ("horizontal", "vertical"):
        module = getattr(pages, name)
        function = "draw_rows" if name == "horizontal" else "draw_tokens"
        inner = getattr(module, function)
        monkeypatch.setattr(
            module, function, lambda *args, inner=inner: (drawn.append(args[1].run), inner(*args))
        )
    folders = []
    for name, sections in (("plain", {}), ("htm", {"horizontal": HTM}), ("vtm", {"vertical": VTM})):
        folders.append(write_run(tmp_path, name, 1, **sections))
        config = load_config(folders[-1] / CONFIG_FILE)
        weights_of(config, 10, folders[-1] / "final.safetensors")
    assert pages.draw_runs(folders[:1], tmp_path) == []
    written = pages.draw_runs(folders, tmp_path / "out")
    assert [path.name for path in written] == ["tokenmixup.png", "tokenmixup.svg"]
    assert drawn == ["htm", "vtm"]
