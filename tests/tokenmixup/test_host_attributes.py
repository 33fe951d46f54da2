"""What the host tells others is read through the attached model."""

import copy
import pickle

import pytest
import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import group_modules, group_parameters
from timm.optim import create_optimizer_v2
from torch import nn

from tests.helpers.cases import same_bits
from tests.helpers.host_builders import CLASSES, WIDTH
from tests.helpers.host_cases import BY_NAME, batch, logits_of, some_hosts
from tokenmixup import HorizontalConfig, TokenMixupModel, VerticalConfig, attach

HTM = HorizontalConfig(layers=(1,), tau=0.25, rho=0.005)
VTM = VerticalConfig(layers=(2,), kappa=3)
timms_hosts = some_hosts("vit", "dinov2", "eva02", "rope_mixed", "beit_shared", "cct")


def attached(name, **settings):
    return attach(BY_NAME[name].build(), horizontal=HTM, vertical=VTM, **settings)


def test_data_config():
    host = timm.create_model("vit_small_patch16_384", depth=2, num_classes=3)
    found = resolve_model_data_config(attach(host, horizontal=HTM))
    assert found == resolve_model_data_config(host)
    assert found["input_size"] == (3, 384, 384) and found["crop_pct"] == 1.0
    assert found["mean"] == found["std"] == (0.5, 0.5, 0.5)


def test_attributes_properties_and_methods():
    model = attached("vit")
    host = model.backbone
    assert model.num_features == WIDTH and model.pretrained_cfg is host.pretrained_cfg
    assert model.get_classifier() is host.head and model.blocks is host.blocks
    model.set_grad_checkpointing()
    assert host.grad_checkpointing
    model = attached("hf_vit").bfloat16()
    assert model.config is model.backbone.config and model.config.num_labels == CLASSES
    assert model.dtype == torch.bfloat16 and model.device == torch.device("cpu")


def test_the_models_own_attributes_come_first():
    model = attached("vit")
    model.register_parameter("bias", nn.Parameter(torch.zeros(1)))
    model.backbone.enabled = model.backbone.bias = "the host's"
    assert model.enabled is True and torch.is_tensor(model.bias)


def test_parts_of_the_host_are_not_hidden_by_others():
    model = attached("vit")
    parts = {"head": nn.Linear(WIDTH, 9), "cls_token": nn.Parameter(torch.ones(1))}
    for name, part in {**parts, "global_pool": "avg", "grad_checkpointing": True}.items():
        with pytest.raises(AttributeError, match=rf"set it there: model\.backbone\.{name} = "):
            setattr(model, name, part)
    model.note, model.extra = "free", nn.Linear(1, 1)
    assert model.note == "free" and "extra.weight" in model.state_dict()


def test_attributes_that_neither_has():
    model = attached("torchvision")
    for name in ("pretrained_cfg", "group_matcher"):
        assert not hasattr(model, name)
    with pytest.raises(
        AttributeError,
        match=r"neither TokenMixupModel nor its host, a torchvision\S+VisionTransformer, has the "
        "attribute 'num_featurs'",
    ):
        assert model.num_featurs


def test_private_attributes_of_the_host_stay_its_own():
    """Tools mark modules by them, such as accelerate, which then calls another forward pass."""
    model = attached("vit")
    model.backbone._old_forward = model.backbone.forward
    assert not hasattr(model, "_old_forward")
    assert copy.deepcopy(model).backbone is not model.backbone


def test_a_model_in_the_making_has_no_host():
    empty = TokenMixupModel.__new__(TokenMixupModel)
    for name in ("backbone", "num_features", "_modules", "__setstate__"):
        with pytest.raises(AttributeError, match=name):
            object.__getattribute__(empty, "__getattr__")(name)
    for model in (copy.copy(attached("vit")), pickle.loads(pickle.dumps(attached("vit")))):
        assert model.num_features == WIDTH


# Names of parameters


def scales(model):
    """Learning-rate scale and weight decay of each parameter, from timm's factory."""
    optimizer = create_optimizer_v2(model, "adamw", lr=1, weight_decay=0.1, layer_decay=0.7)
    of_parameter = {
        parameter: (group["lr_scale"], group["weight_decay"])
        for group in optimizer.param_groups
        for parameter in group["params"]
    }
    return {name: of_parameter[parameter] for name, parameter in model.named_parameters()}


@timms_hosts
def test_layer_wise_learning_rates(case):
    host = case.build()
    expected = scales(host)
    assert len({scale for scale, _ in expected.values()}) == 3 + 2
    found = scales(attach(host, horizontal=HTM))
    for name, scale in found.items():
        if name.startswith("scorenets."):
            assert scale == (1.0, 0.1 if name.endswith("weight") else 0.0)  # as the head
        else:
            assert scale == expected[name.removeprefix("backbone.")], name
    assert len(found) == len(expected) + 4


def test_patterns_of_every_kind_match_behind_the_prefix():
    host = BY_NAME["vit"].build()
    host.group_matcher = lambda coarse: {
        "stem": r"^cls_token|(?:^pos_embed)|[^b]atch_embed\.",
        "none": None,
        "blocks": r"^blocks\.(\d+)\.[^n]" if coarse else [(r"blocks\.(\d+)\.(?:\^|norm1)", None)],
        "rest": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
    }
    model = attach(host)
    for coarse in (True, False):
        for group in (group_parameters, group_modules):
            expected = group(host, host.group_matcher(coarse=coarse), reverse=True)
            found = group(model, model.group_matcher(coarse=coarse), reverse=True)
            found.pop("backbone", None)  # the class token's and the position embedding's module
            assert {f"backbone.{name}": place for name, place in expected.items()} == found
            assert len(set(expected.values())) > 3


# Saving


def test_save_pretrained_writes_the_host(tmp_path):
    from transformers import ViTForImageClassification

    model = attached("hf_vit")
    model.save_pretrained(tmp_path)
    images, _ = batch(BY_NAME["hf_vit"])
    again, report = ViTForImageClassification.from_pretrained(tmp_path, output_loading_info=True)
    assert not any(report.values())
    assert same_bits(logits_of(again.eval()(images)), model.eval()(images))


# Replacing


@some_hosts("vit", "beit", "cct")
def test_another_classifier_after_attach_is_an_error_at_the_next_step(case):
    """ScoreNet would still have the old classes."""
    model = attach(case.build(), horizontal=HTM).train()
    images, targets = batch(case)
    model.reset_classifier(CLASSES)
    model(images, targets)
    model.reset_classifier(CLASSES + 2)
    message = rf"now has {CLASSES + 2} classes, but had {CLASSES} .*then attach again"
    with pytest.raises(RuntimeError, match=message):
        model(images, torch.rand(len(images), CLASSES + 2))
    assert model.eval()(images).shape[1] == CLASSES + 2
    again = attach(model.detach(), horizontal=HTM).train()
    assert again(images, torch.arange(len(images))).targets.shape[1] == CLASSES + 2
