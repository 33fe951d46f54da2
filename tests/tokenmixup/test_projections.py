"""Projections that are more than a linear layer: with peft's adapters, parametrised, pruned.

Whatever stands in a projection's place takes part in saliency as in the layer, or is refused.
"""

import copy
import itertools

import peft
import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations, prune

from tests.helpers.cases import same_bits
from tests.helpers.checkpointing import assert_same_gradients, checkpointed, loss_of
from tests.helpers.host_builders import HostCase
from tests.helpers.host_cases import BY_NAME, batch, logits_of, some_hosts
from tests.helpers.others_warnings import uses_inductor
from tokenmixup import HorizontalConfig, TokenMixupModel, VerticalConfig, attach
from tokenmixup.hosts import UnsupportedHostError
from tokenmixup.rules import Rules

HTM = HorizontalConfig(layers=(1,), tau=0.25, rho=0.005)
VTM = VerticalConfig(layers=(2,), kappa=3)
MIX_NONE = HorizontalConfig(layers=(1,), tau=0, rho=0.01)
READ = ("qkv", "q_proj", "k_proj", "v_proj", "o_proj", "query", "key", "value", "dense", "q", "kv")
MLP = ("fc1", "fc2", "fc1_g", "fc1_x")
CLASSIFIERS = ("head", "classifier")
# as docs/training_loop.md writes it
SCORENET_TOO = ("backbone.head", "backbone.classifier", "scorenets.1")

# peft reads an attribute of its hosts that transformers deprecates.
pytestmark = pytest.mark.filterwarnings(
    "ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"
)


def host_of(case: HostCase, dropout: float = 0.0) -> nn.Module:
    """In float64, where the merged weights decide as the adapters do."""
    torch.manual_seed(2)  # some biases are random
    host = case.build(dropout).double()
    if case.name in ("eva02", "beit"):
        for block in host.blocks:  # these multiply by `qkv.weight` otherwise
            block.attn.qkv_bias_separate = True
    return host


def adapt(model, dora=False, dropout=0.0, targets=(*READ, "proj", *MLP), save=CLASSIFIERS):
    """peft's adapters with weights that matter, drawn from a seed."""
    config = peft.LoraConfig(
        target_modules=list(targets),
        modules_to_save=[name for name in save if name in str(dict(model.named_modules()).keys())],
        lora_dropout=dropout,
        use_dora=dora,
    )
    adapted = peft.get_peft_model(model, config)
    generator = torch.Generator().manual_seed(9)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3, generator=generator)
            elif "lora_A" in name:
                parameter.normal_(std=parameter[0].numel() ** -0.5, generator=generator)
    return adapted.train()


def put_on(host, vtm=True, **settings):
    torch.manual_seed(5)  # ScoreNet's weights
    both = {"horizontal": HTM, "vertical": VTM if vtm else None}
    return attach(host, **both | settings).train()


def assert_same_step(model, other, images, targets):
    """Outputs; and that something was mixed, since the same nothing proves nothing."""
    out, expected = model(images, targets), other(images, targets)
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.targets, expected.targets)
    torch.testing.assert_close(out.stats, expected.stats)
    assert (expected.targets - targets).abs().max() > 1e-3
    return out


@pytest.mark.parametrize(
    "name, dora",
    [
        *((name, False) for name in ("vit", "eva02", "eva02_separate", "beit", "hf_vit", "cct")),
        *((name, False) for name in ("swin", "hiera", "mvit")),
        *((name, True) for name in ("vit", "hf_vit")),
    ],
)
def test_adapters_decide_as_their_merged_weights(name, dora):
    """peft before attach, after it, and merged in place."""
    case = BY_NAME[name]
    images, targets = batch(case, dtype=torch.float64)
    merged = put_on(adapt(host_of(case), dora).merge_and_unload(), case.vtm)
    plain = put_on(host_of(case), case.vtm)
    torch.manual_seed(5)
    after = adapt(put_on(host_of(case), case.vtm), dora, save=SCORENET_TOO)
    before = put_on(adapt(host_of(case), dora), case.vtm)
    for model in (before, after):
        out = assert_same_step(model, merged, images, targets)
        out.loss().backward()
        grads = {n for n, p in model.named_parameters() if p.grad is not None}
        assert all(p.requires_grad == (n in grads) for n, p in model.named_parameters())
        assert any("scorenets" in name for name in grads) and any("lora_A" in n for n in grads)
    assert not torch.allclose(out.targets, plain(images, targets).targets, atol=1e-3)
    for adapted in (before.backbone, after):
        adapted.merge_adapter()
    for model in (before, after):
        assert_same_step(model, merged, images, targets)
    after.unmerge_adapter()
    back = after.merge_and_unload()
    assert isinstance(back, TokenMixupModel)
    assert_same_step(back, merged, images, targets)
    torch.testing.assert_close(back.eval()(images), merged.eval()(images))


