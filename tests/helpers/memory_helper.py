"""What the test of peak memory has another process do; a module of its own to be spawned."""

import numpy as np
import torch

MIB = 2**20


def make_temporaries(of_torch, of_numpy):
    """An action that needs so many MiB at once, and gives them back before it ends."""

    def action():
        tensor, array = torch.ones(of_torch * MIB // 4), np.ones(of_numpy * MIB // 8)
        return float(tensor[0] + array[0])

    return action
