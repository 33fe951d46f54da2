"""Batches that HTM mixes, hypothesis' and others, and what their mixtures are compared with.

Saliencies lie on a grid of 1/128 (eight significant bits at most) and rho on one of 1/256, so every
float dtype holds them exactly: a comparison with rho has one right answer whatever the dtype.

Dimensions: B batch, N tokens with prefix, P prefix tokens, T = N - P patch tokens, D width,
C classes.
"""

from dataclasses import dataclass

import numpy as np
import pytest
import torch
from hypothesis import strategies as st

from tests.helpers import oracle
from tokenmixup import functional

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

# Rounding of one multiplication and addition in each dtype, with room for a few of them.
TOLERANCE = {
    torch.float64: 1e-12,
    torch.float32: 2e-6,
    torch.float16: 4e-3,
    torch.bfloat16: 3e-2,
}


@dataclass
class Case:
    """The arguments of horizontal_mixup."""

    tokens: torch.Tensor  # (B, N, D)
    targets: torch.Tensor  # (B, C)
    saliency: torch.Tensor  # (B, T)
    easy: torch.Tensor  # (B,) bool
    rho: float
    num_prefix_tokens: int

    def arguments(self):
        return (
            self.tokens,
            self.targets,
            self.saliency,
            self.easy,
            self.rho,
            self.num_prefix_tokens,
        )

    def arrays(self):
        """The same as float64 arrays for the oracle."""
        return tuple(
            array(value) if torch.is_tensor(value) else value for value in self.arguments()
        )


def array(tensor):
    """A NumPy array: bool stays bool, floats become float64."""
    tensor = tensor.detach().cpu()
    return tensor.numpy() if tensor.dtype == torch.bool else tensor.double().numpy()


def same_bits(first, second):
    """Whether two tensors agree bit for bit, signs of zero and NaN included."""
    if first.dtype != second.dtype or first.shape != second.shape:
        return False
    return torch.equal(
        first.detach().reshape(-1).contiguous().view(torch.uint8),
        second.detach().reshape(-1).contiguous().view(torch.uint8),
    )


def saliency_array(kind, rng, batch, patches):
    """(B, T) on the grid of 1/128."""
    if kind == "equal":
        return np.full((batch, patches), rng.integers(0, 129) / 128)
    if kind == "zero":
        return np.zeros((batch, patches))
    if kind == "equal_samples":
        return np.repeat(rng.integers(0, 129, (1, patches)) / 128, batch, axis=0)
    if kind == "ties":
        return rng.integers(0, 3, (batch, patches)) / 4
    if kind == "some_zero_samples":
        return rng.integers(0, 129, (batch, patches)) * rng.integers(0, 2, (batch, 1)) / 128
    return rng.integers(0, 129, (batch, patches)) / 128


def easy_array(kind, rng, batch):
    """(B,) bool."""
    easy = np.zeros(batch, bool)
    if kind == "all":
        easy[:] = True
    elif kind == "one":
        easy[rng.integers(batch)] = True
    elif kind == "some":
        easy = rng.integers(0, 2, batch).astype(bool)
    return easy


def soft_targets(rng, batch, classes):
    """(B, C), rows of sum 1, one-hot and smooth ones mixed."""
    smooth = rng.dirichlet(np.ones(classes), batch)
    hard = np.eye(classes)[rng.integers(0, classes, batch)]
    return np.where(rng.integers(0, 2, (batch, 1)) == 1, smooth, hard)


@st.composite
def cases(draw, dtypes=DTYPES, most_patches=16):
    """Batches of every size, dtype and degree of degeneracy that the contract allows."""
    batch = draw(st.integers(1, 7) | st.sampled_from([1, 12]), label="B")
    patches = draw(st.integers(1, most_patches), label="T")
    prefix = draw(st.sampled_from([0, 1, 5]), label="P")
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1), label="seed"))
    saliency_kind = draw(
        st.sampled_from(
            ["grid", "ties", "equal", "equal_samples", "zero", "some_zero_samples", "grid"]
        ),
        label="saliency",
    )
    easy_kind = draw(st.sampled_from(["some", "all", "one", "none"]), label="easy")
    rho = draw(st.sampled_from([0.0, 1 / 256, 16 / 256, 65 / 256, 200 / 256, 2.0]), label="rho")
    dtype = draw(st.sampled_from(dtypes), label="dtype")
    # Under autocast the targets and the map keep float32 beside low-precision tokens.
    other = draw(st.sampled_from([dtype, torch.promote_types(dtype, torch.float32)]))
    width, classes = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    tokens = rng.standard_normal((batch, prefix + patches, width))
    targets = soft_targets(rng, batch, classes)
    # A negative zero shows whether a value was passed through or computed anew.
    tokens[rng.random(tokens.shape) < 0.1] = -0.0
    targets[targets == 0] = -0.0
    return Case(
        torch.tensor(tokens).to(dtype),
        torch.tensor(targets).to(other),
        torch.tensor(saliency_array(saliency_kind, rng, batch, patches)).to(other),
        torch.tensor(easy_array(easy_kind, rng, batch)),
        rho,
        prefix,
    )


def random_case(batch=9, patches=12, prefix=1, dtype=torch.float64, rho=0.02, seed=0):
    """A generic batch, half of it easy: no ties, so the optimum is unique."""
    rng = np.random.default_rng(seed)
    return Case(
        torch.tensor(rng.standard_normal((batch, prefix + patches, 4))).to(dtype),
        torch.tensor(soft_targets(rng, batch, 5)).to(dtype),
        torch.tensor(rng.dirichlet(np.ones(patches), batch)).to(dtype),
        torch.tensor(rng.permutation(batch) < (batch + 1) // 2),
        rho,
        prefix,
    )


def wide(dtype):
    """What saliency, difficulty and gain are computed in; the inputs' rounding is not theirs."""
    return torch.promote_types(dtype, torch.float32)


def check_against_oracle(case, out):
    """Partners are an optimum and all else follows from them by the oracle's equations."""
    _, targets, saliency, easy, rho, prefix = case.arrays()
    expected = oracle.mix(array(case.tokens), targets, saliency, out.partner.tolist(), rho, prefix)
    np.testing.assert_array_equal(out.mask.numpy(), expected.mask)
    np.testing.assert_array_equal(out.partner.numpy(), expected.partner)
    np.testing.assert_array_equal(array(out.tokens), expected.tokens)
    slack = TOLERANCE[case.targets.dtype]
    np.testing.assert_allclose(array(out.targets), expected.targets, rtol=slack, atol=slack)

    decision = functional.MixingDecision(out.partner, out.mask)
    share = functional.label_share(case.saliency, decision)
    scaled = functional.label_share(case.saliency.double() / 1024, decision)
    assert share.dtype == wide(case.saliency.dtype)
    np.testing.assert_allclose(array(share), array(scaled), rtol=TOLERANCE[share.dtype])

    gain = oracle.saliency_gain(saliency, easy, rho)
    rows = np.flatnonzero(easy)
    # A sample without a partner gains nothing, whichever column it was given.
    achieved = sum(gain[e, out.partner[i]] for e, i in enumerate(rows) if out.partner[i] != i)
    best = oracle.total_gain(gain, oracle.best_assignment(gain))
    assert achieved == pytest.approx(best, rel=1e-6, abs=1e-12)