@some_hosts("vit", "hf_vit", "cct")
def test_dropout_of_adapters(case):
    """It is no part of saliency, and its random numbers are those of the plain host."""
    images, targets = batch(case, dtype=torch.float64)
    remembered = []

    class Noting(Rules):
        def choose(self, layer, saliency, kappa):
            remembered.append(saliency)
            return super().choose(layer, saliency, kappa)

    first = {
        "horizontal": HorizontalConfig(layers=(0,), rho=0.005, scorenet=None),
        "vertical": VerticalConfig(layers=(1,), kappa=3),
        "rules": Noting(),
    }
    inner = (*READ, *MLP)  # what layer 0 gets is the same then
    merged = put_on(adapt(host_of(case), targets=inner).merge_and_unload(), **first)
    for model in (
        put_on(adapt(host_of(case), dropout=0.5, targets=inner), **first),
        adapt(put_on(host_of(case), **first), dropout=0.5, targets=inner),
    ):
        torch.testing.assert_close(model(images, targets).targets, merged(images, targets).targets)
        torch.testing.assert_close(*remembered[-2:])

    plain = adapt(host_of(case, 0.1), dropout=0.5)
    model = put_on(copy.deepcopy(plain), horizontal=MIX_NONE, vertical=None)
    torch.manual_seed(3)
    expected = logits_of(plain(images))
    torch.manual_seed(3)
    assert same_bits(model(images, targets).logits, expected)


@some_hosts("vit", "hf_vit", "cct")
def test_checkpointing_with_dropout_of_adapters(case):
    model = put_on(adapt(host_of(case), dropout=0.5))
    again = checkpointed(case, model)
    images, targets = batch(case, dtype=torch.float64)
    for one in (model, again):
        torch.manual_seed(3)
        loss_of(one(images, targets)).backward()
    assert_same_gradients(again, model)


@uses_inductor
@some_hosts("vit")
def test_compiling_with_adapters(case, fresh_compiler):
    images, targets = batch(case, dtype=torch.float64)
    model = adapt(put_on(host_of(case)), dropout=0.5, save=SCORENET_TOO)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0  # compiled code draws other random numbers
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_same_step(compiled, model, images, targets)


@some_hosts("vit")
def test_adapters_and_scorenets_are_saved_and_loaded(case, tmp_path):
    images, targets = batch(case, dtype=torch.float64)
    model = adapt(put_on(host_of(case)), save=SCORENET_TOO)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    expected = model(images, targets)
    model.save_pretrained(tmp_path)
    other = attach(host_of(case), horizontal=HTM, vertical=VTM)
    loaded = peft.PeftModel.from_pretrained(other, tmp_path, is_trainable=True).train()
    out = loaded(images, targets)
    assert same_bits(out.logits, expected.logits) and same_bits(out.targets, expected.targets)
    assert same_bits(out.scorenet_loss, expected.scorenet_loss)


def test_peft_around_a_host_and_what_it_tells():
    model = put_on(adapt(host_of(BY_NAME["vit"])))
    prefix = "backbone.base_model.model."
    assert model.num_classes == 7 and model.num_features == 32
    assert f"{prefix}pos_embed" in model.no_weight_decay()
    assert all(
        pattern.startswith("^" + prefix.replace(".", r"\."))
        for pattern, _ in model.group_matcher()["blocks"]
    )
    images = batch(BY_NAME["vit"])[0].double()
    expected = model.eval()(images)
    merged = model.detach().merge_and_unload()
    assert merged.state_dict().keys() == host_of(BY_NAME["vit"]).state_dict().keys()
    torch.testing.assert_close(merged.eval()(images), expected)
    with pytest.raises(ValueError, match="attached to this model already"):
        attach(adapt(put_on(host_of(BY_NAME["vit"])), save=()))


