"""Horizontal TokenMixup that never acts is told: once per model, with its cause and a remedy.

Dimensions: B batch, T patch tokens, C classes.
"""

import copy
import math
import pickle
import warnings

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers.horizontal_wrappers import StubLayer, random_map, wrap
from tests.helpers.others_warnings import uses_inductor
from tests.helpers.small_vit import vit
from tests.helpers.toy_encoder import CLASSES, Block, random_batch
from tests.helpers.waits import Waits
from tokenmixup import (
    HorizontalConfig,
    TokenMixupOutput,
    TokenMixupWarning,
    VerticalConfig,
    _watch,
    attach,
)
from tokenmixup.functional import soft_cross_entropy

STEPS, ARRIVES = 3, 2
LAST = STEPS + ARRIVES


@pytest.fixture(autouse=True)
def few_steps(monkeypatch, fresh_compiler):
    monkeypatch.setattr(_watch, "STEPS", STEPS)
    monkeypatch.setattr(_watch, "_ARRIVES", ARRIVES)


def config(tau=0.9, rho=1e-5, layers=(1,), **settings):
    return HorizontalConfig(layers=layers, tau=tau, rho=rho, **settings)


def smoothed(batch, classes=5, smoothing=0.1):
    labels = torch.arange(batch) % classes
    return (1 - smoothing) * torch.eye(classes)[labels] + smoothing / classes


def images(batch=6):
    return torch.randn(batch, 3, 32, 32)


def train(run, steps=2 * LAST, targets=None):
    """Training steps with their backward pass -> their outputs, and (step, text) of warnings."""
    targets = smoothed(6) if targets is None else targets
    outputs, told = [], []
    for step in range(1, steps + 1):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always", TokenMixupWarning)
            out = run(images(len(targets)), targets)
            (out.logits.square().mean() + out.scorenet_loss).backward()
        outputs.append(out)
        told += [(step, str(warning.message)) for warning in caught]
    return outputs, told


def the_one(told, step):
    ((found, text),) = told
    assert found == step
    return text


# Causes


def test_frozen_scorenet_is_told_at_the_first_step():
    model = attach(vit(), horizontal=config(layers=(1, 2))).train()
    model.scorenets.requires_grad_(False)
    text = the_one(train(model)[1], 1)
    assert "at layer 1 cannot begin: none of ScoreNet's parameters" in text
    assert "requires_grad_(True) on model.scorenets" in text
    frozen = wrap(StubLayer(random_map(4, 5)), layer_name="stage3").requires_grad_(False)
    with pytest.warns(TokenMixupWarning, match="stage3 cannot begin"):
        frozen(*random_batch(4, 5))
    frozen(*random_batch(4, 5))  # not again: warnings are errors here


def test_tau_below_what_the_targets_allow():
    """The bound by hand: smoothing 0.1 of 5 classes."""
    bound = -(0.92 * math.log(0.92) + 4 * 0.02 * math.log(0.02)) / 10
    model = attach(vit(), horizontal=config(tau=0.03)).train()
    text = the_one(train(model)[1], LAST)
    assert f"at layer 1 mixed nothing in {STEPS} training steps: tau is 0.03" in text
    assert f"no difficulty can be below {bound:.4f}" in text and "Raise tau" in text


def test_tau_that_no_sample_has_reached():
    model = attach(vit(), horizontal=config(tau=0.04)).train()
    outputs, told = train(model)
    least = outputs[STEPS - 1].stats["htm/layer1/difficulty_min"].item()
    text = the_one(told, LAST)
    easy = f"in the last of them no sample was easy: the least difficulty was {least:.4f}, tau is"
    assert easy in text
    assert "0.04. If difficulty_min does not fall, see that the loss is out.loss()" in text
    assert "the optimiser has ScoreNet's parameters, and that scorenet_lambda is not" in text


@pytest.mark.parametrize("settings", [{}, {"scorenet": None, "tau": None}])
def test_rho_above_the_greatest_difference(settings):
    model = attach(vit(), horizontal=config(rho=0.5, **{"tau": 10.0} | settings)).train()
    outputs, told = train(model)
    name = "htm/layer1/saliency_difference_max"
    greatest = outputs[STEPS - 1].stats[name].item()
    assert 0 < greatest < 0.5
    expected = (
        f"rho is 0.5, but in the last of them the greatest saliency difference was {greatest:.3g}"
    )
    assert expected in the_one(told, LAST)


@pytest.mark.parametrize("settings", [{}, {"scorenet": None, "tau": None}])
def test_batches_of_one_sample(settings):
    model = attach(vit(), horizontal=config(**{"tau": 10.0} | settings)).train()
    text = the_one(train(model, targets=smoothed(1))[1], LAST)
    assert "each batch had one sample, which has no partner" in text


