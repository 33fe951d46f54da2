"""The paper's VTM wrapper layer, every argument of it, against the oracle.

Dimensions: B batch, H heads, N tokens with prefix, P prefix tokens, D width, kappa remembered
tokens of each layer.
"""

import inspect

import numpy as np
import pytest
import torch

from tests.helpers import oracle
from tests.helpers.cases import array, same_bits
from tests.helpers.toy_encoder import (
    HEADS,
    WIDTH,
    Attention,
    Block,
    Encoder,
    Horizontal,
    arrays_of,
    encode,
    random_batch,
    scorenet_of,
)
from tests.helpers.vertical_wrappers import plain_attentions, random_tokens, run, wrap, wrap_all
from tokenmixup import HorizontalTokenMixupLayer, VerticalTokenMixupLayer


def test_signature_is_the_published_one():
    parameters = inspect.signature(VerticalTokenMixupLayer).parameters
    required = ["attention", "layer_index", "apply_layers", "kappa"]
    required += ["vtm_attn_dim", "vtm_attn_numheads"]
    published = {
        "vtm_stopgrad": False,
        "has_cls": True,
        "report_every": 50,
        "verbose": True,
        "memory": None,
    }
    assert list(parameters) == [*required, *published]
    assert {name: parameters[name].default for name in published} == published
    assert parameters["memory"].kind is inspect.Parameter.KEYWORD_ONLY


# Against the oracle


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("apply_layers", [(3,), (1, 3), [2, 3], (1,), (1, 2, 3)])
@pytest.mark.parametrize("kappa", [1, 4])
def test_encoder_matches_the_numpy_encoder(apply_layers, kappa, has_cls):
    x, y = random_batch(5, 9)
    blocks = [Block().double() for _ in range(4)]
    weights = [arrays_of(block) for block in blocks]
    for layer, block in enumerate(blocks):
        block.attention = wrap(block.attention, layer, apply_layers, kappa, has_cls=has_cls)
    encoder = Encoder(blocks)
    expected = encode(
        weights, array(x), array(y), int(has_cls), apply_layers=apply_layers, kappa=kappa
    )
    plain = encode(weights, array(x), array(y), int(has_cls))
    assert np.abs(expected.tokens - plain.tokens).max() > 1e-4
    for _ in range(2):  # the second pass has nothing of the first
        out, targets = encoder(x, y)
        assert targets is y
        np.testing.assert_allclose(array(out), expected.tokens, rtol=1e-9, atol=1e-11)
        encoder.layers[0].attention.reset()


@pytest.mark.parametrize("apply_layers", [(2,), (1, 2)])
@pytest.mark.parametrize("horizontal_layer", [0, 1, 2])
@pytest.mark.parametrize("use_scorenet", [True, False])
def test_with_htm_in_the_same_encoder(horizontal_layer, use_scorenet, apply_layers):
    """HTM asks for the map before the layer runs: what is remembered is the mixed pass' choice."""
    x, y = random_batch(6, 10)
    blocks = [Block().double() for _ in range(3)]
    weights = [arrays_of(block) for block in blocks]
    for layer, block in enumerate(blocks):
        block.attention = wrap(block.attention, layer, apply_layers, 2)
    wrapper = HorizontalTokenMixupLayer(
        blocks[horizontal_layer],
        0.17,
        0.001,
        WIDTH,
        y.shape[1],
        use_scorenet=use_scorenet,
        verbose=False,
    ).double()
    scorenet = scorenet_of(wrapper, "average") if use_scorenet else None
    layers = list(blocks)
    layers[horizontal_layer] = wrapper
    out, travelling = Encoder(layers)(x, y)
    expected = encode(
        weights,
        array(x),
        array(y),
        num_prefix_tokens=1,
        horizontal={horizontal_layer: Horizontal(0.17, 0.001, scorenet)},
        apply_layers=apply_layers,
        kappa=2,
    )
    assert expected.steps[0].mixed.mask.any()
    np.testing.assert_allclose(array(out), expected.tokens, rtol=1e-8, atol=1e-10)
    targets = travelling[0] if use_scorenet else travelling
    np.testing.assert_allclose(array(targets), expected.targets, rtol=1e-8)
    blocks[0].attention.reset()


def test_map_is_over_the_own_tokens_and_arguments_pass_through():
    attentions, tokens = plain_attentions(), random_tokens()
    wrappers = wrap_all(attentions)
    outputs = [w(x, 2.0, shift=1.0) for w, x in zip(wrappers, tokens, strict=True)]
    for layer in (0, 1):
        output, attention = attentions[layer](tokens[layer], 2.0, shift=1.0)
        assert same_bits(outputs[layer][0], output)
        assert same_bits(outputs[layer][1], attention)
    saliencies = [oracle.attention_saliency(array(outputs[layer][1]), 1) for layer in (0, 1)]
    remembered = [
        torch.from_numpy(oracle.select_salient_tokens(array(x), saliency, 3, 1))
        for x, saliency in zip(tokens, saliencies, strict=False)
    ]
    output, _ = attentions[2](torch.cat([tokens[2], *remembered], dim=1), 2.0, shift=1.0)
    torch.testing.assert_close(outputs[2][0], output[:, :7])
    # The map is that of the own queries over the own keys alone.
    torch.testing.assert_close(outputs[2][1], attentions[2](tokens[2])[1])


def test_evaluation_is_the_wrapped_attention():
    attentions, tokens = plain_attentions(), random_tokens()
    wrappers = [wrapper.eval() for wrapper in wrap_all(attentions)]
    for attention, wrapper, x in zip(attentions, wrappers, tokens, strict=True):
        for given, expected in zip(wrapper(x), attention(x), strict=True):
            assert same_bits(given, expected)


def test_evaluation_between_training_layers_leaves_the_memory_alone():
    attentions, tokens = plain_attentions(), random_tokens()
    expected = run(wrap_all(attentions), tokens)
    wrappers = wrap_all(attentions)
    for wrapper, x, result in zip(wrappers, tokens, expected, strict=True):
        for other in wrappers:
            other.eval()(torch.randn(2, 9, WIDTH).double())
            other.train()
        assert same_bits(wrapper(x)[0], result[0])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_low_precision(dtype):
    wrappers = [wrapper.to(dtype) for wrapper in wrap_all(plain_attentions())]
    for output, attention in run(wrappers, random_tokens(dtype=dtype)):
        assert output.dtype == attention.dtype == dtype
        assert output.isfinite().all()
        assert attention.shape == (4, HEADS, 7, 7)


def test_map_is_finite_where_remembered_tokens_take_all_attention():
    class Sink(Attention):
        """Attends to the last key alone."""

        def forward(self, x):
            output, attention = super().forward(x)
            attention = torch.zeros_like(attention)
            attention[..., -1] = 1
            return output, attention

    attentions = [*plain_attentions(2), Sink().double()]
    _, attention = run(wrap_all(attentions), random_tokens())[2]
    assert attention.isfinite().all()


@pytest.mark.parametrize("stop", [True, False])
def test_vtm_stopgrad(stop):
    wrappers = wrap_all(plain_attentions(), vtm_stopgrad=stop)
    tokens = [x.requires_grad_() for x in random_tokens()]
    run(wrappers, tokens)[2][0].sum().backward()
    assert tokens[2].grad.abs().sum() > 0
    for x in tokens[:2]:
        assert (x.grad is None) is stop
        if not stop:
            # Only the three remembered tokens of each sample, never the class token.
            assert ((x.grad != 0).any(dim=2).sum(dim=1) == 3).all()
            assert (x.grad[:, 0] == 0).all()
