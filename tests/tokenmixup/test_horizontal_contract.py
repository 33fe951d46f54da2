"""The paper's HTM wrapper layer: its reports, its state and its errors.

Dimensions: B batch, H heads, N tokens with prefix, D width, C classes.
"""

import logging

import pytest
import torch

from tests.helpers.horizontal_wrappers import POOLS, StubLayer, random_map, wrap
from tests.helpers.toy_encoder import CLASSES, HEADS, WIDTH, random_batch

# Reports


def reporting_steps(caplog, wrapper, steps, x, y):
    """The numbers of the training steps during which something was logged."""
    found = []
    for step in range(steps):
        caplog.clear()
        wrapper(x, y)
        assert all(record.name.startswith("tokenmixup") for record in caplog.records)
        if caplog.records:
            found.append(step)
    return found


def test_reports_at_most_every_so_many_training_steps(caplog):
    caplog.set_level(logging.DEBUG)
    x, y = random_batch(4, 5)
    wrapper = wrap(StubLayer(random_map(4, 5)), report_every=4, verbose=True)
    found = reporting_steps(caplog, wrapper, 12, x, y)
    assert found == [0, 4, 8]
    wrapper.eval()
    assert reporting_steps(caplog, wrapper, 12, x, y) == []


def test_report_names_its_layer_and_silence_is_kept(caplog, capsys):
    caplog.set_level(logging.DEBUG)
    x, y = random_batch(4, 5)
    layer = StubLayer(random_map(4, 5))
    for use_scorenet in (True, False):
        wrapper = wrap(
            layer, report_every=1, layer_name="stage3", verbose=True, use_scorenet=use_scorenet
        )
        caplog.clear()
        wrapper(x, y)
        (line,) = caplog.messages
        assert line.startswith("HTM stage3 step 1 [tau 0.1, rho 0.01]: easy_share ")
        mixed = (layer.calls[-1][0] != x).any(2).any(1).double().mean()
        assert f", mixed_share {mixed:.4g}, tokens_mixed " in line
    assert reporting_steps(caplog, wrap(layer, report_every=1, verbose=False), 5, x, y) == []
    assert capsys.readouterr().out == ""


def test_a_report_that_nobody_reads_costs_no_synchronisation(caplog, monkeypatch):
    caplog.set_level(logging.WARNING)
    wrapper = wrap(StubLayer(random_map(4, 5)), report_every=1, verbose=True)
    monkeypatch.setattr(torch.Tensor, "item", lambda number: pytest.fail("a number was read"))
    wrapper(*random_batch(4, 5))
    assert wrapper.steps == 1


# Errors


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"scorenet_type": "max_pooling"}, ["scorenet_type", "max_pooling", *POOLS]),
        ({"scorenet_type": "cls_pooling", "has_cls": False}, ["cls_pooling", "has_cls"]),
        ({"tau": -0.1}, ["tau", "-0.1"]),
        ({"rho": -0.1}, ["rho", "-0.1"]),
        ({"scorenet_lambda": -1.0}, ["scorenet_lambda", "-1"]),
        ({"aspect_ratio": 0.0}, ["aspect_ratio", "0"]),
        ({"report_every": 0}, ["report_every", "0"]),
    ],
)
def test_impossible_arguments(arguments, named):
    with pytest.raises(ValueError) as error:
        wrap(StubLayer(random_map(4, 5)), **arguments)
    for word in named:
        error.match(word)


@pytest.mark.parametrize("use_scorenet", [True, False])
@pytest.mark.parametrize(
    "targets, named",
    [
        (torch.ones(4, CLASSES + 1), f"4, {CLASSES + 1}"),  # another number of classes
        (torch.ones(3, CLASSES), f"3, {CLASSES}"),  # of another batch
        (torch.full((4,), CLASSES), f"0 to {CLASSES - 1}"),  # no class
        (torch.zeros(3, dtype=torch.long), r"\(3,\)"),  # class indices of another batch
        (torch.eye(CLASSES, dtype=torch.long)[:4], "int64"),  # mixing would round them to zero
        (torch.full((4, CLASSES), torch.nan), "sum nan"),
        (torch.ones(4, CLASSES), f"sum {CLASSES}"),
        (None, "targets"),
    ],
    ids=["classes", "batch", "index", "indices", "integers", "not finite", "no sum 1", "none"],
)
def test_impossible_targets(targets, named, use_scorenet):
    wrapper = wrap(StubLayer(random_map(4, 5)), tau=10.0, use_scorenet=use_scorenet)
    with pytest.raises(ValueError, match=named):
        wrapper(random_batch(4, 5)[0], targets)


@pytest.mark.parametrize("use_scorenet", [True, False])
def test_class_indices_are_made_one_hot(use_scorenet):
    x, labels = random_batch(4, 5)[0], torch.tensor([4, 0, 2, 0])
    wrapper = wrap(StubLayer(random_map(4, 5)), tau=10.0, use_scorenet=use_scorenet)
    found, expected = (wrapper(x, y)[1] for y in (labels, torch.eye(CLASSES)[labels]))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def test_an_empty_batch():
    with pytest.raises(ValueError, match="the batch has no samples"):
        wrap(StubLayer(random_map(0, 5)))(*random_batch(0, 5))


def test_a_layer_without_an_attention_map():
    with pytest.raises(ValueError, match=r"get_attention_map\(x, y.*; Linear has none"):
        wrap(torch.nn.Linear(WIDTH, WIDTH))


def test_tokens_of_another_width():
    wrapper = wrap(StubLayer(random_map(4, 5)))
    with pytest.raises(ValueError, match=str(WIDTH + 1)):
        wrapper(torch.randn(4, 5, WIDTH + 1).double(), random_batch(4, 5)[1])


@pytest.mark.parametrize("shape", [(4, HEADS, 6, 6), (3, HEADS, 5, 5), (4, 5, 5)])
def test_map_that_does_not_fit_the_tokens(shape):
    with pytest.raises(ValueError, match=", ".join(map(str, shape))):
        wrap(StubLayer(torch.rand(shape)), use_scorenet=False)(*random_batch(4, 5))
