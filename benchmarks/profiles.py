"""What a step does on its device and what it waits for, read off torch's profiler."""

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

STEP, LAST = "one training step", "a training step by itself"
COPY_TO_HOST = "Memcpy DtoH"
WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
"""Calls of CUDA's runtime in which the host waits for the device."""
CATEGORIES = ("matrix products", "attention", "copies", "everything else")
_SIGNS = {
    "matrix products": ("gemm", "nvjet", "cutlass", "cublas", "addmm", "aten::mm", "aten::bmm"),
    "attention": ("flash", "fmha", "sdpa", "scaled_dot_product", "attention"),
    "copies": ("memcpy", "memset"),
}


def profiled(
    action: Callable[[], object], device: torch.device, steps: int, trace: Path | None = None
) -> dict[str, Any]:
    """Profile some steps that follow each other as in a training, then one by itself.

    Args:
        action: a step.
        device: its device.
        steps: how many; one more runs before them, since the first pays for the profiler's start.
        trace: where to keep the trace, for chrome://tracing or ui.perfetto.dev.

    Returns:
        Copies to the host, host waits and kernels a step, the share of the time in which the device
        was busy, and the timeline of the one by itself.
    """
    on_cuda = device.type == "cuda"

    def synchronise() -> None:
        if on_cuda:
            torch.cuda.synchronize(device)

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_cuda else [])]
    with profile(activities=activities) as found:
        action()
        synchronise()
        for _ in range(steps):
            with record_function(STEP):
                action()
        synchronise()
        with record_function(LAST):
            action()
        synchronise()
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
    events = list(found.events() or [])
    spans = sorted(_spans(events, STEP))
    ((last, _),) = _spans(events, LAST)
    assert len(spans) == steps, "each step is marked once on the host"
    work = [event for event in events if _is_work(event, on_cuda)]
    following = [event for event in work if spans[0][0] <= event.time_range.start < last]
    waits = [
        event
        for event in events
        if event.name in WAITS and any(a <= event.time_range.start <= b for a, b in spans)
    ]
    return {
        "steps": steps,
        "copies_to_host": sum(COPY_TO_HOST in event.name for event in following) / steps,
        "host_waits": len(waits) / steps,
        "kernels": sum(not event.name.startswith("Mem") for event in following) / steps,
        "busy_share": busy_share([_bar(event, 0.0) for event in following]),
        "timeline": timeline([event for event in work if event.time_range.start >= last], last),
    }


def _spans(events: list[Any], name: str) -> list[tuple[float, float]]:
    """From when to when each event of this name was on the host."""
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.name == name and event.device_type == DeviceType.CPU
    ]


def _is_work(event: Any, on_cuda: bool) -> bool:
    """Whether an event is work of the device; on a CPU, whether it is an operator called by none.

    Python's annotations have a shadow on the device, which is no work.
    """
    if on_cuda:
        return event.device_type == DeviceType.CUDA and not event.is_user_annotation
    parent = event.cpu_parent
    return event.name.startswith(("aten::", "autograd::")) and (
        parent is None or not parent.name.startswith(("aten::", "autograd::"))
    )


Bar = tuple[float, float, int]


def _bar(event: Any, start: float) -> Bar:
    span = event.time_range
    return round(span.start - start, 1), round(span.end - span.start, 1), category(event.name)


def timeline(work: list[Any], start: float) -> list[str]:
    """What the device did: "start length category" of each piece of work, in µs."""
    bars = sorted(_bar(event, start) for event in work)
    return [f"{begin:g} {length:g} {kind}" for begin, length, kind in bars]


def read_timeline(lines: list[str]) -> list[Bar]:
    """What `timeline` wrote."""
    parts = [line.split() for line in lines]
    return [(float(begin), float(length), int(kind)) for begin, length, kind in parts]


def busy_share(bars: list[Bar]) -> float:
    """Share of the time between the first and the last piece of work in which there was any."""
    if not bars:
        return 0.0
    busy, end = 0.0, -math.inf
    for begin, length, _ in sorted(bars):
        busy += max(0.0, begin + length - max(begin, end))
        end = max(end, begin + length)
    span = end - min(begin for begin, _, _ in bars)
    return busy / span if span else 0.0


def category(name: str) -> int:
    """The index in `CATEGORIES` of a kernel or operator."""
    lower = name.lower()
    # attention first: its kernels may be named after the library of their products as well
    for kind in ("attention", "matrix products", "copies"):
        if any(sign in lower for sign in _SIGNS[kind]):
            return CATEGORIES.index(kind)
    return CATEGORIES.index("everything else")
