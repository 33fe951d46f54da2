"""`attach` and `TokenMixupModel`: the interface, its errors, and that evaluation is the host's."""

import copy
import importlib
import json
from dataclasses import asdict

import numpy as np
import pytest
import timm
import torch
from timm.loss import SoftTargetCrossEntropy

from tests.helpers.small_vit import vit
from tokenmixup import HorizontalConfig, TokenMixupOutput, VerticalConfig, attach
from tokenmixup.hosts import HostAdapter, register_adapter
from tokenmixup.rules import Rules

importlib.import_module("experiments.models")  # registers CCT


def cct(**kwargs):
    return timm.create_model("cct_4_3x2_32", num_classes=5, **kwargs)


HOSTS = pytest.mark.parametrize("host", [cct, vit])
HTM = HorizontalConfig(layers=(1,), tau=0.9, rho=1e-5)
VTM = VerticalConfig(layers=(2,), kappa=2)


def batch(size=6, classes=5):
    return torch.randn(size, 3, 32, 32), torch.rand(size, classes).softmax(-1)


def test_names_of_the_scorenets_weights():
    keys = [key for key in attach(vit(), horizontal=HTM).state_dict() if "backbone." not in key]
    assert keys == [f"scorenets.1.{n}.{m}" for n in ("pool", "head") for m in ("weight", "bias")]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        (HorizontalConfig(layers=(0, 2), tau=1, rho=0), "ScoreNets with .* at layers 0, 2"),
        (HorizontalConfig(layers=(1,), tau=1, rho=0, scorenet="cls"), "ScoreNet without .* at lay"),
        (None, "no ScoreNet"),
    ],
    ids=["layers", "pooling", "none"],
)
def test_weights_of_other_settings_are_told(other, named):
    """Settings themselves go to and from plain dicts, as a YAML or JSON file holds them."""
    model, another = attach(vit(), horizontal=HTM), attach(vit(), horizontal=other)
    own = "ScoreNet with attention pooling at layer 1"
    with pytest.raises(
        RuntimeError, match=f"of a model with {named}.*, this one has {own}: attach"
    ):
        model.load_state_dict(another.state_dict())
    assert other is None or type(other)(**json.loads(json.dumps(asdict(other)))) == other
    assert VerticalConfig(**json.loads(json.dumps(asdict(VTM)))) == VTM
    model.load_state_dict(another.state_dict(), strict=False)


@pytest.mark.parametrize("horizontal", [HTM, None], ids=["HTM", "no HTM"])
@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", None])
def test_weights_of_other_names_are_told(horizontal, prefix):
    model = attach(vit(), horizontal=horizontal)
    weights = model.backbone.state_dict()
    if prefix is not None:
        weights = {prefix + name: value for name, value in model.state_dict().items()}
    first = next(iter(weights))
    with pytest.raises(RuntimeError, match=rf"begin as '{first}': .*model\.backbone\.load_state"):
        model.load_state_dict(weights)
    with pytest.raises(RuntimeError, match="begin as"):  # it would load nothing
        model.load_state_dict(weights, strict=False)


def test_weights_of_a_host_with_a_part_that_is_called_backbone():
    host = torch.nn.Module()
    host.backbone = torch.nn.Sequential(
        *(torch.nn.TransformerEncoderLayer(32, 2, 48, batch_first=True) for _ in range(2))
    )
    model = attach(
        host,
        layers=host.backbone,
        num_prefix_tokens=0,
        class_token=False,
        num_classes=7,
        vertical=VerticalConfig(layers=(1,), kappa=3),
    )
    model.load_state_dict(model.state_dict())
    with pytest.raises(RuntimeError, match=r"begin as 'backbone\.0\.self_attn"):
        model.load_state_dict(host.state_dict(), strict=False)