# What is refused


@some_hosts("eva02", "beit")
def test_hosts_that_read_the_weight_themselves(case):
    """They would ignore what stands in its place, without a word."""
    before, after = case.build(), put_on(case.build())
    for host in (before, after.backbone):
        for block in host.blocks:
            block.attn.qkv = nn.Sequential(block.attn.qkv)
    images, targets = batch(case)
    message = r"a torch\S+Sequential stands in the place of .* has no effect.*qkv_bias_separate"
    with pytest.raises(UnsupportedHostError, match=message):
        attach(before)
    with pytest.raises(UnsupportedHostError, match=message):
        after(images, targets)


def test_adapters_of_the_multi_head_attention():
    """peft adds to its weights inside the call, so there is nothing to read before it."""
    case = BY_NAME["torchvision"]
    message = r"peft\S+MultiheadAttention.*: put peft's adapters on other modules"
    with pytest.raises(UnsupportedHostError, match=message):
        attach(adapt(case.build(), targets=["self_attention"], save=()))
    model = adapt(put_on(case.build()), targets=["self_attention"], save=())
    with pytest.raises(UnsupportedHostError, match=f"layer 0 was replaced by a {message}"):
        model(*batch(case))


@some_hosts("pvt", "pvt_last_stage")
def test_adapters_of_pvts_keys(case):
    """The layer's hook is on `kv` itself, so its adapters come before it or not at all."""
    images, targets = batch(case, dtype=torch.float64)
    merged = put_on(adapt(host_of(case)).merge_and_unload(), case.vtm)
    before = put_on(adapt(host_of(case)), case.vtm)
    assert_same_step(before, merged, images, targets).loss().backward()
    adapters = [p for n, p in before.named_parameters() if ".attn.kv.lora_" in n]
    assert adapters and all(p.grad.any() for p in adapters)
    after = adapt(put_on(host_of(case), case.vtm), save=SCORENET_TOO)
    with pytest.raises(UnsupportedHostError, match=r"was replaced by a peft\S+Linear"):
        after(images, targets)
    others = [name for name in READ if name != "kv"]
    one, other = (adapt(put_on(host_of(case), case.vtm), targets=others) for _ in range(2))
    assert_same_step(one, other.merge_and_unload(), images, targets)


def test_adapters_of_torchvisions_mlp():
    case = BY_NAME["torchvision"]
    images, targets = batch(case, dtype=torch.float64)
    mlp = ["mlp.0", "mlp.3"]
    merged = put_on(adapt(host_of(case), targets=mlp, save=()).merge_and_unload())
    for model in (
        put_on(adapt(host_of(case), targets=mlp, save=("heads.head",))),
        adapt(put_on(host_of(case)), targets=mlp, save=("heads.head", "scorenets.1")),
    ):
        assert_same_step(model, merged, images, targets)


# Without peft


def with_norm(linear):
    parametrizations.weight_norm(linear)
    with torch.no_grad():
        linear.parametrizations.weight.original0.mul_(1.5)


def pruned(linear):
    prune.random_unstructured(linear, "weight", amount=0.5)


PARTS = ("qkv", "q_proj", "k_proj")


def change_projections(host, change):
    for module in host.modules():
        for part in [getattr(module, name, None) for name in PARTS]:
            if isinstance(part, nn.Linear):
                change(part)


def changed(case, change, first, **settings):
    """A host whose projections are changed first, or after TokenMixup has been put on it."""
    host = host_of(case)
    if first:
        change_projections(host, change)
    model = put_on(host, **settings)
    if not first:
        change_projections(host, change)
    return model


@torch.no_grad()
def plain_weights(host, plain):
    """Give a plain host the weights that another one has in effect, read in evaluation."""
    found = dict(host.named_parameters())
    for name, parameter in plain.named_parameters():
        module = host.get_submodule(name.rpartition(".")[0])
        if f"{name}_orig" in found:
            parameter.copy_(found[f"{name}_orig"] * module.weight_mask)
        elif name in found:
            parameter.copy_(found[name])
        else:
            parameter.copy_(module.eval().weight)
            module.train()
    return plain


