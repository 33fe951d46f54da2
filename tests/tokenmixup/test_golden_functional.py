"""HTM's arithmetic against arrays measured with the paper's released code.

The released code's one defect in the mask is corrected in them (docs/deviations.md). The oracle is
held to the same arrays, so that it is known to be right before it judges anything.

Dimensions: B batch, N tokens with prefix, P prefix tokens, T = N - P patch tokens, D width,
C classes.
"""

import numpy as np
import pytest
import torch

from tests.helpers import oracle
from tokenmixup import functional

GOLDEN = [("htm_cls", 1), ("htm_seqpool", 0)]


@pytest.fixture(params=GOLDEN, ids=[name for name, _ in GOLDEN])
def golden(request, data_folder):
    name, num_prefix_tokens = request.param
    with np.load(data_folder / f"{name}.npz", allow_pickle=False) as arrays:
        return dict(arrays), num_prefix_tokens


def test_library_matches_golden(golden):
    arrays, num_prefix_tokens = golden
    out = functional.horizontal_mixup(
        torch.from_numpy(arrays["tokens"]),
        torch.from_numpy(arrays["targets"]),
        torch.from_numpy(arrays["saliency"]),
        torch.from_numpy(arrays["easy"]),
        float(arrays["rho"]),
        num_prefix_tokens,
    )
    assert out.mask.any(), "the golden case mixes something"
    np.testing.assert_allclose(out.tokens.numpy(), arrays["mixed_tokens"], rtol=1e-4)
    np.testing.assert_allclose(out.targets.numpy(), arrays["mixed_targets"], rtol=1e-4, atol=1e-7)


def test_oracle_matches_golden(golden):
    arrays, num_prefix_tokens = golden
    expected = oracle.horizontal_mixup(
        arrays["tokens"],
        arrays["targets"],
        arrays["saliency"],
        arrays["easy"],
        float(arrays["rho"]),
        num_prefix_tokens,
    )
    np.testing.assert_allclose(expected.tokens, arrays["mixed_tokens"], rtol=1e-4)
    np.testing.assert_allclose(expected.targets, arrays["mixed_targets"], rtol=1e-4, atol=1e-7)
