"""The assignment problem of Horizontal TokenMixup, as an operator that torch.compile keeps whole.

Dimensions: R rows, B columns, R <= B.
"""

import ctypes
import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any, NoReturn, cast

import lap
import numpy as np
import torch
from torch import Tensor

_SOLVED, _NO_MEMORY = -1, -2
_LIBRARY = Path(__file__).with_name("_assignment_solver.so")  # as setup.py names it
_DIGITS = 50  # as in _assignment_solver.c

on_the_host = (torch.Tag.cudagraph_unsafe,)
"""Tags of operators that run code on the host, which a CUDA graph would not replay.

Compiled with ``mode="reduce-overhead"`` the graph is cut there.
"""

_OPERATOR = "tokenmixup::solve_assignment"
# `custom_op` would make calls 6 µs longer, for gradients that there are none of here
torch.library.define(_OPERATOR, "(Tensor gain) -> Tensor", tags=on_the_host)


@torch.library.impl(_OPERATOR, "default")
def _solve_assignment(gain: Tensor) -> Tensor:
    solver, on_host = compiled_solver(), gain.cpu()
    if solver is not None and gain.dtype != torch.float64:
        columns = _by_solver(solver, on_host.float().contiguous())
    else:
        columns = torch.from_numpy(by_lap(on_host))
    # pageable memory is staged before the call returns: no need to wait for the device
    return columns.to(gain.device, non_blocking=True)


torch.library.register_fake(
    _OPERATOR, lambda gain: gain.new_empty((gain.shape[0],), dtype=torch.int64)
)


def solve_assignment(gain: Tensor) -> Tensor:
    """Maximum of ``sum_r gain[r, column(r)]`` over one-to-one column choices.

    Exact for gains in whole numbers, see :func:`_whole`. Of assignments with equal totals it is the
    one that is first in the order of its columns, whatever way it was found.

    Args:
        gain: (R, B) with R <= B, floating point, any device. The host reads it once.

    Returns:
        (R,) int64 on the device of ``gain``.

    Raises:
        ValueError: an entry is not finite (the solver's behaviour on those is undefined).
    """
    return cast(Tensor, torch.ops.tokenmixup.solve_assignment.default(gain.detach()))


def _by_solver(solver: Callable[..., Any], gain: Tensor) -> Tensor:
    """By `_assignment_solver.c`, which takes gains in float32."""
    columns = torch.empty(len(gain), dtype=torch.int64)
    done = solver(gain.data_ptr(), *gain.shape, columns.data_ptr())
    if done == _NO_MEMORY:
        raise MemoryError(f"no memory to find partners for a gain matrix of {tuple(gain.shape)}")
    if done != _SOLVED:
        row, column = divmod(done, gain.shape[1])
        _refuse(row, column, gain[row, column].item())
    return columns


def by_lap(gain: Tensor) -> np.ndarray:
    """By lapx the same partners, for gains in float64 and where there is no solver in C."""
    values = gain.to(torch.float64).numpy()
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        _refuse(row, column, values[row, column])
    whole = _whole(values)
    # rows without gain add nothing to the total: they are handed the columns that are left
    active = np.asarray(whole.any(axis=1))
    columns = np.empty(len(whole), dtype=np.int64)
    if active.any():
        _, found = lap.lapjvr(-whole[active], extend_cost=True, return_cost=False)
        columns[active] = _settled(whole[active], found)
    free = np.setdiff1d(np.arange(whole.shape[1]), columns[active])
    columns[~active] = free[: np.count_nonzero(~active)]
    return columns


def _whole(gain: np.ndarray) -> np.ndarray:
    """Gains (R, B) in whole multiples of a power of two: B of the greatest are less than 2^50.

    Sums of so many such numbers are not rounded in float64, so that equal totals stay equal. Gains
    in float32 keep all their digits, unless they are thousands of times smaller than the greatest.
    """
    _, exponent = np.frexp(np.abs(gain).max(initial=0))
    return np.rint(np.ldexp(gain, _DIGITS - exponent - gain.shape[1].bit_length()))


def _settled(gain: np.ndarray, columns: np.ndarray) -> np.ndarray:
    """Of the best assignments, given any of them, the one that is first in lexicographic order.

    Equal totals are common: where some samples are more salient than others at every token, every
    exchange among them has the same total. Which one a solver finds depends on its path, and so on
    the last bits of other gains: the partners of a run would depend on its number of processes.

    Prices prove an assignment optimal if each row's column has the smallest price less gain for it.
    The best assignments are those of columns that are so for their rows, whatever the prices are.

    Args:
        gain: (R, B), whole numbers.
        columns: (R,), the columns of a best assignment.
    """
    spare = len(gain)  # a row of zeros, which owns the columns that are left
    owner = np.full(gain.shape[1], spare)
    owner[columns] = np.arange(spare)
    more = gain - gain[owner[columns], columns][:, None]  # than from the row's own column
    price = np.zeros(len(owner))
    for _ in range(len(gain) + 2):  # prices of a best assignment rise along its rows at most once
        before, lowest = price, price[owner == spare].max(initial=0)
        price = np.maximum(price, (price[columns][:, None] + more).max(0)).clip(lowest)
        if np.array_equal(price, before):
            break
    else:
        raise RuntimeError("lapx found an assignment that is not the best; please report this")
    tight = [*(price[columns][:, None] + more == price), price == lowest]
    best = [
        int.from_bytes(np.packbits(row, bitorder="little").tobytes(), "little") for row in tight
    ]

    owners, chosen, undecided = owner.tolist(), columns.tolist(), (1 << len(owner)) - 1
    for first, own in enumerate(chosen):
        # a path from a column before its own, over the rows behind, to its own
        path, unseen, row = [], undecided & ~(1 << own), first
        while row != first or best[row] & unseen & ((1 << own) - 1):
            if best[row] & unseen:
                path.append(_lowest(best[row] & unseen))
                unseen &= ~(1 << path[-1])
            else:
                path.pop()
            row = owners[path[-1]] if path else first
            if path and best[row] >> own & 1:
                takers = [first, *(owners[column] for column in path)]
                for column, taker in zip([*path, own], takers, strict=True):
                    owners[column] = taker
                    if taker != spare:
                        chosen[taker] = column
                break
        undecided &= ~(1 << chosen[first])
    return np.asarray(chosen)


def _lowest(bits: int) -> int:
    return (bits & -bits).bit_length() - 1


def _refuse(row: int, column: int, value: float) -> NoReturn:
    raise ValueError(
        f"gain[{row}, {column}] is {value}: the sample's targets are no distribution (not finite, "
        "negative, or not of sum 1), or the saliency that it was computed from is not finite"
    )


@functools.cache
def compiled_solver() -> Callable[..., Any] | None:
    """The solver of `_assignment_solver.c`, or None where there was no compiler for it.

    It is a plain library without Python's interface: ctypes needs no headers of Python to build it,
    and lets other threads run while it computes.
    """
    if not _LIBRARY.exists():
        return None
    solver: Any = ctypes.CDLL(str(_LIBRARY)).tokenmixup_solve_assignment
    pointer, length = ctypes.c_void_p, ctypes.c_ssize_t
    solver.restype, solver.argtypes = length, (pointer, length, length, pointer)
    return cast(Callable[..., Any], solver)