def test_settings_do_not_change_after_attach():
    """The hooks have them: another value would be printed and saved, and nothing else."""
    model = attach(vit(), horizontal=HTM, vertical=VTM)
    for name, value in (("horizontal", None), ("vertical", VTM), ("rules", Rules())):
        with pytest.raises(AttributeError, match=rf"'{name}' .*detach\(\), attach with the new"):
            setattr(model, name, value)
    again = attach(model.detach(), horizontal=HorizontalConfig(layers=(1,), tau=0.1, rho=0.2))
    again.scorenets.load_state_dict(model.scorenets.state_dict())


@pytest.mark.parametrize("size", [5, 6])
def test_a_criterion_gets_soft_targets_also_while_nothing_is_mixed(size):
    """Also of as many samples as classes, where indices would broadcast to a meaningless loss."""
    model = attach(vit(), horizontal=HTM).train()
    model.enabled = False
    labels = torch.arange(size) % 5
    out = model(batch(size)[0], labels)
    assert out.targets is labels
    assert out.loss(SoftTargetCrossEntropy()).item() == pytest.approx(out.loss().item())
    several = torch.ones(size, 5)  # labels per image: no distribution, and as they were given
    out = model(batch(size)[0], several)
    assert out.loss(lambda logits, targets: targets.sum()).item() == 5 * size


def test_what_training_returns():
    model = attach(vit(), horizontal=HTM, vertical=VTM).train()
    images, targets = batch()
    out = model(images, targets)
    assert isinstance(out, TokenMixupOutput)
    assert out._fields == ("logits", "targets", "scorenet_loss", "stats")
    assert out.logits.shape == out.targets.shape == (6, 5)
    assert out.scorenet_loss.shape == () and out.scorenet_loss > 0
    assert all(value.shape == () for value in out.stats.values())
    assert out.stats["htm/layer1/easy_share"] == 1
    assert out.stats["vtm/layer2/remembered_tokens"] == 2 * 2


def test_loss():
    model = attach(vit(), horizontal=HTM, vertical=VTM).train()
    images, targets = batch()
    out = model(images, targets)
    expected = -(out.targets * out.logits.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(out.loss(), expected + out.scorenet_loss)
    torch.testing.assert_close(
        out.loss(lambda logits, mixed: 2 * (logits.sum() + mixed[0, 0])),
        2 * (out.logits.sum() + out.targets[0, 0]) + out.scorenet_loss,
    )
    with pytest.raises(ValueError, match=r"must return a 0-d loss, but returned \(6,\)"):
        out.loss(torch.nn.CrossEntropyLoss(reduction="none"))
    with pytest.raises(ValueError, match=r"no targets .*: call model\(images, targets\)"):
        attach(vit(), vertical=VTM).train()(images).loss()


def test_half_precision_logits_have_a_float32_loss():
    model = attach(vit(), horizontal=HTM).bfloat16().train()
    images, _ = batch()
    for model.enabled in (True, False):
        out = model(images.bfloat16(), torch.arange(6) % 5)
        assert out.logits.dtype == torch.bfloat16 and out.loss().dtype == torch.float32


@HOSTS
def test_a_model_that_is_not_enabled_trains_as_its_plain_host(host):
    torch.manual_seed(5)
    model = attach(host(drop_path_rate=0.3), horizontal=HTM, vertical=VTM).train()
    plain = copy.deepcopy(model).detach()
    images, soft = batch()
    for targets in (soft, torch.arange(6) % 5, None):
        model.zero_grad()
        plain.zero_grad()
        model.enabled = False
        torch.manual_seed(3)
        out = model(images, targets)
        torch.manual_seed(3)
        logits = plain(images)
        assert torch.equal(out.logits, logits)
        assert out.targets is targets and out.scorenet_loss == 0 and out.stats == {}
        if targets is not None:
            expected = torch.nn.functional.cross_entropy(logits, targets)
            torch.testing.assert_close(out.loss(), expected)
            out.loss().backward()
            expected.backward()
            for name, parameter in plain.named_parameters():
                torch.testing.assert_close(model.backbone.get_parameter(name).grad, parameter.grad)
            # DistributedDataParallel waits for these
            assert all((p.grad == 0).all() for p in model.scorenets.parameters())
    assert not copy.deepcopy(model).enabled
    model.enabled = True
    assert model(images, soft).stats["htm/layer1/tokens_mixed"] > 0


def test_class_indices_are_made_one_hot():
    model = attach(vit(), horizontal=HTM).train()
    images, _ = batch()
    indices = torch.tensor([0, 4, 2, 1, 0, 3])
    soft = torch.eye(5)[indices]
    first, second = model(images, indices), model(images, soft)
    assert torch.equal(first.targets, second.targets)
    assert torch.equal(first.logits, second.logits)


def test_plain_model_in_the_same_shell():
    host = vit().train()
    images, targets = batch()
    out = attach(host).train()(images, targets)
    assert torch.equal(out.logits, host(images)) and out.targets is targets
    assert out.scorenet_loss == 0 and out.stats == {}


def test_vertical_alone_needs_no_targets():
    out = attach(vit(), vertical=VTM).train()(batch()[0])
    assert out.targets is None and out.logits.shape == (6, 5)


def test_attaching_twice_is_an_error_and_detach_undoes_it():
    host = vit()
    model = attach(host, horizontal=HTM, vertical=VTM)
    attach(copy.deepcopy(model).detach(), vertical=VTM)
    for again in (host, model, copy.deepcopy(host)):
        with pytest.raises(ValueError, match=r"already: .*copy the TokenMixupModel"):
            attach(again, horizontal=HTM)
    assert model.detach() is host
    modules = list(host.modules())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in modules)
    attach(host, horizontal=HTM)