def test_greatest_difference_is_that_to_any_sample():
    """Also where rho is above it, and no sample gets a partner: it says how far to lower rho."""
    x, y = random_batch(4, 5)
    attention = random_map(4, 5)
    saliency = attention[:, :, 0, 1:].mean(1)  # (B, T), the class token's row
    wrapper = wrap(StubLayer(attention), tau=0.1, rho=0.9)
    stats = []
    observe = wrapper._watch.observe
    wrapper._watch.observe = lambda *args: stats.append(args[-1].stats) or observe(*args)
    wrapper.scorenet.head.weight.data.zero_()
    wrapper.scorenet.head.bias.data = torch.tensor([9.0, 0, 0, 0, 0]).double()
    y = torch.eye(CLASSES, dtype=torch.float64)[[0, 1, 0, 2]]  # samples 0 and 2 are easy
    wrapper(x, y)
    assert stats[0]["easy_share"] == 0.5 and stats[0]["mixed_share"] == 0
    expected = max(
        saliency[j, t] - saliency[i, t] for i in (0, 2) for j in range(4) for t in range(4)
    )
    torch.testing.assert_close(stats[0]["saliency_difference_max"], expected)


def test_wrapper_in_which_nothing_is_easy():
    wrapper = wrap(StubLayer(random_map(4, 5)), tau=1e-6)
    for _ in range(LAST - 1):
        wrapper(*random_batch(4, 5))
    with pytest.warns(TokenMixupWarning, match="at the wrapped layer mixed nothing"):
        wrapper(*random_batch(4, 5))


# When nothing is told


def test_one_mixed_sample_is_enough_and_evaluation_does_not_count():
    vertical = VerticalConfig(layers=(2,), kappa=2)
    model = attach(vit(), horizontal=config(tau=10.0), vertical=vertical).train()
    assert train(model)[1] == []
    idle = attach(vit(), horizontal=config(tau=0.03)).train()
    assert train(idle, LAST - 1)[1] == []
    idle.eval()
    for _ in range(LAST):
        idle(images())
    idle.train()
    the_one(train(idle)[1], 1)


def test_each_layer_is_watched():
    """Layer 1 mixes, layer 2 sees targets whose entropy is above tau."""
    model = attach(vit(), horizontal=config(tau=0.22, layers=(1, 2))).train()
    model.scorenets["2"].head.bias.data.copy_(torch.tensor([9.0, 0, 0, 0, -9.0]))
    _, told = train(model, targets=torch.eye(5)[torch.full((6,), 4)])
    assert "layer 2 mixed nothing" in the_one(told, LAST)


# The step is counted once, whatever runs it


def whole_step(model):
    """Compiled with its loss, so that the statistics are not used."""

    @torch.compile(fullgraph=True, backend="aot_eager")
    def loss_of(images, targets):
        out = model(images, targets)
        return soft_cross_entropy(out.logits, out.targets).mean() + out.scorenet_loss

    return lambda *batch: TokenMixupOutput(torch.zeros(1), None, loss_of(*batch), {})


def checkpointed(model):
    model.backbone.set_grad_checkpointing()
    return model


@uses_inductor
@pytest.mark.parametrize(
    "run_by",
    [
        checkpointed,
        copy.deepcopy,
        lambda model: pickle.loads(pickle.dumps(model)),
        lambda model: torch.compile(model, fullgraph=True, backend="aot_eager"),
        whole_step,
    ],
    ids=["checkpointing", "deepcopy", "pickle", "compiled", "compiled with the loss"],
)
def test_ways_to_run(run_by):
    model = attach(vit(), horizontal=config(tau=0.03)).train()
    the_one(train(run_by(model), LAST + 2)[1], LAST)


def test_checkpointed_wrapper():
    wrapper = wrap(Block().double(), tau=1e-6)
    for step in range(LAST):
        x, y = random_batch(4, 5)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            tokens, _ = checkpoint(wrapper, x.requires_grad_(), y, use_reentrant=False)
            tokens.square().sum().backward()
        assert bool(caught) is (step == LAST - 1)


@uses_inductor
def test_compiled_wrapper():
    """Of a layer with pooled keys, whose grids are found while it is compiled."""
    wrapper = wrap(StubLayer(random_map(4, 1 + 16, 1 + 4)), tau=1e-6)
    wrapper.layer.forward = lambda x, y: (x * 2, y)
    wrapper.layer.get_attention_map = lambda x, y: wrapper.layer.attention_map
    run = torch.compile(wrapper, fullgraph=True, backend="aot_eager")
    for _ in range(LAST - 1):
        run(*random_batch(4, 17))
    with pytest.warns(TokenMixupWarning, match="mixed nothing"):
        run(*random_batch(4, 17))


def test_a_copy_counts_anew():
    model = attach(vit(), horizontal=config(tau=0.03)).train()
    train(model, LAST - 1)
    other = copy.deepcopy(model)
    the_one(train(model)[1], 1)
    the_one(train(other)[1], LAST)


def test_no_step_waits_for_the_device(monkeypatch):
    see = _watch.Watch.see

    def watched(*args):
        with Waits() as waits:
            see(*args)
        assert waits.read == 0

    monkeypatch.setattr(_watch.Watch, "see", watched)
    the_one(train(attach(vit(), horizontal=config(tau=0.03)).train())[1], LAST)
