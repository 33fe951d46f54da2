"""The assignment problem of Horizontal TokenMixup, as an operator that torch.compile keeps whole.

Dimensions: R rows, B columns, R <= B.
"""

import lap
import numpy as np
import torch
from torch import Tensor

_LARGEST_WITH_MEAN = 1e300
"""So many of these as a batch has do not overflow in their sum."""


@torch.library.custom_op("tokenmixup::solve_assignment", mutates_args=())
def solve_assignment(gain: Tensor) -> Tensor:
    """Exact maximum of ``sum_r gain[r, column(r)]`` over one-to-one column choices.

    Args:
        gain: (R, B) with R <= B, floating point, any device. It is read by the host once.

    Returns:
        (R,) int64 on the device of ``gain``.

    Raises:
        ValueError: an entry is not finite (the solver's behaviour on those is undefined).
    """
    # float64 costs a few per cent of the solver's time and makes the optimum exact for float32; it
    # is made on the host, so that half as much crosses over
    cost = gain.detach().cpu().to(torch.float64, copy=True).neg_().numpy()
    largest = np.maximum(cost.max(initial=0), -cost.min(initial=0))
    if not np.isfinite(largest):
        row, column = np.argwhere(~np.isfinite(cost))[0]
        raise ValueError(
            f"gain[{row}, {column}] is {-cost[row, column]}: the saliency or the targets that it "
            "was computed from are not finite (diverged training, or bad targets)"
        )
    # a row of zeros adds nothing to the total whatever its column
    active = np.asarray(cost.any(axis=1))
    if 3 * np.count_nonzero(active) > 2 * cost.shape[1] and largest < _LARGEST_WITH_MEAN:
        columns = _solve_square(cost)
    else:
        columns = _solve_active(cost, active)
    # numpy's memory is copied before the call returns, and nobody need wait for the device
    return torch.from_numpy(columns).to(gain.device, non_blocking=True)


@solve_assignment.register_fake
def _(gain: Tensor) -> Tensor:
    return gain.new_empty((gain.shape[0],), dtype=torch.int64)


def _solve_square(cost: np.ndarray) -> np.ndarray:
    """Optimum with a row for each column, where most rows have something to gain.

    The solver begins by giving each column to the row that is cheapest there. Samples of flat
    saliency gain most from anyone, so few rows would take all columns. What is added to a whole row
    changes every assignment's total by the same amount: from rows of mean 0 most columns find a row
    of their own, and the solver is two to four times faster. Where saliency is so peaked that they
    do not, it is faster from the rows as they are.
    """
    rows, size = cost.shape
    if rows < size:
        cost = np.concatenate((cost, np.zeros((size - rows, size))))
    level = cost.mean(axis=1, keepdims=True)
    cost -= level
    cheapest_somewhere = np.any(cost == cost.min(axis=0), axis=1)
    if 3 * np.count_nonzero(cheapest_somewhere) < size:
        cost += level
    order, chosen = lap.lapjvr(cost, return_cost=False)
    columns = np.empty(size, dtype=np.int64)
    columns[order] = chosen
    return columns[:rows]


def _solve_active(cost: np.ndarray, active: np.ndarray) -> np.ndarray:
    """Optimum of the rows that have something to gain; the others are handed free columns."""
    columns = np.empty(len(cost), dtype=np.int64)
    if active.any():
        rows, chosen = lap.lapjvr(cost[active], True, return_cost=False)
        columns[np.flatnonzero(active)[rows]] = chosen
    free = np.setdiff1d(np.arange(cost.shape[1]), columns[active])
    columns[~active] = free[: np.count_nonzero(~active)]
    return columns