def test_hooks_of_others_do_not_matter():
    host = vit()
    host.blocks[1].register_forward_pre_hook(lambda *_: None)
    assert attach(host, horizontal=HTM).detach() is host
    assert len(host.blocks[1]._forward_pre_hooks) == 1


@pytest.mark.parametrize(
    "host, arguments, message",
    [
        (
            vit,
            {"horizontal": HorizontalConfig(layers=(4,), tau=0.1, rho=0)},
            "has 4 layers, 0 to 3",
        ),
        (vit, {"vertical": VerticalConfig(layers=(9,), kappa=1)}, "layer 9.* has 4 layers"),
        (vit, {"vertical": VerticalConfig(layers=(1,), kappa=5)}, "kappa is 5.* only 4 patch"),
        (vit, {"horizontal": {"layers": (1,)}}, "^horizontal must be a HorizontalConfig"),
        (vit, {"vertical": HTM}, "^vertical must be a VerticalConfig"),
        (vit, {"num_classes": 7}, "num_classes is 7, but the model's classifier has 5"),
        (lambda: "vit_tiny_patch16_224", {}, r"timm.create_model\('vit_tiny_patch16_224'\)"),
        (lambda: vit, {}, r"must be a model \(torch.nn.Module\).*got <function vit"),
    ],
)
def test_what_cannot_be_attached(host, arguments, message):
    with pytest.raises(ValueError, match=message):
        attach(host(), **arguments)


