"""The wrapper layers under activation checkpointing: the gradients are those without it.

Dimensions: B batch, N tokens with prefix, D width, C classes.
"""

import copy
import gc
import logging
import pickle
import threading
import weakref

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import tokenmixup._recomputation
from tests.helpers.toy_encoder import CLASSES, WIDTH, Block, Encoder, random_batch
from tests.tokenmixup.test_vertical import wrap
from tokenmixup import HorizontalTokenMixupLayer

DEPTH = 4


class CheckpointedEncoder(Encoder):
    """Layers one after another, in checkpointed regions of so many layers; 0 for none."""

    def __init__(self, layers, size=1, **settings):
        super().__init__(layers)
        self.size = size
        self.settings = {"use_reentrant": False} | settings

    def run(self, first, x, y):
        for layer in self.layers[first : first + self.size]:
            x, y = layer(x, y)
        return x, y

    def forward(self, x, y):
        if not self.size:
            return super().forward(x, y)
        for first in range(0, len(self.layers), self.size):
            x, y = checkpoint(self.run, first, x, y, **self.settings)
        return x, y


def build(size, apply_layers=(1, 3), horizontal=None, stop=False, **settings):
    """An encoder of double precision with the same weights for every size of region."""
    torch.manual_seed(11)
    blocks = [Block().double() for _ in range(DEPTH)]
    for layer, block in enumerate(blocks):
        block.attention = wrap(block.attention, layer, apply_layers, 2, vtm_stopgrad=stop)
    if horizontal is not None:
        blocks[horizontal] = HorizontalTokenMixupLayer(
            blocks[horizontal], 0.17, 0.001, WIDTH, CLASSES, verbose=False
        ).double()
    return CheckpointedEncoder(blocks, size, **settings).train()


def attentions(encoder):
    layers = [getattr(layer, "layer", layer) for layer in encoder.layers]
    return [layer.attention for layer in layers]


def loss_of(result):
    x, y = result
    loss = x.square().mean()
    return loss + 100 * y[1].mean() if isinstance(y, tuple) else loss


def gradients(encoder):
    found = {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}
    assert found
    return found


def batches(count=2):
    torch.manual_seed(3)
    return [random_batch(4, 7) for _ in range(count)]


def assert_same_gradients(work, *, sizes=(1, 2, DEPTH), **settings):
    """The gradients that ``work(encoder)`` leaves do not depend on checkpointing."""
    plain = build(0, **settings)
    work(plain)
    expected = gradients(plain)
    for size in sizes:
        encoder = build(size, **settings)
        work(encoder)
        found = gradients(encoder)
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=f"{name}, regions of {size}")


@pytest.mark.parametrize("stop", [True, False])
@pytest.mark.parametrize("horizontal", [None, 0, 2, 3])
@pytest.mark.parametrize("apply_layers", [(1, 3), (2,), (3,)])
def test_one_step(apply_layers, horizontal, stop):
    def work(encoder):
        loss_of(encoder(*batches()[0])).backward()

    assert_same_gradients(work, apply_layers=apply_layers, horizontal=horizontal, stop=stop)


@pytest.mark.parametrize("horizontal", [None, 2])
def test_two_steps_in_one_backward_pass(horizontal):
    def work(encoder):
        sum(loss_of(encoder(*each)) for each in batches()).backward()

    assert_same_gradients(work, horizontal=horizontal)


def test_two_steps_in_one_region():
    def work(encoder):
        encoder.size = 0
        first, second = batches()

        def both(x, other):
            return encoder(x, first[1])[0].square().mean() + encoder(other, second[1])[0].sum()

        checkpoint(both, first[0], second[0], use_reentrant=False).backward()

    assert_same_gradients(work)


@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_backward_passes_in_any_order(order):
    def work(encoder):
        losses = [loss_of(encoder(*each)) for each in batches()]
        for index in order:
            losses[index].backward()

    assert_same_gradients(work)


@pytest.mark.parametrize("other", ["no gradients", "evaluation", "gradients"])
def test_another_pass_before_the_backward_pass(other):
    def work(encoder):
        first, second = batches()
        loss = loss_of(encoder(*first))
        encoder.train(other != "evaluation")
        with torch.set_grad_enabled(other == "gradients"):
            encoder(*second)
        encoder.train()
        loss.backward()

    assert_same_gradients(work)


def test_reset_before_the_backward_pass():
    def work(encoder):
        loss = loss_of(encoder(*batches()[0]))
        attentions(encoder)[0].reset()
        loss.backward()

    assert_same_gradients(work)


def test_backward_in_another_thread():
    """As CUDA does, whose backward passes run in a thread of the device."""

    def work(encoder):
        losses = [loss_of(encoder(*each)) for each in batches()]
        failed = []

        def backward():
            try:
                sum(losses).backward()
            except Exception as error:
                failed.append(error)

        thread = threading.Thread(target=backward)
        thread.start()
        thread.join(timeout=60)
        assert not failed

    assert_same_gradients(work)


