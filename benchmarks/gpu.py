"""Rows 7 to 10, on a CUDA GPU, one part per command: `python -m benchmarks.gpu PART`.

A part records each figure as soon as it is measured: one that is interrupted or runs out of time
keeps what it has. Training steps are the training's own, in bfloat16.
"""

import dataclasses
import functools
import math
import os
import signal
import sys
import tempfile
import time
from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor
from torch._C._autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks import row
from benchmarks.pipeline import JpegPhotographs, PhotographPieces
from benchmarks.row import Measurement, Row, Settings, Target, Values
from benchmarks.steps import FAMILIES, Steps, Workload
from benchmarks.timing import interleaved, mebibytes, ratio, times
from experiments import cli
from experiments.data.loading import TrainBatches
from experiments.documents.markdown import aligned_table
from experiments.errors import ConfigError
from experiments.provenance import ROOT
from experiments.study.plan import read_study
from experiments.training.distributed import World
from experiments.training.metrics import read_metrics
from experiments.training.run import Run


@dataclass(frozen=True)
class Model:
    """What is measured of a model, and its targets."""

    name: str  # a key of `FAMILIES`
    batch: int
    quick_batch: int
    gflop: float
    """Per image of a training step: forward, and twice that backward."""
    images_per_second: int
    over_plain: float
    images: Callable[[int], Any]
    """Of the loader, by their number."""

    def workload(self, mode: str, quick: bool) -> Workload:
        """Its training steps."""
        return Workload(self.name, self.quick_batch if quick else self.batch, "bf16", mode, quick)


MODELS = {
    "cct": Model("CCT-7/3×1", 128, 4, 7.1, 20_000, 1.08, PhotographPieces),
    # enough images that activations, not gradients, set the peak memory of a smoke run's step
    "vit": Model("ViT-B/16", 126, 32, 105.0, 2_400, 1.03, JpegPhotographs),
}
MODES = ("off", "on", "graphs")
"""Of the config's `compile`."""
VARIANTS = ("plain", "HVTM", "HTM", "VTM")
"""In the order in which they are measured: what matters most comes first."""
TRACED = ("plain", "HVTM")
STUDY = ROOT / "configs" / "studies" / "fashion_mnist_cct7.yaml"
FILES = ROOT / "output" / "benchmarks"
LARGEST_TRACE = 16 * 2**20
LOADER_STEPS, EPOCHS = 300, 4
WAITED = 0.1
"""A step waited for data if the loader took more than this share of a mean step."""
SECONDS = 480.0

COPIES = {"plain": 0, "HTM": 1, "VTM": 0, "HVTM": 1}
WAITED_SHARE = 0.02
MEMORY_RATIO = 1.03


def _synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def measure_steps(model: Model, mode: str, files: Path, settings: Settings, found: Values) -> None:
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
            _synchronise(device)
            values["first_step_seconds"] = time.perf_counter() - start
            plain = plain or step
            timings = interleaved(
                {"plain": plain, name: step},
                settings.rounds(9),
                warm_up=1 if settings.quick else 3,
                # several steps in flight on the device, as in a training
                least_seconds=0.0 if settings.quick else 0.5,
                synchronise=lambda: _synchronise(device),
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
        _synchronise(device)
        start = time.perf_counter()
        action()
        found.append(time.perf_counter() - start)
    return median(found)


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
        _synchronise(device)
        with record_function(mark):
            for _ in range(steps):
                action()
        _synchronise(device)
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


def measure_loading(model: Model, settings: Settings, found: Values) -> None:
    """Row 9: the loader alone, then HVTM's steps on its batches, and how long they wait for it."""
    quick, device = settings.quick, settings.device
    processes, count = (1, 2) if quick else (os.cpu_count() or 1, LOADER_STEPS)
    step = Steps(model.workload("off" if quick else "on", quick), "HVTM", World(0, 1, device))
    config, batch = step.learner.config, step.learner.config.data.batch_size
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, workers=processes))
    classes, images = FAMILIES[model.name].classes, model.images(count * batch)
    with closing(TrainBatches(config, images, classes, device)) as batches:
        # the first time starts the loader's processes, or compiles
        for epoch, steps in enumerate((False, False, True, True)):
            stream, waits = iter(batches.epoch(epoch)), []
            start = time.perf_counter()
            for _ in range(count):
                before = time.perf_counter()
                loaded = next(stream)
                waits.append(time.perf_counter() - before)
                if steps:
                    step.train(*loaded)
            _synchronise(device)
            seconds = time.perf_counter() - start
            next(stream, None)  # ends the epoch
            speed = batch * count / seconds
            if not steps:
                found |= {"batch": batch, "loader_processes": processes, "steps": count}
                found["alone_images_per_second"] = speed
            else:
                found |= {
                    "waited_share": sum(wait > WAITED * seconds / count for wait in waits) / count,
                    "time_share": sum(waits) / seconds,
                    "images_per_second": speed,
                }
            settings.keep(found)


