"""The paper's VTM wrapper layer: its state, its reports and its errors.

Dimensions: B batch, H heads, N tokens with prefix, D width, kappa remembered tokens of each layer.
"""

import copy
import gc
import logging
import pickle
import threading
import weakref

import pytest
import torch

from tests.helpers.cases import same_bits
from tests.helpers.toy_encoder import HEADS, WIDTH, Attention, Block, Encoder, random_batch
from tests.helpers.vertical_wrappers import plain_attentions, random_tokens, run, wrap, wrap_all
from tokenmixup import HorizontalTokenMixupLayer, VerticalTokenMixupLayer
from tokenmixup.vertical import VerticalMemory

# State


def test_an_index_that_does_not_rise_begins_another_model():
    tokens = random_tokens()
    first, second, last_of_second = (wrap(Attention().double(), i, (1,)) for i in (0, 0, 1))
    first(tokens[0])
    with pytest.raises(RuntimeError, match="0"):
        last_of_second(tokens[1])
    second(tokens[0])
    last_of_second(tokens[1])


@pytest.mark.parametrize("in_turns", [False, True])
def test_two_models_interleaved_call_by_call_do_not_meet(in_turns):
    """Models whose layers were built in turns need a memory each."""
    attentions = plain_attentions(), plain_attentions()
    tokens = random_tokens(), random_tokens()
    expected = [run(wrap_all(attentions[m]), tokens[m]) for m in range(2)]
    if in_turns:
        memories, models = (VerticalMemory(), VerticalMemory()), ([], [])
        for layer in range(3):
            for m in (0, 1):
                models[m].append(wrap(attentions[m][layer], layer, memory=memories[m]))
    else:
        models = [wrap_all(attentions[m]) for m in range(2)]
    for _ in range(2):
        for layer in range(3):
            for m in (0, 1):
                result = models[m][layer](tokens[m][layer])
                assert same_bits(result[0], expected[m][layer][0])


@pytest.mark.parametrize(
    "duplicate", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))]
)
def test_a_copied_model_is_a_model_of_its_own(duplicate):
    """As for a teacher beside its student: the copy's layers share a memory, but not ours."""
    attentions, tokens, others = plain_attentions(), random_tokens(), random_tokens()
    expected = run(wrap_all(attentions), tokens)
    expected_others = run(wrap_all(attentions), others)
    student = torch.nn.ModuleList(wrap_all(attentions))
    # What is remembered is part of a graph, which cannot be copied.
    student[0](tokens[0].clone().requires_grad_() * 1)
    teacher = duplicate(student)
    for layer in range(3):
        first, second = student[layer](tokens[layer]), teacher[layer](others[layer])
        assert same_bits(first[0], expected[layer][0])
        assert same_bits(second[0], expected_others[layer][0])


def test_threads_do_not_meet():
    attentions = plain_attentions()
    wrappers = wrap_all(attentions)
    batches = [random_tokens(), random_tokens()]
    expected = [run(wrap_all(attentions), tokens) for tokens in batches]
    barrier = threading.Barrier(2, timeout=20)
    results = [[], []]

    def work(m):
        for layer in range(3):
            results[m].append(wrappers[layer](batches[m][layer]))
            barrier.wait()  # both threads have gone through this layer

    threads = [threading.Thread(target=work, args=(m,)) for m in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=30)
    for m in (0, 1):
        assert len(results[m]) == 3
        for result, wanted in zip(results[m], expected[m], strict=True):
            assert same_bits(result[0], wanted[0])


def test_the_lowest_layer_begins_a_new_pass():
    attentions, tokens = plain_attentions(), random_tokens()
    wrappers = wrap_all(attentions)
    expected = run(wrappers, tokens)
    # A pass that broke off half way, of another batch size, and no reset.
    wrappers[0](torch.randn(9, 7, WIDTH).double())
    wrappers[1](torch.randn(9, 7, WIDTH).double())
    for wrapper, x, wanted in zip(wrappers, tokens, expected, strict=True):
        assert same_bits(wrapper(x)[0], wanted[0])
    assert not wrappers[0]._memory.tokens(), "the last VTM layer ends the pass"


@pytest.mark.parametrize("stop_gradient", [True, False])
def test_a_layer_that_is_left_out_is_no_earlier_pass_s(stop_gradient):
    """LayerDrop, or a frozen layer in evaluation mode."""
    wrappers, tokens = wrap_all(plain_attentions(), vtm_stopgrad=stop_gradient), random_tokens()
    run(wrappers, tokens)
    wrappers[0].eval()
    for wrapper, x in zip(wrappers[:2], tokens, strict=False):
        wrapper(x)
    with pytest.raises(RuntimeError, match=r"found no tokens of layer\(s\) 0.* evaluation mode"):
        wrappers[2](tokens[2])


@pytest.mark.parametrize("called, missing", [([], "0, 1"), ([0], "1"), ([1], "0")])
def test_layers_that_remembered_nothing_are_named(called, missing):
    wrappers, tokens = wrap_all(plain_attentions()), random_tokens()
    for layer in called:
        wrappers[layer](tokens[layer])
    with pytest.raises(RuntimeError, match=missing):
        wrappers[2](tokens[2])


@pytest.mark.parametrize("resetting", [0, 1, 2])
def test_reset_of_any_layer_clears_the_memory(resetting):
    wrappers, tokens = wrap_all(plain_attentions()), random_tokens()
    run(wrappers, tokens)
    wrappers[0](tokens[0])
    wrappers[1](tokens[1])
    wrappers[resetting].reset()
    with pytest.raises(RuntimeError, match="0, 1"):
        wrappers[2](tokens[2])