# EVA's and BEiT's attention never calls `qkv`, as which torch prunes.
@pytest.mark.parametrize(
    "name, change",
    [
        *itertools.product(
            ("vit", "eva02", "beit", "hf_vit", "cct"), (with_norm, parametrizations.spectral_norm)
        ),
        *itertools.product(("vit", "hf_vit", "cct"), (pruned,)),
    ],
)
def test_parametrised_and_pruned_projections(name, change):
    """Before attach and after it."""
    case = BY_NAME[name]
    images, targets = batch(case, dtype=torch.float64)
    htm = {"horizontal": HorizontalConfig(layers=(0,), rho=0.005, scorenet=None)}
    for first in (True, False):
        model = changed(case, change, first, **htm)
        host = model.backbone
        with torch.no_grad():  # as an optimiser: the weight that pruning computed last is stale
            for parameter in host.parameters():
                parameter.mul_(1.1)
        reference = put_on(plain_weights(host, host_of(case)), **htm)
        out, expected = model(images, targets), reference(images, targets)
        torch.testing.assert_close(out.targets, expected.targets)
        assert (out.targets - targets).abs().max() > 1e-3
        if change is not parametrizations.spectral_norm:  # which moves in the layer's own pass
            torch.testing.assert_close(out.logits, expected.logits)


def with_low_rank(how):
    """As adapters that one writes oneself: merged, by a hook, or by another `forward`."""

    def change(linear):
        generator = torch.Generator().manual_seed(3)
        extra = 0.3 * torch.randn(linear.weight.shape, generator=generator, dtype=torch.float64)
        if how == "merged":
            linear.weight.data += extra
        elif how == "hook":
            linear.register_forward_hook(lambda _, args, output: output + args[0] @ extra.T)
        else:
            plain = linear.forward
            linear.forward = lambda tokens: plain(tokens) + tokens @ extra.T

    return change


@pytest.mark.parametrize("how", ["hook", "forward"])
@pytest.mark.parametrize("name", ["vit", "hf_vit", "cct"])
def test_projections_that_others_have_changed_in_place(name, how):
    """Before attach and after it."""
    case = BY_NAME[name]
    images, targets = batch(case, dtype=torch.float64)
    settings = {"horizontal": HorizontalConfig(layers=(0,), rho=0.005, scorenet=None)}
    settings["vertical"] = VerticalConfig(layers=(2,), kappa=2)
    for first in (True, False):
        found = []
        for change in (with_low_rank("merged"), with_low_rank(how)):
            found.append(changed(case, change, first, **settings)(images, targets))
        expected, out = found
        torch.testing.assert_close(out.targets, expected.targets)
        torch.testing.assert_close(out.logits, expected.logits)
        assert (out.targets - targets).abs().max() > 1e-3


class QuantisedLinear(nn.Module):
    """As libraries of quantisation put it: no Linear, and no weight to read."""

    def __init__(self, linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        scale = linear.weight.abs().amax(1, keepdim=True) / 127
        self.register_buffer("steps", (linear.weight / scale).round().to(torch.int8))
        self.register_buffer("scale", scale)
        self.bias = linear.bias

    def effective(self):
        return self.steps.to(self.scale.dtype) * self.scale

    def forward(self, tokens):
        return nn.functional.linear(tokens, self.effective(), self.bias)


@some_hosts("vit", "rope_mixed", "hf_vit", "cct")
@torch.no_grad()
def test_quantised_projections(case):
    """Before attach and after it, against a host with the weights that they stand for."""
    images, targets = batch(case, dtype=torch.float64)
    rounded = host_of(case)
    change_projections(rounded, lambda part: part.weight.copy_(QuantisedLinear(part).effective()))
    expected = put_on(rounded)
    for first in (True, False):
        host = host_of(case)
        model = None if first else put_on(host)
        for module in list(host.modules()):
            for name in PARTS:
                if isinstance(getattr(module, name, None), nn.Linear):
                    setattr(module, name, QuantisedLinear(getattr(module, name)))
        assert_same_step(model or put_on(host), expected, images, targets)
