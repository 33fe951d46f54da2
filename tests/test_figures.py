"""Pictures and the recording behind them: what they show is what the model did."""

import numpy as np
import pytest
import torch
from PIL import Image
from runs_helper import HTM, VTM, small_config

from experiments.errors import DataError
from experiments.figures import Scene, draw, mix_patches, token_grid
from experiments.models.build import build_model
from experiments.recording import Recording, record


def batch(size=12):
    generator = torch.Generator().manual_seed(2)
    images = torch.randn(size, 3, 16, 16, generator=generator)
    labels = torch.randint(0, 10, (size,), generator=generator)
    return images, torch.nn.functional.one_hot(labels, 10).float()


@pytest.fixture
def model(tmp_path):
    rates = {"attn_drop_rate": 0.3, "drop_path_rate": 0.3}
    return build_model(small_config(tmp_path, horizontal=HTM, vertical=VTM, model=rates), 10)


def test_tokens_become_squares():
    values = np.arange(4)
    expected = [[0, 0, 1, 1], [0, 0, 1, 1], [2, 2, 3, 3], [2, 2, 3, 3]]
    assert token_grid(values, 4).tolist() == expected
    assert token_grid(np.stack([values, values]), 4).shape == (2, 4, 4)


def test_patches_are_the_partners():
    images = np.random.default_rng(0).random((3, 4, 4, 3))
    mask = np.zeros((3, 4), dtype=bool)
    mask[0, 1] = mask[2, 3] = True
    mixed = mix_patches(images, np.array([2, 1, 0]), mask)
    expected = images.copy()
    expected[0, :2, 2:] = images[2, :2, 2:]
    expected[2, 2:, 2:] = images[0, 2:, 2:]
    assert np.array_equal(mixed, expected)


def test_the_recording_is_what_the_model_did(model):
    images, targets = batch()
    recording = record(model, images, targets)
    horizontal, vertical = recording.horizontal[0], recording.vertical[0]
    assert (horizontal.layer, vertical.layer) == (1, 0)
    # the model's own pass, dropout off: the same targets and the same statistics
    model.eval()
    model.training = True
    with torch.no_grad():
        output = model(images, targets)
    assert torch.equal(output.targets, horizontal.targets)
    stats = {name.rpartition("/")[2]: value for name, value in output.stats.items()}
    assert horizontal.easy.float().mean() == stats["easy_share"]
    assert horizontal.mask.any(1).float().mean() == stats["mixed_share"] > 0
    assert horizontal.difficulty.mean() == stats["difficulty_mean"]
    assert vertical.positions.shape == (12, 3)
    order = vertical.saliency.argsort(1, descending=True)
    assert torch.equal(vertical.positions, order[:, :3])


@pytest.mark.parametrize("training", [True, False])
def test_recording_leaves_the_model_as_it_came(model, training):
    model.train(training)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    hooks = sum(len(module._forward_pre_hooks) for module in model.modules())
    record(model, *batch())
    assert all(module.training is training for module in model.modules())
    assert sum(len(module._forward_pre_hooks) for module in model.modules()) == hooks
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def scene_of(model, size=12):
    images, targets = batch(size)
    shown = images.permute(0, 2, 3, 1).sigmoid().numpy()
    return Scene(shown, targets.argmax(1).numpy(), record(model, images, targets), 10, "a run")


def test_a_picture_is_drawn(model, tmp_path):
    path = tmp_path / "both.png"
    draw(path, [scene_of(model)])
    with Image.open(path) as image:
        pixels = np.asarray(image.convert("RGB"))
    assert min(pixels.shape[:2]) > 500
    assert len(np.unique(pixels.reshape(-1, 3), axis=0)) > 100
    draw(tmp_path / "again.png", [scene_of(model)])
    assert (tmp_path / "again.png").read_bytes() == path.read_bytes()


def test_a_picture_of_each_alone(tmp_path):
    for name, section in (("horizontal", HTM), ("vertical", VTM)):
        model = build_model(small_config(tmp_path, **{name: section}), 10)
        draw(tmp_path / f"{name}.png", [scene_of(model, size=2)])
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_nothing_to_draw(tmp_path):
    scene = Scene(np.zeros((1, 4, 4, 3)), np.zeros(1, dtype=int), Recording([], []), 10, "plain")
    with pytest.raises(DataError, match="nothing to draw"):
        draw(tmp_path / "a.png", [scene])
    assert not (tmp_path / "a.png").exists()
