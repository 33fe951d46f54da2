"""What the device can do at most."""

import torch

from benchmarks.row import Settings, Values
from benchmarks.timing import interleaved
from experiments.documents.markdown import aligned_table


def measure(settings: Settings, found: Values) -> None:
    """What the device can do at most: a matrix product in bfloat16, a copy, an upload."""
    device, side, size = settings.device, 8192, 2**30
    if settings.quick:
        side, size = 64, 2**16
    first, second = (torch.randn(side, side, device=device).bfloat16() for _ in range(2))
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    pinned = torch.ones(size // 4, dtype=torch.uint8, pin_memory=device.type == "cuda")
    timings = interleaved(
        {
            "product": lambda: first @ second,
            "copy": lambda: target.copy_(source),
            "upload": lambda: target[: len(pinned)].copy_(pinned, non_blocking=True),
        },
        settings.rounds(9),
        warm_up=2,
        least_seconds=0.0 if settings.quick else 0.2,
        synchronise=torch.get_device_module(device).synchronize,
    )
    seconds = {name: timing.median for name, timing in timings.items()}
    found |= {
        "side": side,
        "product_tflops": 2 * side**3 / seconds["product"] / 1e12,
        "copy_gigabytes": 2 * size / seconds["copy"] / 1e9,
        "upload_gigabytes": len(pinned) / seconds["upload"] / 1e9,
    }


def tables(values: Values) -> str:
    """One line per ceiling."""
    side = values["side"]
    rows = [
        [f"product of {side}×{side} matrices, bf16", f"{values['product_tflops']:,.0f} TFLOP/s"],
        ["copy on the device, read and written", f"{values['copy_gigabytes']:,.0f} GB/s"],
        ["copy from pinned memory of the host", f"{values['upload_gigabytes']:,.0f} GB/s"],
    ]
    return aligned_table(("what", "at most"), rows, (1,))
