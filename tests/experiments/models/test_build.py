"""Building a model: which names are suggested, and that trying it out leaves no trace."""

import pytest
import timm
import torch

from experiments.config.schema import ModelConfig, RunConfig
from experiments.models import build
from tests.helpers.runs_helper import BOTH, small_config
from tokenmixup.hosts.cct import CCTAdapter
from tokenmixup.hosts.timm_beit import TimmBeit
from tokenmixup.hosts.timm_eva import TimmEva
from tokenmixup.hosts.timm_vit import TimmViT


@pytest.mark.parametrize("adapter", [TimmViT, TimmEva, TimmBeit, CCTAdapter])
def test_each_family_of_timms_models_is_suggested(adapter):
    modules = {name.split(".")[-2] for name in adapter.host_classes}
    assert modules <= set(build.HOST_MODULES)
    assert all(timm.list_models(module=module) for module in modules)


@pytest.mark.parametrize(
    ("misspelt", "nearest"),
    [
        ("vit_tiny_patch1_224", "vit_tiny_patch16_"),
        ("vit_bas_patch16_224", "vit_base_patch16_224"),
        ("deit_smal_patch16_224", "deit_small_patch16_224"),
        ("cct_7_3x1", "cct_7_3x1_32"),
    ],
)
def test_a_misspelt_name_suggests_a_supported_model(misspelt, nearest):
    with pytest.raises(build.ConfigError, match=f"the nearest is {nearest}"):
        build.build_model(RunConfig(model=ModelConfig(name=misspelt)), 10)


def test_trying_a_model_out_changes_nothing(tmp_path, monkeypatch):
    config = small_config(tmp_path, **BOTH)
    before = torch.get_rng_state()
    model = build.build_model(config, 10)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    monkeypatch.setattr(build, "_try_out", lambda *arguments: None)
    untried = build.build_model(config, 10)
    assert model.state_dict().keys() == untried.state_dict().keys()
    for name, value in untried.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_hosts_whose_constructor_takes_no_image_size():
    """As a PVT v2, which takes images of any size."""
    config = RunConfig(model=ModelConfig(name="pvt_v2_b0", image_size=32))
    model = build.build_model(config, 10)
    assert model(torch.zeros(2, 3, 32, 32), torch.tensor([0, 1])).logits.shape == (2, 10)
