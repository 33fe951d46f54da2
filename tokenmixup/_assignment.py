"""The assignment problem of Horizontal TokenMixup, as an operator that torch.compile keeps whole.

Dimensions: R rows, B columns, R <= B.
"""

import ctypes
import functools
import importlib.util
from collections.abc import Callable
from typing import Any, NoReturn, cast

import lap
import numpy as np
import torch
from torch import Tensor

_SOLVED, _NO_MEMORY = -1, -2


_unsafe = getattr(torch.Tag, "cudagraph_unsafe", None)  # torch 2.8 has none
on_the_host = () if _unsafe is None else (_unsafe,)
"""Tags of operators that run code on the host, which a CUDA graph would not replay.

Compiled with ``mode="reduce-overhead"`` the graph is cut there.
"""


@torch.library.custom_op("tokenmixup::solve_assignment", mutates_args=(), tags=on_the_host)
def solve_assignment(gain: Tensor) -> Tensor:
    """Maximum of ``sum_r gain[r, column(r)]`` over one-to-one column choices.

    Exact to 2^-40 of the gains, see :func:`_tilt`.

    Args:
        gain: (R, B) with R <= B, floating point, any device. The host reads it once.

    Returns:
        (R,) int64 on the device of ``gain``.

    Raises:
        ValueError: an entry is not finite (the solver's behaviour on those is undefined).
    """
    solver, on_host = compiled_solver(), gain.detach().cpu()
    if solver is not None and gain.dtype != torch.float64:
        columns = _by_solver(solver, on_host.float().contiguous())
    else:
        columns = torch.from_numpy(by_lap(on_host))
    # pageable memory is staged before the call returns: no need to wait for the device
    return columns.to(gain.device, non_blocking=True)


@solve_assignment.register_fake
def _(gain: Tensor) -> Tensor:
    return gain.new_empty((gain.shape[0],), dtype=torch.int64)


def _by_solver(solver: Callable[..., Any], gain: Tensor) -> Tensor:
    """By `_assignment_solver.c`, which computes in float64 from gains in float32."""
    columns = torch.empty(len(gain), dtype=torch.int64)
    done = solver(gain.data_ptr(), *gain.shape, columns.data_ptr())
    if done == _NO_MEMORY:
        raise MemoryError(f"no memory to find partners for a gain matrix of {tuple(gain.shape)}")
    if done != _SOLVED:
        row, column = divmod(done, gain.shape[1])
        _refuse(row, column, gain[row, column].item())
    return columns


def by_lap(gain: Tensor) -> np.ndarray:
    """By lapx the same total, for gains in float64 and where there is no solver in C."""
    cost = -gain.to(torch.float64).numpy()
    if not np.isfinite(cost).all():
        row, column = np.argwhere(~np.isfinite(cost))[0]
        _refuse(row, column, -cost[row, column])
    cost *= _tilt(*cost.shape)
    # rows without gain add nothing to the total: they are handed the columns that are left
    active = np.asarray(cost.any(axis=1))
    columns = np.empty(len(cost), dtype=np.int64)
    if active.any():
        rows, chosen = lap.lapjvr(cost[active], extend_cost=True, return_cost=False)
        columns[np.flatnonzero(active)[rows]] = chosen
    free = np.setdiff1d(np.arange(cost.shape[1]), columns[active])
    columns[~active] = free[: np.count_nonzero(~active)]
    return columns


def _tilt(rows: int, columns: int) -> np.ndarray:
    """Factors next to 1, (rows, columns), that make one of several best assignments the best.

    Equal totals are common: where some samples are more salient than others at every token, every
    exchange among them has the same total. Which one a solver finds depends on its path, and so on
    the last bits of other gains: the partners of a run would depend on its number of processes. A
    tilt of 2^-40 is far above the rounding of float64 and far below the precision of float32; of
    gains in float64 it hides smaller differences. No factor is above 1, so that the greatest
    numbers stay finite. Two pairs of places whose tilts differ by less than float64's rounding stay
    tied: it takes hundreds of samples that may all be exchanged.
    """
    row, column = np.arange(1, rows + 1) * 2**0.5, np.arange(1, columns + 1) * 0.6180339887498949
    tilt = 2.0**-40 * np.outer(row - np.floor(row), column - np.floor(column))
    return (1 + tilt) / (1 + 2.0**-40)


def _refuse(row: int, column: int, value: float) -> NoReturn:
    raise ValueError(
        f"gain[{row}, {column}] is {value}: the saliency that it was computed from is not finite "
        "(diverged training), or the sample's targets are no distribution (not finite, negative, "
        "or not of sum 1)"
    )


@functools.cache
def compiled_solver() -> Callable[..., Any] | None:
    """The solver of `_assignment_solver.c`, or None where there was no compiler for it.

    It is a plain library without Python's interface: ctypes needs no headers of Python to build it,
    and lets other threads run while it computes.
    """
    found = importlib.util.find_spec("tokenmixup._assignment_solver")
    if found is None or found.origin is None:
        return None
    solver: Any = ctypes.CDLL(found.origin).tokenmixup_solve_assignment
    pointer, length = ctypes.c_void_p, ctypes.c_ssize_t
    solver.restype, solver.argtypes = length, (pointer, length, length, pointer)
    return cast(Callable[..., Any], solver)
