"""The released names: each tensor has its place, or an error names it.

`test_golden_evaluate.py` compares what the models then compute with the authors' code.
"""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from timm.models import load_checkpoint
from timm.models.vision_transformer import checkpoint_filter_fn

import experiments.models  # registers CCT
import tokenmixup
from experiments.released import load_released
from tests.helpers.standins import cct_state, vit_state

DATA = Path(__file__).parent.parent / "data"


def cct(**kwargs):
    return timm.create_model("cct_2_3x2_32", num_classes=10, **kwargs)


def vit(**kwargs):
    return timm.create_model(
        "vit_base_patch16_224",
        embed_dim=48,
        depth=4,
        num_heads=3,
        mlp_ratio=2,
        num_classes=10,
        **{"img_size": 64, **kwargs},
    )


def attached(family):
    host, horizontal, pooling, vertical = {
        "cct": (cct(), 0, "attention", 1),
        "vit": (vit(), 1, "cls", 2),
    }[family]
    return tokenmixup.attach(
        host,
        horizontal=tokenmixup.HorizontalConfig(
            layers=(horizontal,), tau=0.1, rho=0.003, scorenet=pooling
        ),
        vertical=tokenmixup.VerticalConfig(layers=(vertical,), kappa=3),
    )


def released(family):
    name = {"cct": "cct_2_3x2_32_eval.npz", "vit": "vit_tiny_eval.npz"}[family]
    with np.load(DATA / name, allow_pickle=False) as file:
        names = [name for name in file.files if name.startswith("sd/")]
        return {name.removeprefix("sd/"): torch.from_numpy(file[name]) for name in names}


FAMILIES = pytest.mark.parametrize("family", ["cct", "vit"])


@FAMILIES
def test_every_tensor_arrives_where_it_belongs(family):
    # Each released tensor filled with a number of its own must be found again, wholly, in ours.
    state_dict = released(family)
    marked = {n: torch.full_like(t, 1.0 + i) for i, (n, t) in enumerate(state_dict.items())}
    model = attached(family)
    load_released(model, marked)
    found = torch.cat([t.flatten() for t in model.state_dict().values()])
    for tensor in marked.values():
        assert (found == tensor.flatten()[0]).sum() == tensor.numel()
    assert len(found) == sum(t.numel() for t in marked.values())


@FAMILIES
@pytest.mark.parametrize("make", ["plain", "attached"])
def test_a_failed_load_changes_nothing(family, make):
    state_dict = released(family)
    model = {"cct": cct, "vit": vit}[family]() if make == "plain" else attached(family)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    dropped = next(name for name in state_dict if name.endswith("norm.weight"))
    with pytest.raises(ValueError, match=r"missing in the file: .*norm\d?\.weight"):
        load_released(model, {n: t for n, t in state_dict.items() if n != dropped})
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    "family, edit, message",
    [
        ("cct", lambda s: s | {"classifier.mask": torch.ones(1)}, "classifier.mask"),
        ("vit", lambda s: s | {"transformer.extra": torch.ones(1)}, "transformer.extra"),
        (
            "cct",
            lambda s: s | {"classifier.fc.bias": torch.ones(7)},
            r"classifier.fc.bias .*\(7,\)",
        ),
        (
            "cct",
            lambda s: {n: t for n, t in s.items() if "attn.key" not in n},
            "self_attn.value.weight without key",
        ),
        (
            "cct",
            lambda s: s | {"classifier.blocks.1.self_attn.qkv.weight": torch.ones(384, 128)},
            "beside a joint qkv",
        ),
        (
            "cct",
            lambda s: s | {"classifier.blocks.2.norm1.weight": torch.ones(128)},
            r"without a place in the model: classifier.blocks.2.norm1.weight \(here",
        ),
        ("vit", lambda s: {"a": torch.ones(1), "b": torch.ones(1)}, "none of the released names"),
    ],
)
def test_what_cannot_be_accounted_for_is_named(family, edit, message):
    state_dict = released(family)
    with pytest.raises(ValueError, match=message):
        load_released(attached(family), edit(state_dict))


@pytest.mark.parametrize("make", ["plain", "attached"])
def test_a_released_vit_is_resized_to_other_images_as_timm_does(tmp_path, make):
    path, plain = tmp_path / "plain.pth", vit()
    load_released(plain, released("vit"))
    torch.save(plain.state_dict(), path)
    theirs, ours = vit(img_size=96), vit(img_size=96)
    load_checkpoint(theirs, str(path), filter_fn=checkpoint_filter_fn)
    model = ours if make == "plain" else tokenmixup.attach(ours)
    loaded = load_released(model, released("vit"))
    assert loaded.resized and any("resized" in note for note in loaded.notes)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=0, atol=0, msg=name)


def test_released_learned_embedding_does_not_fit_an_honest_sine_model():
    state_dict = released("cct")
    assert "cct_2_3x2_32_sine" in experiments.models.CCT_NAMES
    model = timm.create_model("cct_2_3x2_32_sine", num_classes=10)
    with pytest.raises(ValueError, match=r"without a place .*classifier\.positional_emb"):
        load_released(model, state_dict)


def test_stand_ins_have_the_released_layout():
    """What other tests take for released checkpoints has the published number of parameters."""
    assert sum(value.numel() for value in cct_state(10, htm=2).values()) == 3_762_966
    assert len(vit_state(10, htm=1, width=48, layers=2, mlp=96)) == 4 + 2 * 16 + 2 + 2 + 2
