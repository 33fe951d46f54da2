"""The assignment problem: the solver in C, lapx and SciPy find the same optimum."""

import shutil
import subprocess
from ctypes import CDLL
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.optimize import linear_sum_assignment

from tokenmixup import _assignment
from tokenmixup._assignment import solve_assignment
from tokenmixup.functional import saliency_gain

# where there is a compiler, the solver must have been built
needs_compiler = pytest.mark.skipif(shutil.which("cc") is None, reason="no C compiler")
SOURCE = Path(_assignment.__file__).with_name("_assignment_solver.c")
SHARPNESS = {"smooth": 0.3, "usual": 1.0, "peaked": 3.0, "mixed": None}


def saliency(kind, samples, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(samples, tokens, generator=generator)
    factors = torch.empty(samples, 1).uniform_(0.3, 4, generator=generator)
    return (logits * (SHARPNESS[kind] or factors)).softmax(1)


def total(gain, columns):
    rows = torch.arange(len(gain))
    assert columns.dtype == torch.int64 and columns.unique().numel() == len(gain)
    return gain.double()[rows, columns].sum().item()


def optimum(gain):
    rows, columns = linear_sum_assignment(gain.double().numpy(), maximize=True)
    return gain.double()[torch.from_numpy(rows), torch.from_numpy(columns)].sum().item()


def one_hot_gains(places):
    """Of samples that have all of their saliency on one token, (B, B)."""
    return (places[:, None] != places).astype(float)


@st.composite
def gains(draw):
    """Up to (20, 40): spread, tied or of one rank, on any scale, with rows and columns of zeros."""
    columns = draw(st.integers(1, 40))
    rows = draw(st.integers(0, min(columns, 20)) | st.just(min(columns, 20)))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(
        st.sampled_from(("spread", "negative", "ties", "products", "uneven", "same", "hot"))
    )
    gain = {
        "spread": lambda: random.random((rows, columns)),
        "negative": lambda: random.standard_normal((rows, columns)),
        "ties": lambda: random.integers(0, 3, (rows, columns)),
        "products": lambda: np.outer(np.arange(rows), np.arange(columns)),
        "uneven": lambda: np.exp(5 * random.standard_normal((rows, columns))),
        "hot": lambda: one_hot_gains(random.integers(0, 4, columns))[:rows],
        "same": lambda: np.ones((rows, columns)),
    }[kind]()
    gain = gain * 10.0 ** draw(st.integers(-30, 30))
    gain = gain * (random.random((rows, 1)) >= draw(st.sampled_from((0, 0.5))))
    gain = gain * (random.random(columns) >= draw(st.sampled_from((0, 0.5))))
    return torch.from_numpy(gain).float()


@needs_compiler
def test_the_solver_is_built_where_there_is_a_compiler():
    assert _assignment.compiled_solver() is not None


@given(gains())
def test_both_ways_find_the_optimum(gain):
    best = optimum(gain)
    for dtype in (torch.float32, torch.float64):  # by the solver in C, and by lapx
        columns = solve_assignment(gain.to(dtype))
        assert best - total(gain, columns) <= slack(gain)


def slack(gain):
    """How far totals count as equal: 2^-40 of their gains, of which each row's is at most this."""
    return 2**-39 * gain.double().abs().amax(1).sum().item() if gain.numel() else 0


@needs_compiler
def test_both_ways_gain_the_same_where_all_may_be_exchanged():
    """Hundreds of one-hot saliencies: partners may differ, but not what they gain."""
    places = torch.randint(20, (300,), generator=torch.Generator().manual_seed(0)).numpy()
    gain = torch.from_numpy(one_hot_gains(places)).float()
    assert total(gain, solve_assignment(gain)) == total(gain, solve_assignment(gain.double()))


@pytest.mark.parametrize("wanted", [0, 1])
def test_totals_closer_than_the_tilt_count_as_equal(wanted):
    """In float64: the position decides below 2^-40, the gain above."""
    gain = torch.ones(1, 2, dtype=torch.float64)
    by_position = solve_assignment(gain)
    gain[0, wanted] += 1e-14
    assert torch.equal(solve_assignment(gain), by_position)
    gain[0, wanted] += 1e-11
    assert solve_assignment(gain).tolist() == [wanted]


@pytest.mark.parametrize("share", [1, 0.75, 0.4])
@pytest.mark.parametrize("kind", SHARPNESS)
def test_both_ways_find_the_same_partners(kind, share):
    """A best assignment is the only one, but for partners from whom nothing is gained."""
    values = saliency(kind, 200, 50)
    easy = torch.rand(200, generator=torch.Generator().manual_seed(1)) < share
    gain = saliency_gain(values, easy, rho=0.001)
    found, by_lap = solve_assignment(gain), solve_assignment(gain.double())
    rows = torch.arange(len(gain))
    assert total(gain, found) == pytest.approx(optimum(gain), rel=1e-11)
    differ = found != by_lap
    assert (gain[rows, found][differ] == 0).all() and (gain[rows, by_lap][differ] == 0).all()


@pytest.mark.parametrize("way", [torch.float32, torch.float64])
def test_of_equal_totals_the_same_is_taken_whatever_the_other_numbers_are(way):
    """Samples 2 and 3 have more than 0 and 1 everywhere: their pairs may be exchanged."""
    gain = torch.zeros(12, 12)
    gain[:2, 2:4] = torch.tensor([[0.5, 0.75], [0.25, 0.5]])
    first = solve_assignment(gain.to(way))
    for seed in range(20):
        others = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
        gain[4:, 4:] = others
        assert torch.equal(solve_assignment(gain.to(way))[:2], first[:2])


@pytest.mark.parametrize("samples", [3, 31, 64])
def test_a_gain_that_is_symmetric_is_solved_in_one_direction(samples):
    """With rho = 0 an assignment and its inverse have the same total."""
    values = torch.randint(0, 64, (samples, 16), generator=torch.Generator().manual_seed(samples))
    values[:, 0] += 1024 - values.sum(1)  # every sum the same, so that no number is rounded
    gain = saliency_gain(values / 1024, torch.ones(samples, dtype=torch.bool), rho=0.0)
    assert torch.equal(gain, gain.T)
    found, by_lap = solve_assignment(gain), solve_assignment(gain.double())
    assert torch.equal(found, by_lap)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    assert total(gain[order][:, order], solve_assignment(gain[order][:, order])) == pytest.approx(
        total(gain, found), rel=1e-11
    )


@pytest.mark.parametrize("dtype, more", [(torch.float32, 2**-23), (torch.float64, 1e-9)])
def test_numbers_that_hardly_differ_are_told_apart(dtype, more):
    gain = torch.ones(9, 9, dtype=dtype)
    wanted = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    gain[torch.arange(9), wanted] += more
    assert torch.equal(solve_assignment(gain), wanted)


def test_the_greatest_numbers_stay_finite():
    """They would be infinite if a factor above 1 decided ties, and a solver's answer anything."""
    for dtype in (torch.float32, torch.float64):
        gain = torch.full((9, 9), torch.finfo(dtype).max, dtype=dtype)
        wanted = torch.randperm(9, generator=torch.Generator().manual_seed(5))
        gain[torch.arange(9), (wanted + 1) % 9] /= 2
        columns = solve_assignment(gain)
        assert (gain[torch.arange(9), columns] == torch.finfo(dtype).max).all()


def test_rows_without_gain_take_what_is_left():
    gain = torch.zeros(7, 7)
    gain[2, 5], gain[4, 0] = 1.0, 2.0
    assert solve_assignment(gain).tolist() == [1, 2, 5, 3, 0, 4, 6]
    assert solve_assignment(torch.zeros(3, 5)).tolist() == [0, 1, 2]
    assert solve_assignment(torch.zeros(0, 5)).tolist() == []


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("row, column", [(0, 0), (3, 8), (8, 3), (8, 8)])
def test_a_number_that_is_not_finite_is_named(dtype, value, row, column):
    gain = torch.rand(9, 9, dtype=dtype)
    gain[row, column] = value
    with pytest.raises(ValueError, match=rf"gain\[{row}, {column}\] is {value}: .*not finite"):
        solve_assignment(gain)


def test_no_memory_is_an_error(monkeypatch):
    """The solver's own answer, which its caller turns into an exception."""
    monkeypatch.setattr(_assignment, "compiled_solver", lambda: lambda *_: _assignment._NO_MEMORY)
    with pytest.raises(MemoryError, match=r"gain matrix of \(5, 6\)"):
        solve_assignment(torch.rand(5, 6))


def test_without_the_solver_all_is_the_same(monkeypatch):
    gain = torch.rand(40, 40)
    found = solve_assignment(gain)
    monkeypatch.setattr(_assignment.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(_assignment, "compiled_solver", _assignment.compiled_solver.__wrapped__)
    assert _assignment.compiled_solver() is None
    assert torch.equal(solve_assignment(gain), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_is_one_that_torch_can_compile(dtype):
    torch.library.opcheck(solve_assignment, (torch.rand(3, 5, dtype=dtype),))


@needs_compiler
def test_every_processor_finds_the_same_partners(tmp_path):
    """Against a library for the oldest processor: it has other vectors, and rounds otherwise."""
    library = tmp_path / "baseline.so"
    # without the clones for newer processors, which the source leaves to GCC
    command = ["cc", "-O2", "-D__clang__", "-Wno-psabi", "-shared", "-fPIC", str(SOURCE)]
    subprocess.run([*command, "-o", str(library), "-lm"], check=True, capture_output=True)
    baseline = CDLL(str(library)).tokenmixup_solve_assignment
    baseline.argtypes = _assignment.compiled_solver().argtypes
    for kind in SHARPNESS:
        for share in (1, 0.5):
            easy = torch.rand(130, generator=torch.Generator().manual_seed(1)) < share
            gain = saliency_gain(saliency(kind, 130, 40), easy, rho=0.002)
            columns = torch.empty(len(gain), dtype=torch.int64)
            assert baseline(gain.data_ptr(), *gain.shape, columns.data_ptr()) == -1
            assert torch.equal(columns, solve_assignment(gain))