def measure_epoch(files: Path, settings: Settings, found: Values) -> None:
    """Epochs of the study for a GPU, by a whole training: its steps, evaluation and saving."""
    study = read_study(STUDY)
    changes = {"device": settings.device.type, "checkpoint.every": "1"}
    changes |= {"logging.evaluate_every": "1", "schedule.epochs": str(EPOCHS)}
    changes |= {"schedule.warmup_epochs": "1"}
    if settings.quick:
        changes |= {"model.name": "cct_2_3x2_32", "horizontal.layers": "[1]"}
        changes |= {"vertical.layers": "[1]", "data.dataset": "digits", "data.workers": "0"}
        changes |= {"data.train_split": "train[:16]", "data.val_split": "validation[:8]"}
        changes |= {"data.batch_size": "8", "schedule.epochs": "2"}
    files.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=files) as folder:
        config = study.config(study.variants["HTM + VTM"], 1, changes, Path(folder) / "run")
        run = Run(config, World(0, 1, settings.device))
        run.fit()
        rows = read_metrics(run.folder.path)
    training = [one for one in rows if one["split"] == "train"]
    ends = [one["time"] for one in rows if one["split"] == "validation"]
    found |= {
        "images": run.batches.num_images,
        "evaluated": run.val_batches.num_images,
        "epochs": [],
    }
    # the first epoch compiles, and starts the loader's processes
    for number, (before, end) in enumerate(pairwise(ends), start=2):
        steps = [one for one in training if one["epoch"] == number]
        seconds = sum(
            one["steps"] * config.data.batch_size / one["images_per_second"] for one in steps
        )
        waited = sum(one["steps"] * one["data_seconds"] for one in steps)
        epoch = {"seconds": end - before, "training_seconds": seconds, "waited_seconds": waited}
        found["epochs"].append(epoch)
    settings.keep(found)


def measure_ceilings(settings: Settings, found: Values) -> None:
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
        synchronise=lambda: _synchronise(device),
    )
    seconds = {name: timing.median for name, timing in timings.items()}
    found |= {
        "side": side,
        "product_tflops": 2 * side**3 / seconds["product"] / 1e12,
        "copy_gigabytes": 2 * size / seconds["copy"] / 1e9,
        "upload_gigabytes": len(pinned) / seconds["upload"] / 1e9,
    }


def step_tables(model: Model, values: Values) -> str:
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


def step_targets(model: Model, mode: str, values: Values) -> list[Target]:
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


def loading_tables(model: Model, values: Values) -> str:
    """The loader alone, and steps from it."""
    alone, speed = values["alone_images_per_second"], values.get("images_per_second")
    text = f"- {values['loader_processes']} loader processes, {values['steps']} batches of "
    text += f"{values['batch']}: alone {alone:,.0f} images/s"
    if speed is not None:
        text += f"; HVTM's steps from it {speed:,.0f} images/s, which waited for data in "
        text += f"{values['waited_share']:.1%} of the steps and {values['time_share']:.1%} of the "
        text += "time"
    source = " The images are decoded from JPEG (640×427), held in memory."
    return f"{text}.{source if model.images is JpegPhotographs else ''}\n"


def loading_targets(model: Model, values: Values) -> list[Target]:
    """Steps must not wait for data, where images need not be decoded."""
    if model.images is JpegPhotographs:
        return []
    share = values.get("waited_share", math.nan)
    return [
        Target(
            f"9. {model.name}, from the loader",
            f"waits for data in ≤ {WAITED_SHARE:.0%} of the steps",
            None if math.isnan(share) else f"{share:.1%} of {values['steps']} steps",
            share <= WAITED_SHARE,
        )
    ]


