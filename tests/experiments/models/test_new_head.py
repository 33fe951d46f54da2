"""Weights that begin a data set of other classes: all but what knows the classes is taken over."""

import pytest
import timm
import torch

from experiments.checkpoint import load_weights, save_final_weights
from experiments.errors import CheckpointError
from experiments.models.build import build_model
from tests.helpers.runs_helper import HTM, VTM, small_config
from tests.helpers.standins import cct_state
from tokenmixup import HorizontalConfig, attach

HEAD = ["head.weight", "head.bias"]


def new_classifiers(model, path, names):
    """Load: whatever knows the classes stays as it is, all else comes from the file."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = load_weights(model, path, new_head=True)
    assert loaded.left_out == tuple(names)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name in names), name


def host(classes):
    return timm.create_model("cct_7_3x1_32", num_classes=classes)


@pytest.mark.parametrize("classes", [7, 10])  # as many others are no reason to keep the old ones
def test_a_released_checkpoint(tmp_path, classes):
    path = tmp_path / "weights.bin"
    torch.save(cct_state(10, htm=2, vtm=3), path)
    new_classifiers(host(classes), path, HEAD)
    model = attach(host(classes), horizontal=HorizontalConfig(layers=(2,), tau=0.1, rho=0.01))
    scorenets = [name for name in model.state_dict() if name.startswith("scorenets.")]
    assert len(scorenets) == 4
    new_classifiers(model, path, [f"backbone.{name}" for name in HEAD] + scorenets)


def test_without_being_asked_nothing_is_left_out(tmp_path):
    path = tmp_path / "weights.bin"
    torch.save(cct_state(10, htm=2), path)
    with pytest.raises(CheckpointError, match=r"classifier\.fc\.weight .* is \(10, 256\)"):
        load_weights(host(7), path)


@pytest.mark.parametrize("classes", [7, 10])
def test_weights_of_our_own(tmp_path, classes):
    path = tmp_path / "final.safetensors"
    trained = build_model(small_config(tmp_path, horizontal=HTM, vertical=VTM), 10)
    with torch.no_grad():
        for parameter in trained.parameters():
            parameter += 1
    save_final_weights(path, trained)
    fresh = build_model(small_config(tmp_path, seed=99, horizontal=HTM), classes)
    names = [n for n in fresh.state_dict() if n.startswith(("backbone.head.", "scorenets."))]
    assert len(names) > 2
    new_classifiers(fresh, path, names)
    plain = build_model(small_config(tmp_path, seed=99), classes)  # has no ScoreNet
    new_classifiers(plain, path, names[:2])
