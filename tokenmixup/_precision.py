"""Where a computation keeps the type of its tensors, and where autocast keeps its casts."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Operations keep the type of their tensors inside."""
    if device_type == "meta":  # which computes nothing, and which torch.autocast refuses
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def without_autocast_cache(device_type: str) -> AbstractContextManager[Any]:
    """Autocast as it is, but casts of weights inside are not kept for operations outside.

    Older releases of torch (2.8 is one) hand a cast that was made under ``no_grad`` to the layer's
    own pass, whose weight then gets no gradient.
    """
    if (
        torch.compiler.is_compiling()  # traced without that cache
        or device_type == "meta"
        or not torch.is_autocast_enabled(device_type)
    ):
        return nullcontext()
    dtype = torch.get_autocast_dtype(device_type)
    return torch.autocast(device_type, dtype=dtype, cache_enabled=False)
