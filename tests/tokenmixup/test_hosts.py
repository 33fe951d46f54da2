"""What `attach` promises, on every family of hosts.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, H heads, K kappa, M remembered
tokens.
"""

import copy

import numpy as np
import torch

from tests.helpers import oracle
from tests.helpers.cases import array, same_bits
from tests.helpers.host_builders import CLASSES, WIDTH
from tests.helpers.host_cases import batch, every_host, logits_of, some_hosts
from tests.helpers.naive_host import (
    attention_of,
    layers_of,
    naive_attention,
    norm_of,
    own_saliency,
    positions_of_own,
    switch_off_fused_attention,
    watched,
)
from tokenmixup import HorizontalConfig, VerticalConfig
from tokenmixup.rules import Rules

KAPPA = 3
VTM = VerticalConfig(layers=(2,), kappa=KAPPA)
MIX_ALL = HorizontalConfig(layers=(1,), rho=0.01, scorenet=None)
MIX_NONE = HorizontalConfig(layers=(1,), tau=0, rho=0.01)  # cross-entropy is never 0


# The host stays itself


def state_of_hooks(host):
    return {
        name: {key: dict(value) for key, value in vars(module).items() if "hooks" in key and value}
        for name, module in host.named_modules()
    }


@every_host
def test_layout_and_names(case):
    host = case.build()
    keys = list(host.state_dict())
    model = case.attach(host, horizontal=MIX_NONE, vertical=VTM)
    assert model.backbone is host and list(host.state_dict()) == keys
    assert model.layout.num_prefix_tokens == case.num_prefix_tokens
    assert model.layout.class_token == case.class_token
    assert model.layout.width == WIDTH and model.num_classes == CLASSES
    assert model.layout.num_patch_tokens == (case.patches if case.fixed_size else None)
    text = repr(model)
    assert model.adapter.family == case.family and f"(host): {case.family}\n" in text
    assert "HorizontalConfig(layers=(1,)" in text
    assert ("VerticalConfig(layers=(2,)" in text) == case.vtm


@every_host
def test_detach_gives_back_exactly_the_host(case):
    host = case.build(dropout=0.1)
    before, members = state_of_hooks(host), {id(module) for module in host.modules()}
    weights = copy.deepcopy(host.state_dict())
    images, targets = batch(case)
    torch.manual_seed(3)
    expected = logits_of(host(images))

    model = case.attach(host, horizontal=MIX_ALL, vertical=VTM).train()
    model(images, targets).logits.sum().backward()
    assert state_of_hooks(host) != before
    back = model.detach()

    assert back is host and {id(module) for module in host.modules()} == members
    assert state_of_hooks(host) == before
    assert all(same_bits(value, weights[name]) for name, value in host.state_dict().items())
    torch.manual_seed(3)
    assert same_bits(logits_of(host(images)), expected)
    case.attach(host)  # and it can be attached to again


@every_host
def test_evaluation_is_bit_identical_to_the_host(case):
    plain = case.build(dropout=0.1)
    images, targets = batch(case)
    model = case.attach(copy.deepcopy(plain), horizontal=MIX_ALL, vertical=VTM)
    model.train()(images, targets).logits.sum().backward()
    for no_grad in (True, False):
        with torch.no_grad() if no_grad else torch.enable_grad():
            expected = logits_of(plain.eval()(images))
            assert same_bits(model.eval()(images), expected)
            assert same_bits(logits_of(model.backbone(images)), expected)


@every_host
def test_training_where_nothing_is_mixed_is_the_hosts_own(case):
    """With dropout and drop path on: the library draws no random numbers."""
    plain = case.build(dropout=0.1)
    images, targets = batch(case)
    torch.manual_seed(3)
    expected = logits_of(plain(images))
    for horizontal in (None, MIX_NONE):
        model = case.attach(copy.deepcopy(plain), horizontal=horizontal).train()
        torch.manual_seed(3)
        out = model(images, targets)
        assert same_bits(out.logits, expected) and torch.equal(out.targets, targets)
    assert out.stats["htm/layer1/easy_share"] == 0


