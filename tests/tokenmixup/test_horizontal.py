"""The paper's HTM wrapper layer, every argument of it, against the oracle.

Dimensions: B batch, H heads, N tokens with prefix, T patch tokens, D width, C classes,
Q queries, K keys.
"""

import dataclasses
import inspect
import itertools
import math

import numpy as np
import pytest
import torch

from tests.helpers import oracle
from tests.helpers.cases import array, same_bits
from tests.helpers.horizontal_wrappers import POOLS, RHO, StubLayer, random_map, wrap
from tests.helpers.toy_encoder import (
    Block,
    Encoder,
    Horizontal,
    arrays_of,
    encode,
    own_parameters,
    random_batch,
    scorenet_of,
)
from tokenmixup import HorizontalConfig, HorizontalTokenMixupLayer
from tokenmixup.functional import MixingDecision, sample_difficulty
from tokenmixup.horizontal import horizontal_step
from tokenmixup.rules import Rules


def middle_tau(layer, x, y, arguments, num_prefix_tokens):
    """A wrapper whose tau makes about half of this batch easy, and its ScoreNet for the oracle."""
    wrapper = wrap(layer, **arguments)
    scorenet = scorenet_of(wrapper, POOLS[arguments["scorenet_type"]])
    logits = scorenet.logits(array(x), num_prefix_tokens)
    difficulty = np.sort(oracle.sample_difficulty(logits, array(y)))
    tau = float(difficulty[len(difficulty) // 2 - 1 : len(difficulty) // 2 + 1].mean())
    with_tau = wrap(layer, tau=tau, **arguments)
    with_tau.load_state_dict(wrapper.state_dict())
    return with_tau, scorenet, tau


def test_signature_is_the_published_one():
    parameters = inspect.signature(HorizontalTokenMixupLayer).parameters
    published = {
        "use_scorenet": True,
        "scorenet_lambda": 0.001,
        "scorenet_type": "average_pooling",
        "scorenet_stopgrad": False,
        "aspect_ratio": 1.0,
        "batch_first": True,
        "has_cls": True,
        "cls_first": True,
        "report_every": 50,
        "layer_name": None,
        "verbose": True,
    }
    assert list(parameters) == ["layer", "tau", "rho", "d_model", "num_classes", *published]
    assert {name: parameters[name].default for name in published} == published


# Against the oracle


LAYOUTS = [(False, True), (True, True), (True, False)]  # has_cls, cls_first
HEADS_AND_LAYOUTS = [
    (kind, *layout)
    for kind, layout in itertools.product([*POOLS, None], LAYOUTS)
    if kind != "cls_pooling" or layout[0]  # without a class token that one is an error, see below
]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("scorenet_type, has_cls, cls_first", HEADS_AND_LAYOUTS)
def test_matches_oracle(scorenet_type, has_cls, cls_first, batch_first):
    prefix = int(has_cls)
    # The oracle's batch has the class token first; attention the same.
    x, y = random_batch(8, prefix + 9)
    attention = random_map(8, prefix + 9)
    arguments = {"has_cls": has_cls, "cls_first": cls_first, "batch_first": batch_first}
    shift = -1 if has_cls and not cls_first else 0
    layer = StubLayer(attention.roll((shift, shift), (2, 3)))
    if scorenet_type is None:
        wrapper, scorenet, tau = wrap(layer, use_scorenet=False, **arguments), None, 0.1
        assert wrapper.config.scorenet is None
    else:
        arguments["scorenet_type"] = scorenet_type
        wrapper, scorenet, tau = middle_tau(layer, x, y, arguments, prefix)
    expected = oracle.horizontal_step(
        array(x), array(y), array(attention), scorenet, tau, RHO, prefix
    )
    assert expected.mixed.mask.any()
    assert expected.easy.sum() == (4 if scorenet else 8)

    given = x.roll(shift, 1)
    given = given if batch_first else given.transpose(0, 1)
    out, travelling = wrapper(given, y)

    np.testing.assert_array_equal(array(layer.map_calls[0][0]), array(given))
    out = out if batch_first else out.transpose(0, 1)
    np.testing.assert_array_equal(array(out.roll(-shift, 1)), 2 * expected.mixed.tokens)
    if scorenet is None:
        assert torch.is_tensor(travelling)
        targets = travelling
    else:
        targets, loss = travelling
        assert isinstance(travelling, tuple)
        np.testing.assert_allclose(array(loss), 0.001 * expected.scorenet_loss, rtol=1e-9)
    np.testing.assert_allclose(array(targets), expected.mixed.targets, rtol=1e-9)


def test_two_layers_of_an_encoder_match_the_numpy_encoder():
    x, y = random_batch(7, 10)
    blocks = [Block().double() for _ in range(3)]
    kinds = {0: ("attention", 0.5), 2: ("average", 2.0)}
    wrappers = {
        layer: wrap(
            blocks[layer], 1.0, 0.001, scorenet_lambda=scale, scorenet_type=f"{kind}_pooling"
        )
        for layer, (kind, scale) in kinds.items()
    }

    def by_numpy(taus):
        horizontal = {
            layer: Horizontal(taus[layer], 0.001, scorenet_of(wrappers[layer], kind), scale)
            for layer, (kind, scale) in kinds.items()
        }
        arrays = [arrays_of(block) for block in blocks]
        return encode(arrays, array(x), array(y), num_prefix_tokens=1, horizontal=horizontal)

    taus = {0: 1.0, 2: 1.0}
    for step, layer in enumerate(taus):  # each amid the difficulties that its layer sees
        difficulty = np.sort(by_numpy(taus).steps[step].difficulty)
        taus[layer] = float(difficulty[3:5].mean())
        config = dataclasses.replace(wrappers[layer].config, tau=taus[layer])
        wrappers[layer].config = config
    expected = by_numpy(taus)
    encoder = Encoder([wrappers.get(layer, block) for layer, block in enumerate(blocks)])
    out, (targets, loss) = encoder(x, y)
    assert all(step.mixed.mask.any() and not step.easy.all() for step in expected.steps)
    np.testing.assert_allclose(array(out), expected.tokens, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(array(targets), expected.targets, rtol=1e-8)
    np.testing.assert_allclose(array(loss), expected.scorenet_loss, rtol=1e-8)


@pytest.mark.parametrize("has_cls", [True, False])
@pytest.mark.parametrize("aspect_ratio, grid", [(1.0, (4, 4)), (2.0, (4, 8)), (0.5, (8, 4))])
def test_pooled_keys_are_resized_to_the_query_grid(aspect_ratio, grid, has_cls):
    """Each pooled key stands for a 2 by 2 square of queries (grid is rows, columns)."""
    rows, columns = grid
    prefix = int(has_cls)
    queries, keys = prefix + rows * columns, prefix + rows * columns // 4
    attention = random_map(6, queries, keys)
    wrapper = wrap(
        StubLayer(attention),
        rho=0.02,
        use_scorenet=False,
        has_cls=has_cls,
        aspect_ratio=aspect_ratio,
    )
    saliency = [
        oracle.resize(sample.reshape(rows // 2, columns // 2), rows, columns).reshape(-1)
        for sample in oracle.attention_saliency(array(attention), prefix)
    ]
    x, y = random_batch(6, queries)
    expected = oracle.horizontal_step_from_saliency(
        array(x), array(y), np.asarray(saliency), None, 0.1, 0.02, prefix
    )
    assert expected.mixed.mask.any() and not expected.mixed.mask.all()
    out, targets = wrapper(x, y)
    np.testing.assert_array_equal(array(out), 2 * expected.mixed.tokens)
    np.testing.assert_allclose(array(targets), expected.mixed.targets, rtol=1e-9)


@pytest.mark.parametrize(
    "aspect_ratio, queries, keys",
    [
        (10 / 13, (13, 10), (7, 5)),  # sides that pooling rounds
        (4 / 3, (14, 19), (7, 9)),  # the ratio of the image, 2% off that of the grid
        (2.0, (5, 10), (3, 5)),
        (0.5, (7, 3), (1, 1)),
        (1.0, (1, 7), (1, 7)),  # not pooled: needs no grid
    ],
)
def test_pooled_grids_of_nearly_one_aspect_ratio(aspect_ratio, queries, keys):
    attention = random_map(6, math.prod(queries), math.prod(keys))
    wrapper = wrap(StubLayer(attention), has_cls=False, aspect_ratio=aspect_ratio)
    x, _ = random_batch(6, math.prod(queries))
    found = wrapper._saliency(attention, x)
    expected = [
        oracle.resize(sample.reshape(keys), *queries).reshape(-1)
        for sample in oracle.attention_saliency(array(attention))
    ]
    np.testing.assert_allclose(array(found), expected, rtol=1e-9)


@pytest.mark.parametrize(
    "queries, keys, aspect_ratio, message",
    [
        (16, 3, 1.0, r"^3 patch tokens of the keys form no grid .* near 1: the nearest is"),
        (4, 2, 1.0, "^2 patch tokens of the keys form no grid"),
        (13, 4, 1.0, "^13 patch tokens of the queries form no grid"),
        (16, 12, 1.0, r"^12 patch tokens of the keys form a grid of (3 x 4|4 x 3) or of .*exact"),
        (130, 35, 1.0, r"^130 patch tokens of the queries form a grid of .*pass the exact"),
    ],
)
def test_grids_that_cannot_be_told(queries, keys, aspect_ratio, message):
    layer = StubLayer(random_map(2, 1 + queries, 1 + keys))
    with pytest.raises(ValueError, match=message):
        wrap(layer, use_scorenet=False, aspect_ratio=aspect_ratio)(*random_batch(2, 1 + queries))


# How y travels, what the layer is given


def test_layer_gets_y_as_it_travels_on_and_the_map_gets_y_as_it_came():
    x, y = random_batch(4, 5)
    layer = StubLayer(random_map(4, 5))
    wrapper = wrap(layer, tau=10.0)
    first = wrapper(x, y, "positional", named=3)[1]
    assert layer.map_calls[0][1] is y
    assert layer.calls[0][1] is first
    assert layer.calls[0][2:] == layer.map_calls[0][2:] == (("positional",), {"named": 3})

    targets, loss = wrapper(x, first)[1]
    assert layer.map_calls[1][1] is first
    assert targets.shape == y.shape and loss.shape == first[1].shape == (4,)
    scorenet = scorenet_of(wrapper, "average")
    added = oracle.cross_entropy(scorenet.logits(array(x), 1), array(first[0]))
    np.testing.assert_allclose(array(loss), array(first[1]) + 0.001 * added, rtol=1e-9)


def test_a_layer_without_scorenet_hands_an_earlier_loss_on():
    x, y = random_batch(4, 5)
    layer = StubLayer(random_map(4, 5))
    first = wrap(layer, tau=10.0)(x, y)[1]
    targets, loss = wrap(layer, use_scorenet=False)(x, first)[1]
    assert same_bits(loss, first[1])
    assert not torch.equal(targets, first[0])


@pytest.mark.parametrize("use_scorenet", [True, False])
def test_evaluation_is_the_wrapped_layer(use_scorenet):
    x, y = random_batch(4, 5)
    block = Block().double()
    wrapper = wrap(block, tau=10.0, use_scorenet=use_scorenet).eval()
    for target in (y, None):
        out, travelling = wrapper(x, target)
        assert same_bits(out, block(x, target)[0])
        assert travelling is target


# Gradients and dtypes


@pytest.mark.parametrize("scorenet_type", POOLS)
@pytest.mark.parametrize("stop", [True, False])
def test_scorenet_stopgrad(scorenet_type, stop):
    x, y = random_batch(4, 5)
    x.requires_grad_()
    layer = StubLayer(random_map(4, 5))
    wrapper = wrap(layer, scorenet_type=scorenet_type, scorenet_stopgrad=stop)
    _, (targets, loss) = wrapper(x, y)
    assert not targets.requires_grad
    loss.sum().backward()
    reached = x.grad is not None and bool(x.grad.abs().sum() > 0)
    assert reached is not stop
    assert layer.attention_map.grad is None
    own = own_parameters(wrapper)
    assert own and all(p.grad is not None for p in own)
    # A constant added to every token's pooling score changes nothing, so its bias may get zero.
    assert all(p.grad.abs().sum() > 0 for p in own if p.shape != (1,))


@pytest.mark.parametrize("use_scorenet", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(dtype, use_scorenet):
    x, y = random_batch(6, 10, dtype)
    wrapper = wrap(StubLayer(random_map(6, 10)), tau=10.0, use_scorenet=use_scorenet).to(dtype)
    out, travelling = wrapper(x.requires_grad_(), y)
    targets, loss = travelling if use_scorenet else (travelling, torch.zeros(6))
    assert out.dtype == targets.dtype == dtype and not torch.equal(out, 2 * x)
    assert loss.isfinite().all() and loss.shape == (6,)
    torch.testing.assert_close(targets.float().sum(1), torch.ones(6), rtol=0, atol=0.02)
    (out.sum() + loss.sum()).backward()


@pytest.mark.parametrize("scorenet_type", POOLS)
def test_under_autocast(scorenet_type):
    block = Block()
    wrapper = wrap(block, tau=10.0, rho=0.0, scorenet_type=scorenet_type).float()
    x, y = random_batch(6, 10, torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        out, (targets, loss) = wrapper(x.requires_grad_(), y)
    assert targets.dtype == torch.float32 and loss.isfinite().all()
    assert not torch.equal(targets, y)
    (out.sum() + loss.sum()).backward()
    assert all(p.grad is not None for p in (*own_parameters(wrapper), *block.parameters()))


# Statistics


@pytest.mark.parametrize(
    ("labels", "shares"),
    [("saliency", [0.6 / (0.9 + 0.6), 0.4 / (0.8 + 0.4), 0]), ("tokens", [1 / 4, 2 / 4, 0])],
)
def test_labels_and_sink_statistics_by_hand(labels, shares):
    saliency = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.6, 0.1, 0.1, 0.2], [0.1, 0.2, 0.1, 0.6]])
    # 0 takes the last token of 2: a = 0.9, b = 0.6; 1 two tokens of 0: a = 0.8, b = 0.4; 2 nothing
    partner = torch.tensor([2, 0, 2])
    mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool()

    class Given(Rules):
        def decide(self, layer, saliency, targets, easy, rho):
            return MixingDecision(partner, mask)

    config = HorizontalConfig(layers=(1,), rho=0.1, scorenet=None, labels=labels)
    step = horizontal_step(Given(), 1, torch.eye(3), saliency / 2, None, config)
    taken = torch.stack([step.targets[0, 2], step.targets[1, 0]])
    assert taken.tolist() == pytest.approx(shares[:2])
    assert step.stats["label_share"].item() == pytest.approx(sum(shares) / 3)
    assert step.stats["largest_saliency_share"].item() == pytest.approx((0.5 + 0.6 + 0.6) / 3)
    assert step.stats["same_place_share"].item() == pytest.approx(2 / 3)


@pytest.mark.parametrize("easy", [2, 0])
def test_statistics_by_hand_with_some_and_without_easy_samples(easy):
    saliency = torch.tensor([[0.5, 0.2, 0.2, 0.1], [0.6, 0.1, 0.1, 0.2], [0.1, 0.2, 0.1, 0.6]])
    logits = torch.tensor([[3.0, 0, 0], [0, 1, 0], [2, 2, -1]])
    mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 0], [0, 0, 0, 0]]).bool() & (easy > 0)

    class Given(Rules):
        def decide(self, layer, saliency, targets, easy, rho):
            return MixingDecision(torch.tensor([2, 0, 2]), mask)

    config = HorizontalConfig(layers=(1,), rho=0.1, tau=0.1 if easy else 0.0)
    measured = sample_difficulty(logits, torch.eye(3))
    stats = horizontal_step(Given(), 1, torch.eye(3), saliency, measured, config).stats
    found = {name: stats[name].item() for name in stats}
    difficulty = oracle.sample_difficulty(array(logits), np.eye(3))
    assert sorted(difficulty <= config.tau) == [False] * (3 - easy) + [True] * easy
    assert found["difficulty_min"] == pytest.approx(min(difficulty))
    assert found["difficulty_mean"] == pytest.approx(sum(difficulty) / 3)
    assert found["easy_share"] == found["mixed_share"] == pytest.approx(easy / 3)
    assert found["tokens_mixed"] == (1.5 if easy else 0)
    assert found["saliency_difference_max"] == pytest.approx(0.5 if easy else 0)
    assert found["saliency_difference_mean"] == pytest.approx(1.4 / (2 * 4) if easy else 0)
    assert found["label_share"] == pytest.approx((0.4 + 1 / 3) / 2 if easy else 0)
