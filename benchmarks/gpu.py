"""Rows 7 to 10, on a CUDA GPU: speed, exchanges with the host, loading, memory.

Each part is recorded as soon as it is measured, so that an interrupted run keeps it. Each model
trains in bfloat16, compiled, by the training's own steps.
"""

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import row
from benchmarks.pipeline import PhotographPieces
from benchmarks.row import Row, Settings, Target
from benchmarks.steps import FAMILIES, VARIANTS, Steps, Workload
from benchmarks.timing import interleaved, mebibytes, ratio, times
from experiments import cli
from experiments.data.loading import TrainBatches
from experiments.documents.markdown import aligned_table
from experiments.errors import ConfigError
from experiments.provenance import ROOT
from experiments.training.distributed import World

WORKLOADS = (
    Workload("CCT-7/3×1", 128, "bf16", compile=True),
    Workload("ViT-B/16", 126, "bf16", compile=True),
)
QUICK_WORKLOADS = (
    Workload("CCT-7/3×1", 4, "bf16", quick=True),
    # enough images that activations, not gradients, set the peak memory of a step
    Workload("ViT-B/16", 32, "bf16", quick=True),
)
LOADER_PROCESSES, LOADER_STEPS = 16, 300
WAITED = 0.1
"""A step waited for data if the loader took more than this share of a mean step."""
TRACES = ROOT / "output" / "benchmarks"
"""Folder of each model's profile, for chrome://tracing or ui.perfetto.dev."""

IMAGES_PER_SECOND = {"CCT-7/3×1": 20_000, "ViT-B/16": 2_400}
OVER_PLAIN = {"CCT-7/3×1": 1.08, "ViT-B/16": 1.03}
GFLOP_PER_IMAGE = {"CCT-7/3×1": 7.1, "ViT-B/16": 105.0}
"""Of a training step: forward, and twice that backward."""
COPIES = {"plain": 0, "HTM": 1, "VTM": 0, "HVTM": 1}
WAITED_SHARE = 0.02
MEMORY_RATIO = 1.03


def measure(settings: Settings) -> dict[str, Any]:
    """Per model the speed of its four variants in turn, then the other parts one by one."""
    world = World(0, 1, settings.device)
    found: dict[str, Any] = {"models": {}}
    for workload in QUICK_WORKLOADS if settings.quick else WORKLOADS:
        model: dict[str, Any] = {"batch": workload.batch}
        found["models"][workload.model] = model
        steps = {name: Steps(workload, name, world) for name in VARIANTS}
        for title, part in PARTS.items():
            if title == "loading" and workload.model != "CCT-7/3×1":
                continue  # the loader is CIFAR's
            model[title] = part(settings, workload, steps)
            settings.keep(found)
        steps.clear()
        torch._dynamo.reset()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _speed(settings: Settings, workload: Workload, steps: dict[str, Steps]) -> dict[str, Any]:
    """Row 7: images per second, time over plain, and mixing of each variant."""
    timings = interleaved(
        steps,
        settings.rounds(9),
        warm_up=1 if settings.quick else 3,  # compiles
        # several steps in flight on the device, as in a training
        least_seconds=0.0 if settings.quick else 0.5,
        synchronise=lambda: _synchronise(settings.device),
    )
    return {
        name: {
            **timing.record(),
            "images_per_second": workload.batch / timing.median,
            "over_plain": ratio(timing, timings["plain"]),
            "mixing": steps[name].mixing(),
        }
        for name, timing in timings.items()
    }


def _exchanges(settings: Settings, workload: Workload, steps: dict[str, Steps]) -> dict[str, Any]:
    """Row 8: copies to the host, host waits and kernels per step of each variant."""
    found = {}
    for name, step in steps.items():
        trace = TRACES / f"trace-{FAMILIES[workload.model].config(name)}.json.gz"
        kept = trace if settings.device.type == "cuda" and name == "HVTM" else None
        found[name] = profiled(step, settings.device, 2 if settings.quick else 5, kept)
    return found


