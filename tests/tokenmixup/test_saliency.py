"""Saliency without a class token: part by part as from the whole map."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tokenmixup import functional
from tokenmixup.functional import attention_saliency, query_key_saliency


def operands(samples, heads, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, samples, heads, tokens, 8, generator=generator)
    return query, key


def of_whole_map(query, key, bias=0.0):
    scores = query.double() @ key.double().transpose(-2, -1) * 0.3 + bias
    return attention_saliency(scores.softmax(-1), class_token=False)


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 7), st.integers(0, 300))
def test_any_part_at_once_gives_the_same(samples, heads, tokens, at_once):
    query, key = operands(samples, heads, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_CPU_CHUNK", at_once)
        found = query_key_saliency(query, key, 0.3, class_token=False)
    assert found.dtype == torch.float32 and found.shape == (samples, tokens)
    torch.testing.assert_close(found.double(), of_whole_map(query, key), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shared", [True, False])
def test_each_part_gets_its_own_bias(monkeypatch, shared):
    query, key = operands(7, 2, 5)
    bias = torch.randn(1 if shared else 7, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(functional, "_CPU_CHUNK", 3 * 25)
    found = query_key_saliency(query, key, 0.3, class_token=False, bias=bias)
    torch.testing.assert_close(found.double(), of_whole_map(query, key, bias), rtol=1e-5, atol=1e-7)


def test_a_compiler_sees_one_part():
    """More would be a larger graph, and another one for other batches."""
    query, key = operands(40, 1, 200)
    assert functional._CPU_CHUNK < 40 * 200 * 200
    graphs = []

    def record(graph, _):
        graphs.append(graph.graph)
        return graph.forward

    compiled = torch.compile(query_key_saliency, backend=record, fullgraph=True)
    found = compiled(query, key, 0.3, class_token=False)
    torch.testing.assert_close(found, query_key_saliency(query, key, 0.3, class_token=False))
    (graph,) = graphs
    assert sum("softmax" in str(node.target) for node in graph.nodes) == 1
