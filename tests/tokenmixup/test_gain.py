"""Gains: whatever the chunks are, they equal a slow reference, and 0 is exactly 0."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.helpers import oracle
from tests.helpers.cases import array
from tokenmixup import functional
from tokenmixup.functional import saliency_gain


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99), st.integers(0, 2000))
def test_any_chunk_gives_the_reference(samples, tokens, seed, most):
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(samples, tokens, generator=generator).softmax(1)
    easy = torch.rand(samples, generator=generator) < 0.7
    rho = 0.1 / tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_CPU_CHUNK", most)
        gain = saliency_gain(saliency, easy, rho)
    assert torch.equal(gain, saliency_gain(saliency, easy, rho)), "bits do not depend on chunks"
    expected = oracle.saliency_gain(array(saliency), easy, rho)
    np.testing.assert_allclose(gain.numpy(), expected, rtol=2e-6, atol=1e-8)


def test_no_gain_is_exactly_zero():
    """A solver leaves such samples alone; a rounded 1e-9 would give them partners."""
    saliency = torch.rand(40, 196).softmax(1)
    easy = torch.ones(40, dtype=torch.bool)
    gain = saliency_gain(saliency, easy, rho=0.0)
    assert (gain.diagonal() == 0).all() and (gain > 0).sum() == 40 * 39
    assert (saliency_gain(saliency, easy, rho=1.0) == 0).all()