@pytest.mark.parametrize(
    "kind, arguments, message",
    [
        (HorizontalConfig, {"layers": (), "tau": 0.1, "rho": 0.1}, "at least one layer"),
        (HorizontalConfig, {"layers": (-1,), "tau": 0.1, "rho": 0.1}, ">= 0, got -1"),
        (HorizontalConfig, {"layers": (1, 1), "tau": 0.1, "rho": 0.1}, "twice"),
        (HorizontalConfig, {"layers": 3, "tau": 0.1, "rho": 0.1}, "sequence of layer indices"),
        (HorizontalConfig, {"layers": ("1",), "tau": 0.1, "rho": 0.1}, "got '1'"),
        (HorizontalConfig, {"layers": (True,), "tau": 0.1, "rho": 0.1}, "got True"),
        (HorizontalConfig, {"layers": (1,), "tau": -0.1, "rho": 0.1}, "tau must be .*-0.1"),
        (HorizontalConfig, {"layers": (1,), "tau": float("nan"), "rho": 0.1}, "tau .* nan"),
        (HorizontalConfig, {"layers": (1,), "tau": 0.1, "rho": -1}, "rho must be .* -1"),
        (HorizontalConfig, {"layers": (1,), "tau": 0.1, "rho": float("inf")}, "rho .* inf"),
        (HorizontalConfig, {"layers": (1,), "tau": "x", "rho": 0.1}, "tau .* 'x'"),
        (HorizontalConfig, {"layers": (1,), "rho": 0.1}, "tau is needed"),
        (
            HorizontalConfig,
            {"layers": (1,), "tau": 0.1, "rho": 0.1, "scorenet": "max"},
            "attention, cls, average.* got 'max'",
        ),
        (
            HorizontalConfig,
            {"layers": (1,), "tau": 0.1, "rho": 0.1, "scorenet_lambda": -1},
            "scorenet_lambda",
        ),
        (
            HorizontalConfig,
            {"layers": (1,), "tau": 0.1, "rho": 0.1, "scorenet_stop_gradient": 1},
            "scorenet_stop_gradient must be True or False",
        ),
        (
            HorizontalConfig,
            {"layers": (1,), "tau": 0.1, "rho": 0.1, "labels": "token"},
            "labels must be one of saliency, tokens; got 'token'",
        ),
        (VerticalConfig, {"layers": (0,), "kappa": 1}, r"no earlier layer to attend to\), got 0"),
        (VerticalConfig, {"layers": (1,), "kappa": 0}, "kappa must be an integer >= 1, got 0"),
        (VerticalConfig, {"layers": (1,), "kappa": 1.5}, "kappa must be an integer >= 1, got 1.5"),
        (
            VerticalConfig,
            {"layers": (1,), "kappa": 1, "stop_gradient": None},
            r"^V\w+\.stop_g",
        ),
    ],
)
def test_impossible_settings(kind, arguments, message):
    with pytest.raises(ValueError, match=message):
        kind(**arguments)


@pytest.mark.parametrize(
    "targets, message",
    [
        (None, "call model\\(images, targets\\)"),
        (torch.rand(6, 4), r"\(6, 5\), got shape \(6, 4\)"),
        (torch.rand(5, 5), r"\(6, 5\), got shape \(5, 5\)"),
        (torch.full((6, 5), float("nan")), r"targets\[0\] has sum nan"),
        (torch.eye(6)[:, :5], r"targets\[5\] has sum 0 and minimum 0"),  # one row is bad
        (torch.full((6, 5), 0.22), r"targets\[0\] has sum 1.1 "),
        (torch.tensor([[1.1, 0, 0, -0.1, 0]] * 6), r"targets\[0\] has sum 1 and minimum -0.1"),
        (torch.tensor([0, 1, 2, 3, 4, 5]), r"targets\[5\] is 5"),
        (torch.tensor([0, 1, 2, -1, 4, 0]), r"targets\[3\] is -1"),
        (torch.ones(6, 5, dtype=torch.bool), "torch.bool"),
        (torch.ones(6, 5, dtype=torch.long), r"int64 of shape \(6, 5\)"),
        ([0, 1, 2, 3, 4, 0], r"must be a tensor.* class indices \(6,\); got list"),
    ],
)
def test_impossible_targets(targets, message):
    model = attach(vit(), horizontal=HTM).train()
    with pytest.raises(ValueError, match=message):
        model(batch()[0], targets)


@pytest.mark.parametrize("targets", [torch.empty(0, 5), torch.empty(0, dtype=torch.long)])
def test_an_empty_batch(targets):
    """HTM has nothing to mix and no mean loss; what VTM alone does is what the host does."""
    images = torch.empty(0, 3, 32, 32)
    with pytest.raises(ValueError, match=r"has no samples.*Leave empty batches out"):
        attach(vit(), horizontal=HTM).train()(images, targets)
    assert attach(vit(), vertical=VTM).train()(images, targets).logits.shape == (0, 5)


