"""What the profiler sees of steps: copies, waits, kernels and the device's idle time."""

from bisect import bisect_left
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

LARGEST_TRACE = 16 * 2**20


def profiled(
    action: Callable[[], object], device: torch.device, steps: int, trace: Path | None = None
) -> dict[str, float]:
    """Copies to the host, waits, kernels and the device's idle time, per step.

    Args:
        action: a step.
        device: its device; on a CPU everything is zero.
        steps: how many; one step before them warms up the profiler.
        trace: file for the trace (chrome://tracing, ui.perfetto.dev); beside it, with the ending
            .txt, the operators that take longest.

    Raises:
        RuntimeError: the trace is larger than `LARGEST_TRACE`.
    """
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    mark = "training steps"
    with profile(activities=activities, acc_events=True) as found:  # without, torch 2.11 warns
        action()
        torch.get_device_module(device).synchronize(device)
        with record_function(mark):
            for _ in range(steps):
                action()
        torch.get_device_module(device).synchronize(device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
        order = f"self_{device.type}_time_total"
        longest = found.key_averages().table(sort_by=order, row_limit=40)
        trace.with_suffix("").with_suffix(".txt").write_text(longest, encoding="utf-8")
        if trace.stat().st_size > LARGEST_TRACE:
            raise RuntimeError(f"{trace} has {trace.stat().st_size:,} bytes: profile fewer steps")
    events = list(found.events() or [])
    on_host = [event for event in events if event.device_type == DeviceType.CPU]
    (span,) = (event.time_range for event in on_host if event.name == mark)
    # annotations have a shadow on the device that is not work
    work = [
        event
        for event in events
        if event.device_type == DeviceType.CUDA
        and not event.is_user_annotation
        and event.time_range.start >= span.start
    ]
    calls = [e for e in on_host if span.start <= e.time_range.start <= span.end]
    waits = [e for e in calls if e.name.startswith("cuda") and e.name.endswith("Synchronize")]
    # a copy into memory that is not pinned waits as well
    waiting = [*waits, *(event for event in calls if event.name == "cudaMemcpyAsync")]
    kernels = [event for event in work if not event.name.startswith("Mem")]
    copies = [event.time_range.end for event in work if "Memcpy DtoH" in event.name]
    starts = sorted(event.time_range.start for event in kernels)
    return {
        "copies_to_host": len(copies) / steps,
        "host_waits": len(waits) / steps,
        "kernels": len(kernels) / steps,
        "busy_share": busy_share([(e.time_range.start, e.time_range.end) for e in work]),
        "waited_seconds": sum(event.time_range.elapsed_us() for event in waiting) / 1e6 / steps,
        "gap_seconds": gap_after(copies, starts) / 1e6,
    }


def busy_share(spans: Sequence[tuple[float, float]]) -> float:
    """The covered share of the time from the first begin to the last end of (begin, end) spans."""
    if not spans:
        return 0.0
    first = end = min(begin for begin, _ in spans)
    busy = 0.0
    for begin, stop in sorted(spans):
        busy += max(0.0, stop - max(begin, end))
        end = max(end, stop)
    return busy / (end - first) if end > first else 0.0


def gap_after(ends: Sequence[float], starts: Sequence[float]) -> float:
    """The mean time from an end to the next of the sorted starts; ends without one do not count."""
    gaps = [starts[next] - end for end in ends if (next := bisect_left(starts, end)) < len(starts)]
    return sum(gaps) / len(gaps) if gaps else 0.0
