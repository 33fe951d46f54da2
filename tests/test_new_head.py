"""Weights of one data set as the beginning of another's: `model.new_head`."""

import pytest
import timm
import torch
from runs_helper import HTM, VTM, small_config
from test_checkpoint import golden_state

from experiments.checkpoint import load_weights, save_final_weights
from experiments.errors import CheckpointError
from experiments.models.build import build_model
from tokenmixup import HorizontalConfig, attach


@pytest.fixture
def model(tmp_path):
    return build_model(small_config(tmp_path, horizontal=HTM, vertical=VTM), 10)


def new_classifiers(model, path, names):
    """Load for other classes: whatever knows the classes stays, all else comes from the file."""
    before = {k: v.clone() for k, v in model.state_dict().items()}
    loaded = load_weights(model, path, new_head=True)
    assert loaded.left_out == tuple(names)
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]) == (name in names), name


def test_a_released_checkpoint_begins_another_data_set(tmp_path):
    state, _, _ = golden_state()
    # no two values alike by chance, as zeros of fresh biases are
    state = {name: value + 1 for name, value in state.items()}
    torch.save(state, tmp_path / "weights.bin")
    for classes in (7, 10):  # the same number of other classes is no reason to keep the old ones
        host = timm.create_model("cct_2_3x2_32", num_classes=classes)
        names = ["head.weight", "head.bias"]
        new_classifiers(host, tmp_path / "weights.bin", names)
        model = attach(
            timm.create_model("cct_2_3x2_32", num_classes=classes),
            horizontal=HorizontalConfig(layers=(0,), tau=0.1, rho=0.01),
        )
        scorenets = [name for name in model.state_dict() if name.startswith("scorenets.")]
        new_classifiers(
            model, tmp_path / "weights.bin", [f"backbone.{name}" for name in names] + scorenets
        )
    with pytest.raises(CheckpointError, match=r"classifier\.fc\.weight has shape"):
        load_weights(timm.create_model("cct_2_3x2_32", num_classes=7), tmp_path / "weights.bin")


def test_own_weights_begin_another_data_set(tmp_path, model):
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 1
    save_final_weights(tmp_path / "final.safetensors", model)
    for classes in (7, 10):
        fresh = build_model(small_config(tmp_path, seed=99, horizontal=HTM), classes)
        names = [n for n in fresh.state_dict() if n.startswith(("backbone.head.", "scorenets."))]
        assert len(names) > 2
        new_classifiers(fresh, tmp_path / "final.safetensors", names)
        plain = build_model(small_config(tmp_path, seed=99), classes)  # has no ScoreNet
        new_classifiers(plain, tmp_path / "final.safetensors", names[:2])