def test_mode_is_the_hosts():
    """Also where parts of the host are in another mode, as frozen ones often are."""
    for training in (True, False):
        host = vit().train(training)
        host.norm.train(not training)
        model = attach(host, horizontal=HTM)
        modes = {model.training, *(module.training for module in model.scorenets.modules())}
        assert modes == {training} and host.training is training
        assert host.norm.training is not training


def test_targets_in_evaluation_are_an_error():
    model = attach(vit(), horizontal=HTM).eval()
    with pytest.raises(ValueError, match="evaluation mode"):
        model(*batch())


def test_an_adapter_of_a_known_class_cannot_be_registered_again():
    class Again(HostAdapter):
        family = "again"
        host_classes = ("timm.models.vision_transformer.VisionTransformer",)
        check = layers = layout = attention = normalise = query_key = None

    Again.__abstractmethods__ = frozenset()
    with pytest.raises(ValueError, match="registered already: timm VisionTransformer"):
        register_adapter(Again())


def test_logits_of_an_evaluation_can_be_saved(tmp_path):
    """Warnings are errors here: torch warns of hooks that it cannot save."""
    model = attach(vit(), horizontal=HTM).eval()
    logits = model(batch()[0])
    torch.save(logits, tmp_path / "logits.pt")
    assert torch.equal(torch.load(tmp_path / "logits.pt", weights_only=True), logits)


def test_what_detach_has_left_is_not_trained():
    model = attach(vit(), horizontal=HTM, vertical=VTM).train()
    model.detach()
    with pytest.raises(RuntimeError, match=r"detach\(\) removed TokenMixup"):
        model(*batch())


def test_a_model_inside_itself_is_told():
    host = vit()
    model = attach(host, vertical=VTM).train()
    images, _ = batch()
    host.blocks[0].register_forward_pre_hook(lambda *_: model(images) and None)
    with pytest.raises(RuntimeError, match="called inside a training step of its own"):
        model(images)


@HOSTS
def test_a_projection_that_was_exchanged_after_attach_takes_part(host):
    """Its hook is on the old one, from whose output layer 0 cannot choose any more."""
    model = attach(host(), vertical=VTM).train()
    images, targets = batch()
    expected = model(images, targets)
    attention = model.backbone.blocks[0].attn
    attention.qkv = copy.deepcopy(attention.qkv)
    attention.qkv._forward_hooks.clear()
    out = model(images, targets)
    torch.testing.assert_close(out.logits, expected.logits)
    assert out.stats == expected.stats


def test_gradients_by_torch_func():
    model = attach(vit(), horizontal=HTM, vertical=VTM).train()
    images, targets = batch()

    def loss(parameters):
        out = torch.func.functional_call(model, parameters, (images, targets))
        return out.logits.square().mean() + out.scorenet_loss

    parameters = dict(model.named_parameters())
    found = torch.func.grad(loss)({n: p.detach() for n, p in parameters.items()})
    loss(parameters).backward()
    for name, parameter in parameters.items():
        torch.testing.assert_close(found[name], parameter.grad, msg=name)


def test_numbers_of_numpy_become_pythons():
    config = HorizontalConfig(layers=np.array([2, 1]), tau=np.float32(0.25), rho=np.float64(0.5))
    assert (config.layers, config.tau, config.rho) == ((1, 2), 0.25, 0.5)
    assert type(config.tau) is float and all(type(layer) is int for layer in config.layers)
    kappa = VerticalConfig(layers=(1,), kappa=np.int64(3)).kappa
    assert type(kappa) is int and kappa == 3
    with pytest.raises(ValueError, match="tau must be a finite number >= 0"):
        HorizontalConfig(layers=(1,), tau=np.float32("nan"), rho=0.5)
