"""Where a computation keeps the type of its tensors."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """Operations keep the type of their tensors inside."""
    if device_type == "meta":  # which computes nothing, and which torch.autocast refuses
        return nullcontext()
    return torch.autocast(device_type, enabled=False)