def profiled(
    action: Callable[[], object], device: torch.device, steps: int, trace: Path | None = None
) -> dict[str, float]:
    """Copies to the host, host waits and kernels per step, and the device's share of busy time.

    Args:
        action: a step.
        device: its device; on a CPU everything is zero.
        steps: how many; one step before them warms up the profiler.
        trace: file for the trace.
    """
    activities = [ProfilerActivity.CPU]
    activities += [ProfilerActivity.CUDA] if device.type == "cuda" else []
    mark = "training steps"
    with profile(activities=activities) as found:
        action()
        _synchronise(device)
        with record_function(mark):
            for _ in range(steps):
                action()
        _synchronise(device)
    if trace is not None:
        trace.parent.mkdir(parents=True, exist_ok=True)
        found.export_chrome_trace(str(trace))
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
    waits = [
        event
        for event in on_host
        if event.name.startswith("cuda")
        and event.name.endswith("Synchronize")
        and span.start <= event.time_range.start <= span.end
    ]
    return {
        "copies_to_host": sum("Memcpy DtoH" in event.name for event in work) / steps,
        "host_waits": len(waits) / steps,
        "kernels": sum(not event.name.startswith("Mem") for event in work) / steps,
        "busy_share": busy_share([(e.time_range.start, e.time_range.end) for e in work]),
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


def _loading(settings: Settings, workload: Workload, steps: dict[str, Steps]) -> dict[str, Any]:
    """Row 9: steps on batches from the real loader, and how long they wait for them."""
    step, device = steps["HVTM"], settings.device
    processes, count = (1, 4) if settings.quick else (LOADER_PROCESSES, LOADER_STEPS)
    config = step.learner.config
    data = dataclasses.replace(config.data, workers=processes, batch_size=workload.batch)
    images = PhotographPieces(count * workload.batch)
    batches = TrainBatches(dataclasses.replace(config, data=data), images, 100, device)
    waits: list[float] = []
    try:
        for epoch in (0, 1):  # the first one starts the loader's processes
            stream = iter(batches.epoch(epoch))
            waits.clear()
            start = time.perf_counter()
            for _ in range(count):
                before = time.perf_counter()
                batch = next(stream)
                waits.append(time.perf_counter() - before)
                step.train(*batch)
            _synchronise(device)
            seconds = time.perf_counter() - start
            next(stream, None)  # ends the epoch
    finally:
        batches.close()
    return {
        "loader_processes": processes,
        "steps": count,
        "waited_share": sum(wait > WAITED * seconds / count for wait in waits) / count,
        "time_share": sum(waits) / seconds,
        "images_per_second": workload.batch * count / seconds,
    }


def _memory(settings: Settings, workload: Workload, steps: dict[str, Steps]) -> dict[str, Any]:
    """Row 10: peak bytes of each variant."""
    return {name: peak_bytes(step) for name, step in steps.items()}


def peak_bytes(step: Steps) -> int | None:
    """Peak memory of a training: what it keeps between steps and the most that a step adds."""
    device = step.learner.device
    if device.type != "cuda":
        return None
    kept = kept_bytes(step)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return int(kept + torch.cuda.max_memory_allocated(device) - before)


def kept_bytes(step: Steps) -> int:
    """Bytes of parameters, buffers and the optimiser's state on the training's device."""
    learner = step.learner
    tensors = [*learner.model.parameters(), *learner.model.buffers()]
    for state in learner.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    # a device without an index, such as "cuda", does not equal that of its tensors, "cuda:0"
    kind = learner.device.type
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type == kind)


PARTS = {"speed": _speed, "exchanges": _exchanges, "loading": _loading, "memory": _memory}


