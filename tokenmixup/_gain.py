"""The gain matrix of Horizontal TokenMixup, by the fastest way that the tensors allow.

Dimensions: R rows, C columns, T patch tokens.
"""

import ctypes
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from tokenmixup._compiled import load

_CPU_CHUNK = 1 << 20
"""Elements of the plain way's largest temporary: 4 MiB in float32, which stays in cache."""
_DEVICE_CHUNK = 1 << 24
"""The same on a device, where few large kernels are faster: 64 MiB in float32."""
_ALONE = 1 << 20
"""Differences up to which one thread is as fast as several."""


def gain_rows(rows: Tensor, columns: Tensor, rho: float) -> Tensor:
    """``sum_t max(columns[c, t] - rows[r, t] - rho, 0)``, (R, T) and (C, T) -> (R, C).

    Three ways to the same: fused by torch.compile where it traces; on a CPU in float32 a loop in C
    without temporaries, where it was built; else by torch's own operations, chunk by chunk.
    """
    if torch.compiler.is_compiling():
        return (columns.unsqueeze(0) - rows.unsqueeze(1) - rho).clamp_min(0).sum(-1)
    if _in_memory(rows) and _in_memory(columns):
        loop = compiled_loop()
        if loop is not None:
            return _by_loop(loop, rows.contiguous(), columns.contiguous(), rho)
    return _plain(rows, columns, rho)


def _in_memory(tensor: Tensor) -> bool:
    """Whether a loop in C can read it: float32 numbers on a CPU.

    Fake tensors of a tracer have none, nor have those that torch.func wraps.
    """
    if type(tensor) is not Tensor or tensor.device.type != "cpu" or tensor.dtype != torch.float32:
        return False
    try:
        tensor.data_ptr()
    except RuntimeError:
        return False
    return True


def _by_loop(loop: Callable[..., Any], rows: Tensor, columns: Tensor, rho: float) -> Tensor:
    gain = rows.new_empty((len(rows), len(columns)))
    # one or all: where OpenMP is asked for a part of its threads, it ends the others
    threads = torch.get_num_threads() if gain.numel() * rows.shape[1] > _ALONE else 1
    loop(
        rows.data_ptr(),
        columns.data_ptr(),
        rho,
        *(len(rows), len(columns), rows.shape[1]),
        threads,
        gain.data_ptr(),
    )
    return gain


def _plain(rows: Tensor, columns: Tensor, rho: float) -> Tensor:
    most = _CPU_CHUNK if rows.device.type == "cpu" else _DEVICE_CHUNK
    chunk = max(1, most // max(1, columns.numel()))
    gain = rows.new_empty((len(rows), len(columns)))
    for start in range(0, len(rows), chunk):
        part = slice(start, start + chunk)
        difference = columns.unsqueeze(0) - rows[part].unsqueeze(1)
        gain[part] = difference.sub_(rho).clamp_min_(0).sum(-1)
    return gain


def compiled_loop() -> Callable[..., Any] | None:
    """The loop of `_gain_loop.c`, or None where there was no C compiler with OpenMP."""
    pointer, length = ctypes.c_void_p, ctypes.c_ssize_t
    shape = (length, length, length)
    types = (pointer, pointer, ctypes.c_float, *shape, ctypes.c_int, pointer)
    return load("_gain_loop", "tokenmixup_gain", None, *types)
