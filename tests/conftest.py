"""For all tests: seeds, one thread, hypothesis' profile, no CUDA tests without CUDA."""

import os
import random
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import numpy as np
import pytest
import torch

# The tensors are tiny: a second thread costs more than it gives, and one thread sums in one order.
# Processes that tests start inherit the variable; their threads would compete with the other tests.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")

hypothesis.settings.register_profile(
    "tokenmixup",
    deadline=None,  # the first call of torch may take a second
    derandomize="CI" in os.environ,  # in CI a commit always gets the same examples
    print_blob=True,
)
hypothesis.settings.load_profile("tokenmixup")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no CUDA device")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def seed() -> int:
    """Every test starts from the same random state."""
    value = 0
    random.seed(value)
    np.random.seed(value)
    torch.manual_seed(value)
    return value


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    """What torch has compiled for other tests neither helps nor limits this one."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture
def data_folder() -> Path:
    """The folder of reference arrays."""
    return Path(__file__).parent / "data"
