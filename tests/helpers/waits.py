"""What would make the host wait for a device."""

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Waits(TorchDispatchMode):
    """Counts, on any device, the numbers that are read from tensors, and sent as tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.read = self.sent = 0

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        self.read += function.overloadpacket is torch.ops.aten._local_scalar_dense
        self.sent += function.overloadpacket is torch.ops.aten.lift_fresh
        return function(*args, **kwargs or {})
