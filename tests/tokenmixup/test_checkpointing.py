"""Activation checkpointing: decisions are taken once a step, and gradients are those without it."""

import collections

import pytest
import torch

from tests.helpers.cases import same_bits
from tests.helpers.checkpointing import (
    assert_same_gradients,
    checkpointed,
    loss_of,
    transformers_checkpointing,
    wrap,
)
from tests.helpers.host_cases import batch, every_host, logits_of, one_of_each
from tokenmixup import HorizontalConfig, VerticalConfig
from tokenmixup.rules import Rules

HTM = HorizontalConfig(layers=(0, 1), tau=0.25, rho=0.005)
VTM = VerticalConfig(layers=(1, 2), kappa=3)


class Counted(Rules):
    """The paper's, counting the calls of each method."""

    def __init__(self):
        self.calls = collections.Counter()

    def __getattribute__(self, name):
        if not name.startswith("_") and name in vars(Rules):
            self.calls[name] += 1
        return super().__getattribute__(name)


def build(case, dropout=0.0, rules=None):
    torch.manual_seed(5)  # ScoreNet's weights
    return case.attach(case.build(dropout), horizontal=HTM, vertical=VTM, rules=rules).train()


@every_host
def test_gradients_are_those_without_checkpointing(case):
    """With dropout, whose random numbers are drawn again in the same order."""
    model = build(case, dropout=0.1, rules=Counted())
    again = checkpointed(case, model)
    images, targets = batch(case)
    torch.manual_seed(3)
    expected = model(images, targets)
    loss_of(expected).backward()

    torch.manual_seed(3)
    out = again(images, targets)
    loss_of(out).backward()
    horizontal = ("saliency", "decide", "partners", "mask", "relabel")
    for name in (*horizontal, "choose") if case.vtm else horizontal:
        assert again.rules.calls[name] == model.rules.calls[name] == 2, f"{name}: once per step"
    assert again.rules.calls["begin"] == 1
    assert same_bits(out.logits, expected.logits) and same_bits(out.targets, expected.targets)
    assert out.stats.keys() == expected.stats.keys()
    assert_same_gradients(again, model)


@pytest.mark.parametrize("backward", ["together", "twice"])
@one_of_each
def test_passes_in_flight(case, backward):
    """Two forward passes, then their backward passes, as in contrastive training."""
    model = build(case)
    again = checkpointed(case, model)
    batches = [batch(case), batch(case)]
    for one in (model, again):
        losses = [loss_of(one(*each)) for each in batches]
        for loss in [sum(losses)] if backward == "together" else losses * 2:
            loss.backward(retain_graph=backward == "twice")
    assert_same_gradients(again, model, exactly=False)


@one_of_each
@pytest.mark.parametrize("evaluation_first", [True, False])
def test_evaluation_in_the_same_backward_pass(case, evaluation_first):
    """An evaluation with gradients (distillation, adversarial images) is never mixed."""
    model = build(case)
    again = checkpointed(case, model)
    images, targets = batch(case)

    def evaluate(one):
        logits = one.eval()(images)
        one.train()
        return logits.square().sum()

    for one in (model, again):
        first = evaluate(one) if evaluation_first else 0
        out = one(images, targets)
        second = 0 if evaluation_first else evaluate(one)
        (first + loss_of(out) + second).backward()
    assert_same_gradients(again, model, exactly=False)


@one_of_each
@pytest.mark.parametrize("training", [True, False])
def test_the_host_alone_is_not_mixed_in_its_recomputation(case, training):
    """The graph of a step may still be alive when the host runs, and runs its layers again."""
    model = build(case)
    again = checkpointed(case, model)
    images, targets = batch(case)
    kept = []
    for one in (model, again):
        out = one(images, targets)
        loss_of(out).backward(retain_graph=True)
        kept.append(out)
        one.zero_grad()
        logits_of(one.train(training).backbone(images)).sum().backward()
    assert_same_gradients(again, model)


@one_of_each
def test_reentrant_checkpointing_is_refused(case):
    model = build(case)
    if case.name == "hf_vit":
        transformers_checkpointing(model.backbone, use_reentrant=True)
    else:  # what hooks are on inside of it
        layers = model.adapter.layers(model.backbone)
        wrap(layers if case.vtm else model.backbone.layers, use_reentrant=True)
    images, targets = batch(case)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        model(images, targets)
    model.eval()(images)