@some_hosts("vit", "deit_distilled", "deit3", "siglip", "dinov2", "eva02", "beit", "cct")
def test_timm_methods_work(case):
    plain = case.build().eval()
    images, _ = batch(case)
    host = case.attach(copy.deepcopy(plain), horizontal=MIX_ALL, vertical=VTM).eval().backbone
    features = host.forward_features(images)
    assert same_bits(features, plain.forward_features(images))
    assert same_bits(host.forward_head(features), plain.forward_head(features))
    assert type(host.get_classifier()) is type(plain.get_classifier())
    assert host.no_weight_decay() == plain.no_weight_decay()
    assert host.group_matcher().keys() == plain.group_matcher().keys()


@some_hosts("vit", "eva02", "beit", "torchvision", "hf_vit", "cct")
def test_no_weight_decay_has_the_names_of_the_whole_model(case):
    model = case.attach(case.build(), horizontal=MIX_NONE)
    own = model.backbone.no_weight_decay() if case.family.startswith("timm") else set()
    assert model.no_weight_decay() == {f"backbone.{name}" for name in own}
    known = {name for name, _ in model.named_parameters()}
    assert bool(model.no_weight_decay() & known) == case.family.startswith("timm")


# The arithmetic


@every_host
def test_saliency_is_that_of_the_explicit_map(case):
    """As HTM reads it before a layer runs, and as VTM reads it in the layer's own pass."""
    host = case.build()
    plain = switch_off_fused_attention(copy.deepcopy(host))
    images, targets = batch(case)
    found = []

    class Noting(Rules):
        def saliency(self, layer, saliency):
            found.append((layer, saliency))
            return saliency

        def choose(self, layer, saliency, kappa):
            found.append((layer, saliency))
            return super().choose(layer, saliency, kappa)

    nothing = HorizontalConfig(layers=(0, 1, 2), rho=1e9, scorenet=None)
    model = case.attach(host, horizontal=nothing, vertical=VTM, rules=Noting()).train()
    torch.manual_seed(3)
    with watched(host) as seen:
        model(images, targets)
    # layers 0 and 1 remember
    assert [layer for layer, _ in found] == ([0, 0, 1, 1, 2] if case.vtm else [0, 1, 2])
    for index, saliency in found:
        layer = layers_of(plain)[index]
        expected = own_saliency(layer, case, seen.tokens[index], *seen.calls[index])
        np.testing.assert_allclose(saliency, expected, rtol=0, atol=1e-5)
        assert expected.std() > 1e-2 * expected.mean()
        assert expected.sum(1).max() < 1.05  # a share of the image's; resizing is not exact


def with_half_of_the_batch_easy(host, tokens, targets, case):
    """A model whose tau lies in the middle of the batch's difficulties, and who is easy."""
    everyone = HorizontalConfig(layers=(1,), tau=1e9, rho=case.rho, scorenet="average")
    trial = case.attach(host, horizontal=everyone)
    head = trial.scorenets["1"].head
    torch.nn.init.normal_(head.weight, std=0.5)
    scorenet = oracle.ScoreNet("average", array(head.weight), array(head.bias))
    difficulty = oracle.sample_difficulty(
        scorenet.logits(array(tokens), case.num_prefix_tokens), array(targets)
    )
    tau = float(np.median(difficulty))
    trial.detach()
    horizontal = HorizontalConfig(layers=(1,), tau=tau, rho=case.rho, scorenet="average")
    model = case.attach(host, horizontal=horizontal, vertical=VTM).train()
    model.scorenets.load_state_dict(trial.scorenets.state_dict())
    return model, [d <= tau for d in difficulty]


