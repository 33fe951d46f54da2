"""The wrapper layers under activation checkpointing: HTM works, VTM is refused in words.

Dimensions: B batch, N tokens with prefix, D width, C classes.
"""

import logging
import threading

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from tests.helpers.toy_encoder import CLASSES, WIDTH, Block, Encoder, random_batch
from tests.helpers.vertical_wrappers import wrap
from tokenmixup import HorizontalTokenMixupLayer


class CheckpointedEncoder(Encoder):
    """Each layer is a checkpointed region of its own, or none is (None)."""

    def __init__(self, layers, reentrant):
        super().__init__(layers)
        self.reentrant = reentrant

    def forward(self, x, y):
        if self.reentrant is None:
            return super().forward(x, y)
        for layer in self.layers:
            x, y = checkpoint(layer, x, y, use_reentrant=self.reentrant)
        return x, y


def build(reentrant, horizontal=(), vertical=()):
    """An encoder in float64 with the same weights each time."""
    torch.manual_seed(11)
    blocks = [Block().double() for _ in range(4)]
    for layer, block in enumerate(blocks):
        if vertical:
            block.attention = wrap(block.attention, layer, vertical, 2)
    for layer in horizontal:
        blocks[layer] = HorizontalTokenMixupLayer(
            blocks[layer], 0.17, 0.001, WIDTH, CLASSES, report_every=2
        ).double()
    return CheckpointedEncoder(blocks, reentrant).train()


def loss_of(encoder, batch):
    x, y = batch
    x, y = encoder(x.requires_grad_(), y)
    return x.square().mean() + (100 * y[1].mean() if isinstance(y, tuple) else 0)


def batches(count=2):
    torch.manual_seed(3)
    return [random_batch(4, 7) for _ in range(count)]


def gradients(encoder):
    return {name: p.grad for name, p in encoder.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("order", ["together", (0, 1), (1, 0)])
def test_htm_has_the_gradients_without_checkpointing(order):
    """HTM decides by its inputs alone, so that it decides the same when it runs again."""
    found = []
    for reentrant in (None, False):
        encoder = build(reentrant, horizontal=(0, 2))
        losses = [loss_of(encoder, batch) for batch in batches()]
        if order == "together":
            sum(losses).backward()
        else:
            for index in order:
                losses[index].backward()
        found.append(gradients(encoder))
    assert found[0].keys() == found[1].keys() and found[0]
    for name, gradient in found[0].items():
        torch.testing.assert_close(found[1][name], gradient, msg=name)


def test_htm_counts_and_reports_a_step_once(caplog):
    caplog.set_level(logging.INFO)
    encoder = build(False, horizontal=(2,))
    for batch in batches(4):
        loss_of(encoder, batch).backward()
    assert encoder.layers[2].steps == 4 and len(caplog.records) == 2


@pytest.mark.parametrize("threaded", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("vertical", [(3,), (1, 3)])
def test_vtm_is_refused(vertical, reentrant, threaded):
    """Also in a thread of its own, as CUDA runs its backward passes."""
    encoder = build(reentrant, vertical=vertical)
    losses = [loss_of(encoder, batch) for batch in batches()]
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
    (message,) = failed
    assert "was called inside a backward pass" in message and "tokenmixup.attach works" in message