def epoch_tables(values: Values) -> str:
    """One line per epoch."""
    rows = []
    for number, epoch in enumerate(values["epochs"], start=2):
        rest = epoch["seconds"] - epoch["training_seconds"]
        seconds = (epoch["seconds"], epoch["training_seconds"], epoch["waited_seconds"], rest)
        speed = values["images"] / epoch["training_seconds"]
        rows.append([str(number), *(f"{value:.2f}" for value in seconds), f"{speed:,.0f}"])
    head = (
        *("epoch", "whole (s)", "training (s)", "of it waiting for data"),
        *("evaluation and saving (s)", "images/s"),
    )
    table = aligned_table(head, rows, range(6))
    return f"{table}\n{values['images']:,} images, {values['evaluated']:,} to evaluate.\n"


def ceiling_tables(values: Values) -> str:
    """One line per ceiling."""
    side = values["side"]
    rows = [
        [f"product of {side}×{side} matrices, bf16", f"{values['product_tflops']:,.0f} TFLOP/s"],
        ["copy on the device, read and written", f"{values['copy_gigabytes']:,.0f} GB/s"],
        ["copy from pinned memory of the host", f"{values['upload_gigabytes']:,.0f} GB/s"],
    ]
    return aligned_table(("what", "at most"), rows, (1,))


class OutOfTime(BaseException):
    """Ends a part; no library's `except Exception` keeps it."""


def limited(seconds: float, action: Callable[[], None]) -> None:
    """Stop an action after some seconds, wherever it is."""

    def stop(number: int, frame: object) -> None:
        raise OutOfTime

    before = signal.signal(signal.SIGALRM, stop)
    try:
        signal.setitimer(signal.ITIMER_REAL, seconds)
        action()
    except OutOfTime:
        print(f"stopped after {seconds:g} s; what was measured is kept", file=sys.stderr)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@dataclass(frozen=True)
class Part:
    """What one command measures."""

    measure: Callable[[Settings, Values], None]
    tables: Callable[[Values], str]
    targets: Callable[[Values], list[Target]] = lambda values: []


def parts(files: Path = FILES) -> dict[str, Part]:
    """All parts, by name; traces go to the folder `files`."""
    found: dict[str, Part] = {}
    for key, model in MODELS.items():
        for mode in MODES:
            found[f"{key}-{mode}"] = Part(
                functools.partial(measure_steps, model, mode, files),
                functools.partial(step_tables, model),
                *([] if mode == "off" else [functools.partial(step_targets, model, mode)]),
            )
        found[f"{key}-loading"] = Part(
            functools.partial(measure_loading, model),
            functools.partial(loading_tables, model),
            functools.partial(loading_targets, model),
        )
    found["epoch"] = Part(functools.partial(measure_epoch, files), epoch_tables)
    found["ceilings"] = Part(measure_ceilings, ceiling_tables)
    return found


def make_row(name: str, part: Part, seconds: float = SECONDS) -> Row:
    """The row of a part."""

    def measure(settings: Settings) -> Values:
        found: Values = {}
        limited(seconds, lambda: part.measure(settings, found))
        return found

    def tables(values: Values) -> str:
        return part.tables(values) if values else "Nothing was measured in time.\n"

    return Row(f"gpu-{name}", measure, tables, part.targets, f"gpu {name}")


ROWS = tuple(make_row(name, part) for name, part in parts().items())


def page(found: Mapping[str, Measurement]) -> str:
    """What was measured of all parts."""
    shown = [
        f"`{one.command}`:\n\n{one.tables(found[one.name].values)}"
        for one in ROWS
        if one.name in found
    ]
    return "\n".join(shown) or "Not measured.\n"


def main(argv: Sequence[str]) -> None:
    """Read the command line; refuse a machine without CUDA except for a smoke run on the CPU."""
    parser = row.parser("python -m benchmarks.gpu", __doc__)
    parser.add_argument("part", choices=[*parts()], metavar="PART", help=", ".join(parts()))
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --quick"
    )
    parser.add_argument("--seconds", type=float, default=SECONDS, help="time limit; default: 480")
    parser.add_argument("--files", type=Path, default=FILES, help="folder of the traces")
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
    if not options.seconds > 0:
        raise ConfigError(f"command line: --seconds: got {options.seconds}; allowed: above 0")
    one = make_row(options.part, parts(options.files)[options.part], options.seconds)
    command = ["python -m benchmarks.gpu", *argv]
    row.run(one, options, command, device=torch.device(options.device))


if __name__ == "__main__":
    sys.exit(cli.run(main))
