"""The gain matrix: the loop in C, its plain twin and a slow reference give the same."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

from tests.helpers.compiler import needs_compiler
from tokenmixup import _gain
from tokenmixup.functional import saliency_gain


def slow_gain(rows, columns, rho):
    rows, columns = rows.double().numpy(), columns.double().numpy()
    return np.array([[np.maximum(c - r - rho, 0).sum() for c in columns] for r in rows])


@needs_compiler
def test_the_loop_is_built_where_there_is_a_compiler():
    assert _gain.compiled_loop() is not None


@needs_compiler
@given(
    st.integers(0, 11), st.integers(1, 9), st.integers(1, 70), st.integers(1, 7), st.integers(0, 99)
)
def test_loop_plain_twin_and_reference_agree(num_rows, num_columns, tokens, threads, seed):
    """Whatever is left over by rows, tokens and threads."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.rand(num_rows, tokens, generator=generator).softmax(1)
    columns = torch.rand(num_columns, tokens, generator=generator).softmax(1)
    rho = 0.1 / tokens
    gain = torch.full((num_rows, num_columns), float("nan"))
    loop = _gain.compiled_loop()
    places = rows.data_ptr(), columns.data_ptr()
    loop(*places, rho, num_rows, num_columns, tokens, threads, gain.data_ptr())
    expected = slow_gain(rows, columns, rho).reshape(num_rows, num_columns)
    np.testing.assert_allclose(gain.numpy(), expected, rtol=2e-6, atol=1e-8)
    plain = _gain._plain(rows, columns, rho)
    np.testing.assert_allclose(plain.numpy(), expected, rtol=2e-6, atol=1e-8)


@needs_compiler
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("place", [0, 15, 16, 36])  # in the vectors and in what they leave over
def test_what_is_not_finite_stays_visible(value, place):
    saliency = torch.rand(9, 37)
    saliency[5, place] = value
    gain = _gain.gain_rows(saliency, saliency, 0.01)
    assert torch.equal(gain.isfinite(), _gain._plain(saliency, saliency, 0.01).isfinite())
    assert not gain.isfinite().all()


@needs_compiler
def test_several_threads_share_a_large_batch(monkeypatch):
    saliency = torch.rand(300, 128)
    alone = _gain.gain_rows(saliency, saliency, 0.3)
    monkeypatch.setattr(_gain, "_ALONE", 0)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    assert torch.equal(_gain.gain_rows(saliency, saliency, 0.3), alone)


def test_a_part_of_a_larger_tensor_is_read_right():
    """Its rows do not follow each other in memory."""
    wide = torch.rand(6, 40)
    saliency = wide[:, 3:20]
    easy = torch.tensor([True, False, True, True, False, True])
    gain = saliency_gain(saliency, easy, 0.1)
    np.testing.assert_allclose(gain, slow_gain(saliency[easy], saliency, 0.1), rtol=2e-6)


def test_without_the_loop_all_is_the_same(monkeypatch):
    saliency = torch.rand(12, 30)
    by_loop = _gain.gain_rows(saliency, saliency, 0.2)
    monkeypatch.setattr(_gain, "compiled_loop", lambda: None)
    torch.testing.assert_close(_gain.gain_rows(saliency, saliency, 0.2), by_loop)


def test_tensors_without_memory_take_the_plain_way():
    """Those of tools that estimate a model's memory or trace it."""
    with FakeTensorMode():
        gain = _gain.gain_rows(torch.empty(5, 8), torch.empty(7, 8), 0.1)
    assert gain.shape == (5, 7)


def test_tensors_that_torch_func_wraps_take_the_plain_way():
    saliency, easy = torch.rand(6, 40).softmax(1), torch.ones(6, dtype=torch.bool)
    expected = saliency_gain(saliency, easy, 0.001)
    several = torch.func.vmap(lambda s: saliency_gain(s, easy, 0.001))(saliency.expand(2, 6, 40))
    torch.testing.assert_close(several, expected.expand(2, 6, 6))