def tables(values: dict[str, Any]) -> str:
    """One line per variant, then loading."""
    rows, notes = [], []
    for name, model in values["models"].items():
        title = f"{name}, B={model['batch']}"
        peaks = model.get("memory", {})
        for variant, found in model["speed"].items():
            speed, mixed = found["images_per_second"], found["mixing"]
            profile = model.get("exchanges", {}).get(variant)
            counts = ["–"] * 4
            if profile is not None:
                counts = [f"{profile[key]:.4g}" for key in ("copies_to_host", "host_waits")]
                counts += [f"{profile['kernels']:.0f}", f"{100 * profile['busy_share']:.0f}%"]
            memory = mebibytes(peaks.get(variant))
            if peaks.get(variant):
                memory += f" ({peaks[variant] / peaks['plain']:.3f} ×)"
            rows.append(
                [
                    title,
                    variant,
                    f"{speed:,.0f}",
                    f"{speed * GFLOP_PER_IMAGE[name] / 1e3:.0f}",
                    "1" if variant == "plain" else times(found["over_plain"], 3),
                    f"{100 * mixed['mixed_share']:.0f}%" if mixed else "–",
                    *counts,
                    memory,
                ]
            )
        if "loading" in model:
            data = model["loading"]
            notes.append(
                f"- {title}, HVTM from the loader ({data['loader_processes']} processes, "
                f"{data['steps']} steps): {data['images_per_second']:,.0f} images/s; waited for "
                f"data in {data['waited_share']:.1%} of the steps and {data['time_share']:.1%} of "
                "the time."
            )
    head = (
        *("model", "step", "images/s", "TFLOP/s", "time over plain (95%)", "samples mixed"),
        *("copies to host", "host waits", "kernels", "device busy", "peak memory (MiB)"),
    )
    return aligned_table(head, rows, range(2, 11)) + "\n" + "\n".join(notes) + "\n"


def targets(values: dict[str, Any]) -> list[Target]:
    """All targets, including those of parts that were not measured."""
    nan = math.nan
    models = {name: values["models"].get(name, {}) for name in IMAGES_PER_SECOND}
    found = []

    def add(name: str, target: str, value: float, text: str, reached: bool) -> None:
        found.append(Target(name, target, None if math.isnan(value) else text, reached))

    for name, model in models.items():
        measured, least, limit = model.get("speed", {}), IMAGES_PER_SECOND[name], OVER_PLAIN[name]
        speed = measured.get("plain", {}).get("images_per_second", nan)
        text = f"{speed:,.0f} images/s"
        add(f"7. {name}, bf16, compiled", f"≥ {least:,} images/s", speed, text, speed >= least)
        nothing = {"ratio": nan, "low": nan, "high": nan}
        over = measured.get("HVTM", {}).get("over_plain", nothing)
        text, reached = times(over, 3), over["ratio"] <= limit
        add(f"7. {name}, HTM + VTM", f"≤ {limit} × plain", over["ratio"], text, reached)
    for name, model in models.items():
        for title, variant in (("HTM + VTM", "HVTM"), ("VTM", "VTM")):
            most = COPIES[variant]
            copies = model.get("exchanges", {}).get(variant, {}).get("copies_to_host", nan)
            target = f"≤ {most} copies to the host per step"
            add(f"8. {name}, {title}", target, copies, f"{copies:g}", copies <= most)
    share = models["CCT-7/3×1"].get("loading", {}).get("waited_share", nan)
    target = f"waits for data in ≤ {WAITED_SHARE:.0%} of the steps"
    add("9. CCT-7/3×1, from the loader", target, share, f"{share:.1%}", share <= WAITED_SHARE)
    for name, model in models.items():
        peaks = model.get("memory", {})
        peak = peaks["HVTM"] / peaks["plain"] if peaks.get("HVTM") else nan
        target, reached = f"≤ {MEMORY_RATIO} × plain", peak <= MEMORY_RATIO
        add(f"10. peak memory, {name}, HTM + VTM", target, peak, f"{peak:.3f} ×", reached)
    return found


ROW = Row("gpu", measure, tables, targets)


def main(argv: Sequence[str]) -> None:
    """Read the command line; refuse a machine without CUDA except for a smoke run on the CPU."""
    parser = row.parser("python -m benchmarks.gpu", __doc__)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --quick"
    )
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.quick:
        raise ConfigError(
            "command line: --device: got 'cpu'; allowed without --quick: cuda, since figures from "
            "a CPU would mean nothing here"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "benchmarks.gpu: torch finds no CUDA device on this machine, and these rows need one; "
            "--device cpu --quick tries the script itself"
        )
    command = ["python -m benchmarks.gpu", *argv]
    row.run(ROW, options, command, device=torch.device(options.device))


if __name__ == "__main__":
    sys.exit(cli.run(main))
