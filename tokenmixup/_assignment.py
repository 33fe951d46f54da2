"""The assignment problem of Horizontal TokenMixup, as an operator that torch.compile keeps whole.

Dimensions: R rows, B columns, R <= B.
"""

import lap
import numpy as np
import torch
from torch import Tensor


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
    # float64 costs a few per cent of the solver's time and makes the optimum exact for float32;
    # it is made on the host, so that half as much crosses over.
    values = gain.detach().cpu().double().numpy()
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise ValueError(
            f"gain[{row}, {column}] is {values[row, column]}: the saliency or the targets that it "
            "was computed from are not finite (diverged training, or bad targets)"
        )
    columns = np.empty(values.shape[0], dtype=np.int64)
    # A row of zeros adds nothing to the total whatever its column: leaving it out of the problem
    # and handing it a free column afterwards keeps the optimum and makes the problem smaller.
    active = values.any(axis=1)
    if active.any():
        rows, chosen = lap.lapjvr(-values[active], True, return_cost=False)
        columns[np.flatnonzero(active)[rows]] = chosen
    free = np.setdiff1d(np.arange(values.shape[1]), columns[active])
    columns[~active] = free[: np.count_nonzero(~active)]
    # numpy's memory is copied before the call returns, and nobody need wait for the device
    return torch.from_numpy(columns).to(gain.device, non_blocking=True)


@solve_assignment.register_fake
def _(gain: Tensor) -> Tensor:
    return gain.new_empty((gain.shape[0],), dtype=torch.int64)
