"""Saliency without a class token, from queries and keys, part by part of the attention map.

Dimensions: B batch, H heads, Q queries, N tokens, D width.
"""

import torch
from torch import Tensor

_CPU_MAP = 1 << 20
"""Elements of the map that are computed at once on a CPU: 4 MiB in float32."""


def mean_of_columns(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    """Mean of softmax(scale * Q K^T + bias) over heads and queries.

    Args:
        query: (B, H, Q, D / H).
        key: (B, H, N, D / H).
        scale: factor of the scores.
        bias: (B or 1, H, Q, N).
        dtype: of the softmax and of the result.

    Returns:
        (B, N).
    """
    samples, at_once = key.shape[0], _samples_at_once(query, key)
    if samples <= at_once:
        return _head_by_head(query, key, scale, bias, dtype)
    parts = []
    for first in range(0, samples, at_once):
        part = slice(first, first + at_once)
        of_part = bias if bias is None or len(bias) == 1 else bias[part]
        parts.append(_head_by_head(query[part], key[part], scale, of_part, dtype))
    return torch.cat(parts)


def _samples_at_once(query: Tensor, key: Tensor) -> int:
    """All of them, but on a CPU so many that the map of a head stays in cache.

    A larger one is memory that is got anew from the system each time, which takes longer than what
    is computed in it. A device would only have more kernels to start, a compiler more to compile.
    """
    if torch.compiler.is_compiling() or query.device.type != "cpu":
        return key.shape[0]
    return max(1, _CPU_MAP // max(1, query.shape[2] * key.shape[2]))


def _head_by_head(
    query: Tensor, key: Tensor, scale: float, bias: Tensor | None, dtype: torch.dtype
) -> Tensor:
    heads = query.shape[1]
    saliency = query.new_zeros((key.shape[0], key.shape[2]), dtype=dtype)
    for head in range(heads):
        scores = (query[:, head] * scale) @ key[:, head].transpose(-2, -1)
        if bias is not None:
            scores = scores + bias[:, head]
        saliency = saliency + scores.softmax(-1, dtype=dtype).mean(1)
    return saliency / heads