@pytest.mark.parametrize("evaluation_first", [True, False])
def test_evaluation_in_the_same_backward_pass(evaluation_first):
    """Run again, layers do what they did, whatever mode they are in by then."""

    def work(encoder):
        first, second = batches()
        losses = []
        for evaluate in (evaluation_first, not evaluation_first):
            encoder.train(not evaluate)
            losses.append(loss_of(encoder(*(second if evaluate else first))))
        encoder.train()
        sum(losses).backward()

    assert_same_gradients(work)


def test_second_backward_pass_through_one_step():
    def work(encoder):
        x, _ = encoder(*batches()[0])
        x.square().mean().backward(retain_graph=True)
        x.sum().backward()

    assert_same_gradients(work)


def test_frozen_lower_layers():
    """The input of the first region with gradients then leads nowhere."""

    def work(encoder):
        for layer in encoder.layers[:2]:
            layer.requires_grad_(False)
        sum(loss_of(encoder(*each)) for each in batches()).backward()

    assert_same_gradients(work)


def test_nested_regions():
    def work(encoder):
        def both(*each):
            return loss_of(encoder(*each))

        sum(checkpoint(both, *each, use_reentrant=False) for each in batches()).backward()

    assert_same_gradients(work)


def test_a_copy_and_a_pickle_keep_nothing():
    encoder = build(1)
    loss = loss_of(encoder(*batches()[0]))
    for layer in attentions(encoder):
        for other in (copy.deepcopy(layer._calls), pickle.loads(pickle.dumps(layer._calls))):
            assert len(layer._calls._made) == 1 and not other._made
    loss.backward()


def test_what_regions_hold_goes_with_their_graph():
    encoder = build(1)
    loss = loss_of(encoder(*batches()[0]))
    calls = attentions(encoder)[3]._calls
    ((call,),) = calls._made.values()
    held = weakref.ref(call)
    del call
    loss.backward()
    attentions(encoder)[0].reset()
    del loss
    gc.collect()
    assert held() is None and not calls._made and not calls._repeated


# Reentrant checkpointing


def test_reentrant_around_the_whole_encoder():
    def work(encoder):
        encoder.settings["use_reentrant"] = True
        x, y = batches()[0]
        encoder(x.requires_grad_(), y)[0].square().mean().backward()

    assert_same_gradients(work, sizes=(DEPTH,))


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("size", [1, 2])
def test_reentrant_around_single_layers_is_refused(size, threaded):
    encoder = build(size, use_reentrant=True)
    losses = [encoder(x.requires_grad_(), y)[0].square().mean() for x, y in batches()]
    failed = []

    def backward():
        try:
            sum(losses).backward()
        except RuntimeError as error:
            failed.append(str(error))

    if threaded:
        thread = threading.Thread(target=backward)
        thread.start()
        thread.join(timeout=60)
    else:
        backward()
    assert len(failed) == 1 and "use_reentrant=False" in failed[0]


@pytest.mark.parametrize("reentrant", [0, 1, 2])
def test_reentrant_around_one_layer_is_refused(reentrant):
    """Without a gradient of what it remembers, if it is the only one."""
    encoder = build(0, apply_layers=(2,))
    x, y = batches()[0]
    x.requires_grad_()
    for index, layer in enumerate(encoder.layers):
        x = checkpoint(layer, x, y, use_reentrant=True)[0] if index == reentrant else layer(x, y)[0]
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        x.square().mean().backward()


def test_layers_under_no_grad_are_no_reentrant_checkpointing():
    encoder = build(0)
    x, y = batches()[0]
    with torch.no_grad():
        for layer in encoder.layers[:2]:
            x, y = layer(x, y)
    for layer in encoder.layers[2:]:
        x, y = layer(x, y)
    x.square().mean().backward()
    assert gradients(encoder)


def test_a_torch_whose_regions_are_unknown_is_refused(monkeypatch):
    """Rather than a training with wrong gradients."""
    monkeypatch.setattr(tokenmixup._recomputation, "_FRAME", None)
    encoder = build(1)
    loss = loss_of(encoder(*batches()[0]))
    with pytest.raises(RuntimeError, match="backward pass"):
        loss.backward()


# Steps are counted once


@pytest.mark.parametrize("settings", [{}, {"use_reentrant": True}])
def test_a_step_is_counted_once(settings, caplog):
    caplog.set_level(logging.INFO)
    size = DEPTH if settings else 1
    encoder = build(size, horizontal=2, **settings)
    layer = encoder.layers[2]
    layer.verbose = True
    layer.report_every = 2
    for _ in range(4):
        x, y = batches()[0]
        loss_of(encoder(x.requires_grad_(), y)).backward()
    assert layer.steps == 4 and len(caplog.records) == 2
    assert [each.steps for each in attentions(encoder)] == [0, 4, 0, 4]


class Wide(nn.Module):
    """Keeps every layer's tokens away from the graph of the one before."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x, y):
        return self.layer(x.detach(), y)


def test_layers_whose_graphs_do_not_meet():
    """Nothing leads from one region to another then, but what is remembered."""

    def work(encoder):
        encoder.layers = nn.ModuleList(map(Wide, encoder.layers))
        sum(loss_of(encoder(*each)) for each in batches()).backward()

    assert_same_gradients(work)
