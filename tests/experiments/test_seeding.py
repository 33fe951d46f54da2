"""Seeds and generators."""

import random

import numpy as np
import pytest
import torch

from experiments.seeding import derive_seed, seed_generators, seed_step, seeded


def drawn():
    return random.random(), np.random.rand(), torch.rand(()).item()


def test_a_seed_is_the_same_for_ever():
    """Otherwise a run that resumes under a new version would go on with other images."""
    assert derive_seed(42, "sample", 3, 1234) == 1629872833197583635
    assert derive_seed(42, "sample", 31, 234) != derive_seed(42, "sample", 3, 1234)
    assert derive_seed(42, "sample", 3, "1234") != derive_seed(42, "sample", 3, 1234)
    seeds = [derive_seed(number) for number in range(200)]
    assert len(set(seeds)) == 200 and all(0 <= seed < 2**63 for seed in seeds)
    assert max(seeds) > 0.95 * 2**63


def test_every_generator_is_seeded_and_given_back():
    seed = 2**62 + 5
    numpy, torchs = np.random.RandomState(seed % 2**32), torch.Generator().manual_seed(seed)
    wanted = random.Random(seed).random(), numpy.rand(), torch.rand((), generator=torchs).item()
    seed_generators(1)
    following = drawn()
    seed_generators(1)
    with seeded(seed):
        assert drawn() == wanted
    with pytest.raises(KeyError), seeded(seed):
        raise KeyError
    assert drawn() == following


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_a_step_is_seeded_as_torch_seeds_all_devices(device):
    drawn_after = []
    for seed_by in (torch.manual_seed, lambda seed: seed_step(seed, torch.device(device))):
        torch.rand(3, device=device)
        seed_by(2**62 + 5)
        drawn_after.append((torch.rand(3), torch.rand(3, device=device)))
    torch.testing.assert_close(*drawn_after, rtol=0, atol=0)