@every_host
def test_whole_model_against_the_oracle(case):
    """Tokens entering the HTM layer, what is remembered, and what the VTM layer attends to."""
    prefix, dtype = case.num_prefix_tokens, torch.float64
    host = case.build().to(dtype)
    plain = switch_off_fused_attention(copy.deepcopy(host))
    images, targets = batch(case, dtype=dtype)
    torch.manual_seed(3)
    with watched(host) as unmixed:
        host(images)
    model, easy = with_half_of_the_batch_easy(host, unmixed.tokens[1], targets, case)
    torch.manual_seed(3)
    with watched(host) as seen:
        out = model(images, targets)

    # HTM
    layer = layers_of(plain)[1]
    saliency = own_saliency(layer, case, unmixed.tokens[1], *unmixed.calls[1])
    mixed = oracle.horizontal_mixup(
        array(unmixed.tokens[1]), array(targets), saliency, easy, case.rho, prefix
    )
    assert 0 < sum(easy) < len(easy) and 0 < mixed.mask.sum() < mixed.mask.size
    np.testing.assert_allclose(array(seen.tokens[0]), array(unmixed.tokens[0]))
    np.testing.assert_allclose(array(seen.tokens[1]), mixed.tokens, atol=1e-9)
    np.testing.assert_allclose(array(out.targets), mixed.targets, atol=1e-7)

    if not case.vtm:
        return
    # VTM: each sample's own most salient tokens, at the places that they come from
    memory, positions = [], [positions_of_own(seen.tokens[2])]
    for index in (0, 1):
        tokens = seen.tokens[index]
        saliency = own_saliency(layers_of(plain)[index], case, tokens, *seen.calls[index])
        chosen = oracle.select_salient_tokens(array(tokens), saliency, KAPPA, prefix)
        memory.append(torch.from_numpy(chosen))
        places = [oracle.salient_positions(row, KAPPA) for row in saliency]
        positions.append(prefix + np.array(places))
    layer = layers_of(plain)[2]
    own = norm_of(layer)(seen.tokens[2])
    keys = torch.cat([own, *(norm_of(layer)(tokens) for tokens in memory)], dim=1)
    with torch.no_grad():
        expected, _ = naive_attention(
            attention_of(layer),
            own,
            keys,
            np.concatenate(positions, axis=1),
            prefix,
            **{key: value for key, value in seen.calls[2][1].items() if key != "attention_mask"},
        )
    # transformers' eager attention has its softmax in float32 whatever the model's type
    np.testing.assert_allclose(array(seen.outputs[2]), expected, atol=2e-6)
    alone, _ = naive_attention(
        attention_of(layer), own, own, positions[0], prefix, **seen.calls[2][1]
    )
    assert np.abs(expected - alone).max() > 1e-2  # the remembered tokens matter


@every_host
def test_every_parameter_gets_a_gradient(case):
    host = case.build(dropout=0.1)
    images, targets = batch(case)
    logits_of(host(images)).square().mean().backward()
    without = {name for name, p in host.named_parameters() if p.grad is None}
    host.zero_grad()
    horizontal = HorizontalConfig(layers=(1,), tau=1, rho=0.01)
    model = case.attach(host, horizontal=horizontal, vertical=VTM).train()
    out = model(images, targets)
    (out.logits.square().mean() + out.scorenet_loss).backward()
    assert {n for n, p in host.named_parameters() if p.grad is None} == without
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert torch.isfinite(parameter.grad).all(), name
    assert all(p.grad.abs().sum() > 0 for p in model.scorenets.parameters() if p.dim() > 1)


@every_host
def test_several_layers_of_each_kind(case):
    """VTM twice and HTM twice, once in the same layer."""
    host = case.build()
    horizontal = HorizontalConfig(layers=(0, 2), rho=0.01, scorenet=None)
    model = case.attach(
        host, horizontal=horizontal, vertical=VerticalConfig(layers=(1, 2), kappa=2)
    )
    images, targets = batch(case)
    out = model.train()(images, targets)
    counted = [value for name, value in out.stats.items() if name.endswith("remembered_tokens")]
    assert counted == ([2, 4] if case.vtm else [])
    assert out.logits.isfinite().all() and out.logits.shape == targets.shape
    torch.testing.assert_close(out.targets.sum(1), torch.ones(len(targets)))
