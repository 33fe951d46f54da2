"""What a study varies: every decision of the method can be overridden, one at a time."""

import copy
from dataclasses import dataclass

import pytest
import torch

from tests.helpers.cases import same_bits
from tests.helpers.host_cases import BY_NAME, batch
from tokenmixup import HorizontalConfig, VerticalConfig, attach, functional
from tokenmixup.functional import MixingDecision
from tokenmixup.rules import Rules

HTM = HorizontalConfig(layers=(1,), rho=0.002, scorenet=None)
VTM = VerticalConfig(layers=(2,), kappa=3)
CASE = BY_NAME["vit"]


def build(rules=None):
    torch.manual_seed(5)
    return attach(CASE.build(), horizontal=HTM, vertical=VTM, rules=rules).train()


class Noted(Rules):
    """Notes what each method was given, in order."""

    def __init__(self):
        self.notes = []

    def begin(self, model, images, targets):
        self.notes.append(("begin", images, targets))

    def saliency(self, layer, saliency):
        self.notes.append(("saliency", layer, saliency))
        return super().saliency(layer, saliency)

    def decide(self, layer, saliency, targets, easy, rho):
        self.notes.append(("decide", layer, rho))
        return super().decide(layer, saliency, targets, easy, rho)

    def choose(self, layer, saliency, kappa):
        self.notes.append(("choose", layer, kappa))
        return super().choose(layer, saliency, kappa)


def test_the_methods_come_in_order_and_change_nothing():
    images, targets = batch(CASE)
    model, plain = build(Noted()), build()
    out, expected = model(images, targets), plain(images, targets)
    assert same_bits(out.logits, expected.logits) and same_bits(out.targets, expected.targets)
    notes = model.rules.notes
    assert [note[:2] for note in notes[1:]] == [
        ("choose", 0),
        ("saliency", 1),
        ("decide", 1),
        ("choose", 1),
    ]
    assert notes[0][1] is images and torch.equal(notes[0][2], targets)
    assert copy.deepcopy(model).rules is not model.rules
    model.eval()(images)
    assert len(notes) == 5, "nothing is decided in evaluation"


class RandomPartners(Rules):
    def partners(self, gain):
        return torch.arange(len(gain)).roll(1)


class FirstsMask(Rules):
    def mask(self, saliency, partner, easy, rho):
        return (saliency[partner] - saliency[easy.int().argmax()] > rho) & easy.unsqueeze(1)


class OtherSaliency(Rules):
    def begin(self, model, images, targets):
        self.given = torch.rand(len(images), model.layout.num_patch_tokens).softmax(1)

    def saliency(self, layer, saliency):
        return self.given


class LessItsMean(Rules):
    def choose(self, layer, saliency, kappa):
        return super().choose(layer, saliency - saliency.mean(0), kappa)


class LabelsByNumber(Rules):
    def relabel(self, targets, saliency, decision):
        return functional.mix_targets(targets, torch.ones_like(saliency), decision)


class OneBefore(Rules):
    def remember(self, tokens, positions, config, num_prefix_tokens):
        return super().remember(tokens, positions, config, num_prefix_tokens - 1)


@dataclass(frozen=True)
class Ordered(MixingDecision):
    order: torch.Tensor


class LastFirst(Rules):
    """A decision may carry more from `decide` to `relabel` and `mix`."""

    def decide(self, *arguments):
        decision = super().decide(*arguments)
        return Ordered(decision.partner, decision.mask, torch.arange(len(decision.mask)).flip(0))

    def relabel(self, targets, saliency, decision):
        return super().relabel(targets, saliency, decision)[decision.order]

    def mix(self, tokens, decision, num_prefix_tokens):
        return super().mix(tokens, decision, num_prefix_tokens)[decision.order]


@pytest.mark.parametrize(
    ("rules", "relabels"),
    [
        (RandomPartners, True),
        (FirstsMask, True),
        (OtherSaliency, True),
        (LessItsMean, False),
        (LabelsByNumber, True),
        (OneBefore, False),
        (LastFirst, True),
    ],
)
def test_what_is_overridden_takes_effect(rules, relabels):
    images, targets = batch(CASE)
    out, plain = build(rules())(images, targets), build()(images, targets)
    assert torch.equal(out.targets, plain.targets) != relabels
    assert torch.equal(out.targets, plain.targets.flip(0)) == (rules is LastFirst)
    assert torch.equal(out.logits, plain.logits) == (rules is LabelsByNumber)
    torch.testing.assert_close(out.targets.sum(1), targets.sum(1))
    out.logits.square().mean().backward()


def test_rules_that_are_none_are_refused():
    with pytest.raises(ValueError, match="rules must be a Rules or None, got <class"):
        attach(CASE.build(), rules=RandomPartners)
