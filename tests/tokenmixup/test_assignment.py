"""The assignment problem: the solver in C and lapx find the same one of SciPy's best."""

import itertools
import shutil
import subprocess
import time
import timeit
from ctypes import CDLL
from pathlib import Path

import lap
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
SHARPNESS = {"smooth": 0.3, "usual": 1.0, "peaked": 3.0, "sharp": 5.0, "tied": 8.0}
KINDS = (*SHARPNESS, "mixed", "one-hot", "rank-one")


def saliency(kind, samples, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    if kind == "one-hot":
        return torch.eye(tokens)[torch.randint(tokens, (samples,), generator=generator)]
    if kind == "rank-one":
        scale = torch.rand(samples, 1, generator=generator)
        return scale * torch.rand(tokens, generator=generator)
    logits = torch.randn(samples, tokens, generator=generator)
    factors = torch.empty(samples, 1).uniform_(0.3, 4, generator=generator)
    return (logits * SHARPNESS.get(kind, factors)).softmax(1)


def total(gain, columns):
    """In whole numbers, of which no sum is rounded."""
    rows = torch.arange(len(gain))
    assert columns.dtype == torch.int64 and columns.unique().numel() == len(gain)
    return torch.from_numpy(_assignment._whole(gain.double().numpy()))[rows, columns].sum().item()


def optimum(gain):
    whole = _assignment._whole(gain.double().numpy())
    return whole[linear_sum_assignment(whole, maximize=True)].sum()


def both_ways(gain):
    """By the solver in C, and by lapx: float64 is another way, and not another problem."""
    found = solve_assignment(gain.float())
    assert torch.equal(found, solve_assignment(gain.double()))
    return found


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
def test_both_ways_find_the_same_best_assignment(gain):
    assert total(gain, both_ways(gain)) == optimum(gain)


@pytest.mark.parametrize("share", [1, 0.4])
@pytest.mark.parametrize("kind", KINDS)
def test_both_ways_agree_on_every_kind_of_saliency(kind, share):
    """Also where hundreds of samples may be exchanged: none of them is another way's choice."""
    values = saliency(kind, 200, 50)
    easy = torch.rand(200, generator=torch.Generator().manual_seed(1)) < share
    gain = saliency_gain(values, easy, rho=0.001)
    found = both_ways(gain)
    assert total(gain, found) == optimum(gain)
    # the square problem, whose other rows are zeros, has the same partners for whom any gain
    square = torch.zeros(200, 200).masked_scatter(easy.unsqueeze(1), gain)
    some = gain.any(1)
    assert torch.equal(both_ways(square)[easy][some], found[some])


@needs_compiler
@pytest.mark.parametrize("kind", ["tied", "one-hot", "integers"])
def test_ties_do_not_make_a_problem_hard(kind):
    """In the processor's time, against lapx, which takes as long; a tilt took 100 times that."""
    gain = torch.randint(4, (504, 504), generator=torch.Generator().manual_seed(0)).float()
    if kind != "integers":
        gain = saliency_gain(saliency(kind, 504, 196), torch.ones(504, dtype=torch.bool), 0.001)
    cost = -gain.double().numpy()
    ways = {"ours": lambda: solve_assignment(gain), "lapx": lambda: lap.lapjvr(cost)}
    fastest = {
        name: min(timeit.repeat(way, timer=time.process_time, number=3, repeat=7))
        for name, way in ways.items()
    }
    assert fastest["ours"] < 10 * fastest["lapx"]


@given(st.data())
def test_of_equal_totals_the_first_in_the_order_of_the_columns_is_taken(data):
    """Against all assignments: greatest total, then smallest column of the first row, and so on."""
    columns = data.draw(st.integers(1, 6))
    rows = data.draw(st.integers(1, columns))
    number = st.integers(data.draw(st.sampled_from((-1, 0))), data.draw(st.integers(1, 3)))
    gain = data.draw(
        st.lists(st.lists(number, min_size=columns, max_size=columns), min_size=rows, max_size=rows)
    )
    active = [row for row in gain if any(row)]
    best = max(
        itertools.permutations(range(columns), len(active)),
        key=lambda chosen: (
            sum(row[column] for row, column in zip(active, chosen, strict=True)),
            [-column for column in chosen],
        ),
    )
    others = (column for column in range(columns) if column not in best)
    chosen = iter(best)
    expected = [next(chosen) if any(row) else next(others) for row in gain]
    assert both_ways(torch.tensor(gain)).tolist() == expected


@given(st.integers(0, 2**32 - 1), st.integers(2, 30), st.integers(2, 6))
def test_what_all_assignments_gain_alike_changes_no_partner(seed, samples, most):
    """The same number for a whole row or column, which is what leads solvers other ways."""
    random = np.random.default_rng(seed)
    gain = random.integers(1, most, (samples, samples))
    more = random.integers(0, 50, (samples, 1)) + random.integers(0, 50, samples)
    first, second = (torch.from_numpy(numbers) for numbers in (gain, gain + more))
    assert torch.equal(both_ways(first), both_ways(second))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_numbers_are_told_apart_down_to_the_digits_that_are_kept(dtype):
    gain = torch.tensor([[1.0, 1.0, 1.0]] * 2, dtype=dtype)
    assert solve_assignment(gain).tolist() == [0, 1]
    gain[0] /= 2
    gain[0, 2] += 2**-24
    assert solve_assignment(gain).tolist() == [2, 0]
    small = 2**-49 if dtype == torch.float64 else 2**-60
    gain[0] = 1
    gain[1] = torch.tensor([0, small, 2 * small])  # the last one counts in neither
    assert solve_assignment(gain).tolist() == [0, 1]


@pytest.mark.parametrize("way", [torch.float32, torch.float64])
def test_of_equal_totals_the_same_is_taken_whatever_the_other_numbers_are(way):
    """Samples 2 and 3 have more than 0 and 1 everywhere: their pairs may be exchanged."""
    gain = torch.zeros(12, 12)
    gain[:2, 2:4] = torch.tensor([[0.5, 0.75], [0.25, 0.5]])
    for seed in range(20):
        others = torch.rand(8, 8, generator=torch.Generator().manual_seed(seed))
        gain[4:, 4:] = others
        assert solve_assignment(gain.to(way))[:2].tolist() == [2, 3]


@pytest.mark.parametrize("samples", [3, 31, 64])
def test_a_gain_that_is_symmetric_is_solved_in_one_direction(samples):
    """With rho = 0 an assignment and its inverse have the same total."""
    values = torch.randint(0, 64, (samples, 16), generator=torch.Generator().manual_seed(samples))
    values[:, 0] += 1024 - values.sum(1)  # every sum the same, so that no number is rounded
    gain = saliency_gain(values / 1024, torch.ones(samples, dtype=torch.bool), rho=0.0)
    assert torch.equal(gain, gain.T)
    order = torch.randperm(samples, generator=torch.Generator().manual_seed(0))
    shuffled = gain[order][:, order]
    assert total(shuffled, both_ways(shuffled)) == total(gain, both_ways(gain)) == optimum(gain)


@pytest.mark.parametrize("dtype, more", [(torch.float32, 2**-23), (torch.float64, 1e-9)])
def test_numbers_that_hardly_differ_are_told_apart(dtype, more):
    gain = torch.ones(9, 9, dtype=dtype)
    wanted = torch.randperm(9, generator=torch.Generator().manual_seed(3))
    gain[torch.arange(9), wanted] += more
    assert torch.equal(solve_assignment(gain), wanted)


def test_the_greatest_numbers_stay_finite():
    """They would be infinite if they were made whole in their own type, or added there."""
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


def test_an_assignment_that_is_not_the_best_is_refused():
    """Prices that prove it optimal do not exist; looking for them must end."""
    gain = np.array([[4.0, 1.0, 0.0], [1.0, 4.0, 0.0]])
    assert _assignment._settled(gain, np.array([0, 1])).tolist() == [0, 1]
    with pytest.raises(RuntimeError, match="not the best"):
        _assignment._settled(gain, np.array([1, 0]))


def test_without_the_solver_all_is_the_same(monkeypatch):
    gain = torch.rand(40, 40)
    found = solve_assignment(gain)
    monkeypatch.setattr(_assignment, "_LIBRARY", Path("there is none"))
    monkeypatch.setattr(_assignment, "compiled_solver", _assignment.compiled_solver.__wrapped__)
    assert _assignment.compiled_solver() is None
    assert torch.equal(solve_assignment(gain), found)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_operator_is_one_that_torch_can_compile(dtype):
    operator = torch.ops.tokenmixup.solve_assignment.default
    torch.library.opcheck(operator, (torch.rand(3, 5, dtype=dtype),))


@needs_compiler
def test_every_processor_finds_the_same_partners(tmp_path):
    """Against a library for the oldest processor: it has other vectors, and rounds otherwise."""
    library = tmp_path / "baseline.so"
    # without the clones for newer processors, which the source leaves to GCC
    command = ["cc", "-O2", "-D__clang__", "-Wno-psabi", "-shared", "-fPIC", str(SOURCE)]
    subprocess.run([*command, "-o", str(library), "-lm"], check=True, capture_output=True)
    baseline = CDLL(str(library)).tokenmixup_solve_assignment
    baseline.argtypes = _assignment.compiled_solver().argtypes
    for kind in KINDS:
        for share in (1, 0.5):
            easy = torch.rand(130, generator=torch.Generator().manual_seed(1)) < share
            gain = saliency_gain(saliency(kind, 130, 40), easy, rho=0.002)
            columns = torch.empty(len(gain), dtype=torch.int64)
            assert baseline(gain.data_ptr(), *gain.shape, columns.data_ptr()) == -1
            assert torch.equal(columns, solve_assignment(gain))