@pytest.mark.parametrize("last_layer", [0, 1, 2])
def test_what_is_remembered_ends_with_its_model(last_layer):
    """Also that of the model that was built last, which the next wrapper might have belonged to."""
    wrappers = wrap_all(plain_attentions())[: last_layer + 1]
    tokens = [x.requires_grad_() * 1 for x in random_tokens()]
    for wrapper, x in zip(wrappers, tokens, strict=False):
        wrapper(x)
    held = [weakref.ref(memory) for memory in (wrappers[0]._memory, *tokens)]
    del wrappers, wrapper, tokens, x
    gc.collect()
    assert [reference() for reference in held] == [None] * 4


# Reports


def test_reports_at_most_every_so_many_training_steps(caplog, capsys):
    caplog.set_level(logging.DEBUG)
    tokens = random_tokens()
    attentions = plain_attentions()
    wrappers = wrap_all(attentions[:2], verbose=False)
    wrappers.append(wrap(attentions[2], 2, report_every=4, verbose=True))
    found = []
    for step in range(12):
        caplog.clear()
        run(wrappers, tokens)
        assert all(record.name.startswith("tokenmixup") for record in caplog.records)
        if caplog.records:
            found.append(step)
            line = f"VTM layer 2 step {step + 1} [kappa 3]: attends to 6 remembered tokens"
            assert caplog.messages == [line]
    assert found == [0, 4, 8]
    caplog.clear()
    for wrapper in wrappers:
        wrapper.eval()
    for _ in range(8):
        run(wrappers, tokens)
    assert not caplog.records and capsys.readouterr().out == ""


def test_a_map_that_htm_asks_for_is_no_training_step_of_its_own(caplog):
    caplog.set_level(logging.DEBUG)
    x, y = random_batch(4, 7)
    blocks = [Block().double() for _ in range(3)]
    for layer, block in enumerate(blocks):
        last = layer == 2
        block.attention = wrap(block.attention, layer, (2,), 2, report_every=4, verbose=last)
    blocks[2] = HorizontalTokenMixupLayer(
        blocks[2], 0.1, 0.001, WIDTH, y.shape[1], use_scorenet=False, verbose=False
    )
    encoder, found = Encoder(blocks), []
    for step in range(12):
        caplog.clear()
        encoder(x, y)
        found += [step] * len(caplog.records)
    assert found == [0, 4, 8]


# Errors


@pytest.mark.parametrize(
    "arguments, named",
    [
        ({"apply_layers": (0,)}, ["apply_layers", "0"]),
        ({"apply_layers": (0, 2)}, ["apply_layers", "0"]),
        ({"apply_layers": ()}, ["apply_layers"]),
        ({"apply_layers": (-1,)}, ["apply_layers", "-1"]),
        ({"layer_index": -1}, ["layer_index", "-1"]),
        ({"kappa": 0}, ["kappa", "0"]),
        ({"report_every": 0}, ["report_every", "0"]),
    ],
)
def test_impossible_arguments(arguments, named):
    with pytest.raises(ValueError) as error:
        wrap(Attention(), **({"layer_index": 1} | arguments))
    for word in named:
        error.match(word)


@pytest.mark.parametrize("dim, heads", [(7, 2), (0, 2), (6, 0), (-6, -2)])
def test_a_width_that_heads_cannot_share(dim, heads):
    with pytest.raises(ValueError, match=rf"multiple of vtm_attn_numheads.*{dim} and {heads}"):
        VerticalTokenMixupLayer(Attention(), 0, (2,), 3, dim, heads)


def test_more_remembered_tokens_than_there_are():
    wrappers = wrap_all(plain_attentions(), kappa=7)
    with pytest.raises(ValueError, match=r"kappa.*7|7.*kappa"):
        wrappers[0](random_tokens()[0])


@pytest.mark.parametrize(
    "dim, heads, named",
    [(WIDTH + 2, HEADS, ["vtm_attn_dim", "8", "6"]), (WIDTH, 3, ["vtm_attn_numheads", "3", "2"])],
)
def test_width_and_heads_that_the_attention_does_not_have(dim, heads, named):
    tokens = random_tokens()
    wrappers = [
        VerticalTokenMixupLayer(attention, layer, (2,), 3, dim, heads, verbose=False)
        for layer, attention in enumerate(plain_attentions())
    ]
    with pytest.raises(ValueError) as error:
        run(wrappers, tokens)
    for word in named:
        error.match(word)


class Returning(Attention):
    """An attention whose map is made into something else on its way out."""

    def __init__(self, change):
        super().__init__()
        self.change = change

    def forward(self, x):
        output, attention = super().forward(x)
        return self.change(output, attention)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda output, attention: output, "the map is missing"),
        (lambda output, attention: (output, None), "the map is missing"),
        (lambda output, attention: (output, attention.mean(1)), "4, 2, 7, 7.*4, 7, 7"),
        (lambda output, attention: (output, attention[..., :5]), "4, 2, 7, 7.*4, 2, 7, 5"),
    ],
)
def test_attention_that_returns_another_map(change, message):
    with pytest.raises(ValueError, match=rf"attention of layer 0 must return .*map.*{message}"):
        wrap(Returning(change).double(), 0)(random_tokens()[0])


def test_tokens_that_are_not_three_dimensional():
    with pytest.raises(ValueError, match=r"\(B, N, D\).*\(7, 6\)"):
        wrap(Attention().double(), 0)(random_tokens()[0][0])
