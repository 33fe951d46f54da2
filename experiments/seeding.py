"""Random numbers as a function of names and counters, never of what ran before."""

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


def derive_seed(*parts: int | str) -> int:
    """A 63-bit seed that depends on every part, such as `(seed, "sample", epoch, index)`.

    Equal parts give equal seeds in every process and on every machine.
    """
    digest = hashlib.blake2b(repr(parts).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_generators(seed: int) -> None:
    """Seed Python, NumPy and torch's CPU generator."""
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)
    torch.default_generator.manual_seed(seed)


def seed_step(seed: int, device: torch.device) -> None:
    """Seed the generators that a training step draws from: torch's, of the CPU and of its device.

    It gives the numbers that `torch.manual_seed` would, which looks for devices of every other kind
    as well and takes longer than all that is drawn.
    """
    torch.default_generator.manual_seed(seed)
    if device.type == "cuda":
        torch.cuda.manual_seed(seed)


@contextmanager
def generators_kept() -> Iterator[None]:
    """Give Python, NumPy and torch's CPU generator back afterwards as they were.

    Saving and restoring costs ten times what seeding does (nearly all of it NumPy's): whoever draws
    for many samples keeps the generators once around all of them.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()
    torch_state = torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.default_generator.set_state(torch_state)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Seed Python, NumPy and torch's CPU generator inside, restore all three afterwards."""
    with generators_kept():
        seed_generators(seed)
        yield
