"""The wrapper layers under torch.compile: one graph for all steps, and the eager numbers.

Dimensions: B batch, N tokens with prefix, D width, C classes.
"""

import pytest
import torch
from torch._dynamo.testing import CompileCounter

from tests.helpers.others_warnings import uses_inductor
from tests.helpers.toy_encoder import CLASSES, WIDTH, Block, Encoder, random_batch
from tests.helpers.vertical_wrappers import wrap
from tokenmixup import HorizontalTokenMixupLayer

pytestmark = [uses_inductor, pytest.mark.usefixtures("fresh_compiler")]


def build(horizontal, vertical):
    torch.manual_seed(11)
    blocks = [Block().double() for _ in range(4)]
    for layer, block in enumerate(blocks):
        if vertical:
            block.attention = wrap(block.attention, layer, (1, 3), 2)
    if horizontal:  # verbose, as it is by default
        blocks[2] = HorizontalTokenMixupLayer(blocks[2], 0.17, 0.001, WIDTH, CLASSES).double()
    return Encoder(blocks).train()


def step(model, run, x, y):
    model.zero_grad()
    x, y = run(x, y)
    loss = x.square().mean() + (100 * y[1].mean() if isinstance(y, tuple) else 0)
    loss.backward()
    return x, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("horizontal, vertical", [(True, False), (False, True), (True, True)])
def test_one_graph_for_all_steps(horizontal, vertical):
    model = build(horizontal, vertical)
    counter = CompileCounter()
    compiled = torch.compile(model, backend=counter, fullgraph=True)
    for _ in range(5):
        x, y = random_batch(4, 7)
        found, gradients = step(model, compiled, x, y)
        assert counter.frame_count == 1
        expected, expected_gradients = step(model, model, x, y)
        torch.testing.assert_close(found, expected)
        assert gradients.keys() == expected_gradients.keys()
        for name, gradient in expected_gradients.items():
            torch.testing.assert_close(gradients[name], gradient, msg=name)
