"""Rows 7, 8 and 10: training steps, their profile and their peak memory."""

import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median

import torch
from torch import Tensor

from benchmarks.gpu.models import Model
from benchmarks.gpu.profile import profiled
from benchmarks.row import Settings, Target, Values
from benchmarks.steps import FAMILIES, Steps
from benchmarks.timing import interleaved, mebibytes, ratio, times
from experiments.documents.markdown import aligned_table
from experiments.training.distributed import World

VARIANTS = ("plain", "HVTM", "HTM", "VTM")
"""In the order in which they are measured: what matters most comes first."""
TRACED = ("plain", "HVTM")
COPIES = {"plain": 0, "HTM": 1, "VTM": 0, "HVTM": 1}
MEMORY_RATIO = 1.03


def measure(model: Model, mode: str, files: Path, settings: Settings, found: Values) -> None:
    """Rows 7, 8 and 10: the steps of each variant, in turn with the plain step.

    A variant that fails, for example in its compilation, is recorded with its error.
    """
    workload, device = model.workload(mode, settings.quick), settings.device
    variants: Values = {}
    figures: Values = {"batch": workload.batch, "variants": variants}
    plain: Steps | None = None
    for name in VARIANTS:
        values: Values = {}
        variants[name] = values
        try:
            step = Steps(workload, name, World(0, 1, device))
            start = time.perf_counter()
            step()
            torch.get_device_module(device).synchronize(device)
            values["first_step_seconds"] = time.perf_counter() - start
            plain = plain or step
            timings = interleaved(
                {"plain": plain, name: step},
                settings.rounds(9),
                warm_up=1 if settings.quick else 3,
                # several steps in flight on the device, as in a training
                least_seconds=0.0 if settings.quick else 0.5,
                synchronise=torch.get_device_module(device).synchronize,
            )
            values |= {
                **timings[name].record(),
                "images_per_second": workload.batch / timings[name].median,
                "over_plain": ratio(timings[name], timings["plain"]),
                "mixing": step.mixing(),
                "peak_bytes": peak_bytes(step),
                "issue_seconds": issue_seconds(step, device, settings.rounds(20)),
            }
            found |= figures
            settings.keep(found)
            trace = files / f"{FAMILIES[model.name].config(name)}-{mode}.json.gz"
            kept = trace if name in TRACED else None
            values["profile"] = profiled(step, device, 2 if settings.quick else 5, kept)
        except Exception as error:  # what the compiler or the driver raises has no common class
            if plain is None:
                raise
            values["error"] = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            print(f"{name}: {values['error']}", file=sys.stderr, flush=True)
        found |= figures
        settings.keep(found)


def issue_seconds(action: Callable[[], object], device: torch.device, calls: int) -> float:
    """Seconds until a step returns to the host, with nothing else waiting for the device."""
    found = []
    for _ in range(calls):
        torch.get_device_module(device).synchronize(device)
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return median(found)


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


def tables(model: Model, values: Values) -> str:
    """One line per variant, and the errors."""
    rows, errors, peaks = [], [], {}
    for variant, one in values["variants"].items():
        if "error" in one:
            errors.append(f"- {variant} failed: {one['error']}")
        if "images_per_second" not in one:
            continue
        speed, mixed, peaks[variant] = one["images_per_second"], one["mixing"], one["peak_bytes"]
        counts = ["–"] * 6
        if "profile" in one:
            found = one["profile"]
            host = max(0.0, one["issue_seconds"] - found["waited_seconds"])
            counts = [f"{found[key]:.4g}" for key in ("copies_to_host", "host_waits")]
            counts += [f"{found['kernels']:.0f}", f"{100 * found['busy_share']:.0f}%"]
            counts += [f"{1e3 * host:.2f}", f"{1e3 * found['gap_seconds']:.2f}"]
        memory = mebibytes(peaks[variant])
        if peaks.get("plain") and peaks[variant]:
            memory += f" ({peaks[variant] / peaks['plain']:.3f} ×)"
        rows.append(
            [
                variant,
                f"{speed:,.0f}",
                f"{speed * model.gflop / 1e3:.0f}",
                "1" if variant == "plain" else times(one["over_plain"], 3),
                f"{100 * mixed['mixed_share']:.0f}%" if mixed else "–",
                *counts,
                memory,
                f"{one['first_step_seconds']:.0f}",
            ]
        )
    head = (
        *("step", "images/s", "TFLOP/s", "time over plain (95%)", "samples mixed"),
        *("copies to host", "host waits", "kernels", "device busy", "host (ms)"),
        *("gap after a copy (ms)", "peak memory (MiB)", "first step (s)"),
    )
    return "\n".join([aligned_table(head, rows, range(1, 13)), *errors])


def targets(model: Model, mode: str, values: Values) -> list[Target]:
    """Of compiled steps: speed, exchanges with the host and memory, measured or not."""
    nan, variants = math.nan, values.get("variants", {})
    title, found = f"{model.name}, compile {mode}", []

    def add(name: str, target: str, value: float, text: str, reached: bool) -> None:
        found.append(Target(name, target, None if math.isnan(value) else text, reached))

    speed = variants.get("plain", {}).get("images_per_second", nan)
    least, limit = model.images_per_second, model.over_plain
    add(f"7. {title}", f"≥ {least:,} images/s", speed, f"{speed:,.0f} images/s", speed >= least)
    nothing = {"ratio": nan, "low": nan, "high": nan}
    over = variants.get("HVTM", {}).get("over_plain", nothing)
    text, reached = times(over, 3), over["ratio"] <= limit
    add(f"7. {title}, HTM + VTM", f"≤ {limit} × plain", over["ratio"], text, reached)
    for name, variant in (("HTM + VTM", "HVTM"), ("VTM", "VTM")):
        most = COPIES[variant]
        copies = variants.get(variant, {}).get("profile", {}).get("copies_to_host", nan)
        target, text = f"≤ {most} copies to the host per step", f"{copies:.4g} per step"
        add(f"8. {title}, {name}", target, copies, text, copies <= most)
    peaks = [variants.get(name, {}).get("peak_bytes") or nan for name in ("HVTM", "plain")]
    peak = peaks[0] / peaks[1]
    target, reached = f"≤ {MEMORY_RATIO} × plain", peak <= MEMORY_RATIO
    add(f"10. peak memory, {title}, HTM + VTM", target, peak, f"{peak:.3f} ×", reached)
    return found
