"""Rows 7 to 10, on a CUDA GPU: speed, exchanges with the host, waiting for data, memory.

`python -m benchmarks.gpu` takes less than nine minutes: what does not fit any more is left out and
named. Each model trains in bfloat16, compiled, by the engine's own steps.
"""

import argparse
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from benchmarks import gpu_report, harness
from benchmarks.harness import Row, Settings
from benchmarks.learners import CONFIGS, Steps, Workload, make_learner
from benchmarks.profiles import profiled
from benchmarks.timing import interleaved, ratio
from experiments import cli
from experiments.data.loading import Batch, TrainBatches
from experiments.errors import ConfigError
from experiments.provenance import ROOT
from experiments.training.distributed import World
from experiments.training.evaluation import to_device
from experiments.training.step import Learner

WORKLOADS = (
    Workload("CCT-7/3×1", 128, "bf16", compile=True),
    Workload("ViT-B/16", 126, "bf16", compile=True),
)
QUICK_WORKLOADS = (
    Workload("CCT-7/3×1", 4, "bf16", quick=True),
    # so many images that a step's memory peaks by its activations, not by its gradients
    Workload("ViT-B/16", 32, "bf16", quick=True),
)
VARIANTS = ("plain", "HVTM", "HTM", "VTM")  # what matters most comes first
LIMIT_SECONDS = 9 * 60
_RESERVE_SECONDS = 100
"""What the longest part that may still be begun takes."""
LOADER_PROCESSES, LOADER_STEPS = 16, 300
WAITED = 0.1
"""A step waited for data where the loader took more than this share of a median step."""
TRACES = ROOT / "output" / "benchmarks"
"""Folder of each model's trace."""


def measure(settings: Settings) -> dict[str, Any]:
    """Each model's four variants in turn, then what they exchange, need and wait for."""
    end = time.monotonic() + LIMIT_SECONDS
    world = World(0, 1, settings.device)
    found: dict[str, Any] = {"models": [], "left_out": []}
    for workload in QUICK_WORKLOADS if settings.quick else WORKLOADS:
        parts: dict[str, Any] = {"model": workload.model, "batch": workload.batch}
        found["models"].append(parts)
        ready: dict[str, Steps] = {}
        for name in VARIANTS:
            if time.monotonic() > end - _RESERVE_SECONDS:
                found["left_out"].append(f"{workload.model}, {name}")
                continue
            ready[name] = Steps(workload, make_learner(workload, name, world))
            for _ in range(1 if settings.quick else 3):
                ready[name]()  # compiles
        parts |= _speed(settings, workload, ready)
        for title, part in (("data", _data), ("checkpointing", _checkpointing)):
            if title == "data" and workload.model != "CCT-7/3×1":
                continue  # the loader is that of CIFAR
            if time.monotonic() > end - _RESERVE_SECONDS or "HVTM" not in ready:
                found["left_out"].append(f"{workload.model}, {title}")
                continue
            parts[title] = part(settings, workload, ready, world)
        settings.keep(found)
        ready.clear()
        torch._dynamo.reset()
        if settings.device.type == "cuda":
            torch.cuda.empty_cache()
    return found


def _speed(settings: Settings, workload: Workload, steps: dict[str, Steps]) -> dict[str, Any]:
    """Images a second, mixing, exchanges and memory of each variant."""
    on_cuda = settings.device.type == "cuda"
    timings = interleaved(
        steps,
        settings.rounds(9),
        # steps are given to the device one after the other, as a training gives them
        least_seconds=0.0 if settings.quick else 0.5,
        synchronise=(lambda: torch.cuda.synchronize(settings.device)) if on_cuda else lambda: None,
    )
    found: dict[str, Any] = {"variants": {}, "over_plain": {}}
    for name, timing in timings.items():
        step = steps[name]
        kept = TRACES / f"trace-{CONFIGS[workload.model][name]}.json.gz"
        trace = kept if on_cuda and name == "HVTM" else None
        profile = profiled(step, settings.device, 2 if settings.quick else 5, trace)
        if name not in ("plain", "HVTM"):
            del profile["timeline"]  # the figure shows these two
        found["variants"][name] = {
            **timing.record(),
            "images_per_second": len(step.labels) / timing.median,
            "mixing": step.mixing(),
            "peak_bytes": _peak_bytes(step),
            "profile": profile,
        }
        if name != "plain" and "plain" in timings:
            found["over_plain"][name] = ratio(timing, timings["plain"])
    return found


def _peak_bytes(step: Steps) -> int | None:
    """Peak memory of a training: what it keeps between steps and the most that a step adds."""
    device = step.learner.device
    if device.type != "cuda":
        return None
    kept = _kept_bytes(step.learner)
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    step()
    torch.cuda.synchronize(device)
    return int(kept + torch.cuda.max_memory_allocated(device) - before)


def _kept_bytes(learner: Learner) -> int:
    """Of parameters, buffers and the optimiser's state."""
    tensors = [*learner.model.parameters(), *learner.model.buffers()]
    for state in learner.optimizer.state.values():
        tensors += [value for value in state.values() if isinstance(value, Tensor)]
    # a device without an index, such as "cuda", is not equal to that of its tensors, "cuda:0"
    kind = learner.device.type
    return sum(t.numel() * t.element_size() for t in tensors if t.device.type == kind)


def _data(
    settings: Settings, workload: Workload, steps: dict[str, Steps], world: World
) -> dict[str, Any]:
    """Train by the engine's loop from the real loader, and time how long it waits for a batch."""
    learner = steps["HVTM"].learner
    processes, count = (1, 4) if settings.quick else (LOADER_PROCESSES, LOADER_STEPS)
    images = _RandomImages(count * workload.batch)
    data = {"workers": processes, "batch_size": workload.batch}
    config = _with_data(learner, data)
    batches = _WatchedBatches(TrainBatches(config, images, 100, world.device.type == "cuda"))
    try:
        for epoch in (0, 1):  # the first starts the loader's processes
            batches.waits.clear()
            start = time.perf_counter()
            for batch in batches.epoch(epoch):
                step = steps["HVTM"]
                step.images, step.labels = to_device(batch, world.device, config)
                step()
            step.mixing()  # waits for the device
            seconds = time.perf_counter() - start
    finally:
        batches.inner.close()
    step_seconds = seconds / len(batches.waits)
    waited = [wait > WAITED * step_seconds for wait in batches.waits]
    return {
        "loader_processes": processes,
        "steps": len(waited),
        "waited_share": sum(waited) / len(waited),
        "time_share": sum(batches.waits) / seconds,
        "images_per_second": workload.batch / step_seconds,
    }


def _with_data(learner: Learner, data: dict[str, Any]) -> Any:
    return dataclasses.replace(
        learner.config, data=dataclasses.replace(learner.config.data, **data)
    )


class _RandomImages:
    """So many 32×32 images of random pixels, made once."""

    def __init__(self, count: int) -> None:
        generator = np.random.default_rng(0)
        self._pixels = generator.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8)

    def __len__(self) -> int:
        return len(self._pixels)

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.fromarray(self._pixels[index]), index % 100

    def describe(self, index: int) -> str:
        """The image's number."""
        return f"random image {index}"


class _WatchedBatches:
    """Training batches that note how long each had to be waited for."""

    def __init__(self, inner: TrainBatches) -> None:
        self.inner = inner
        self.steps_per_epoch = inner.steps_per_epoch
        self.waits: list[float] = []

    def epoch(self, epoch: int, first_step: int = 0) -> Iterator[Batch]:
        batches = self.inner.epoch(epoch, first_step)
        while True:
            start = time.perf_counter()
            batch = next(batches, None)
            if batch is None:
                return
            self.waits.append(time.perf_counter() - start)
            yield batch


def _checkpointing(
    settings: Settings, workload: Workload, steps: dict[str, Steps], world: World
) -> dict[str, Any]:
    """HTM and VTM with activation checkpointing and without, eager, from the same weights.

    The gradient of the first step shows that what is computed again is the same: the loss does
    not, since it is computed before, and a step of the warm-up hardly changes the next one.
    """
    eager = Workload(workload.model, workload.batch, workload.precision, quick=workload.quick)
    found: dict[str, Any] = {}
    for name in ("without", "with"):
        step = Steps(eager, make_learner(eager, "HVTM", world))
        if name == "with":
            backbone: Any = step.learner.model.backbone
            backbone.set_grad_checkpointing()
        step()
        norm = step.measured()["gradient_norm"]
        step()
        found[name] = {"gradient_norm": norm, "peak_bytes": _peak_bytes(step)}
        del step
    return found


def main(argv: Sequence[str]) -> None:
    """Read the command line; refuse a machine without CUDA unless told otherwise."""
    parser: argparse.ArgumentParser = harness.parser("python -m benchmarks.gpu", __doc__)
    parser.add_argument(
        "--device", choices=("cuda", "cpu"), default="cuda", help="cpu: only with --quick"
    )
    options = parser.parse_args(argv)
    if options.device == "cpu" and not options.quick:
        raise ConfigError(
            "command line: --device: got 'cpu'; allowed without --quick: cuda, since figures of a "
            "CPU would say nothing here"
        )
    if options.device == "cuda" and not torch.cuda.is_available():
        raise ConfigError(
            "benchmarks.gpu: torch finds no CUDA device on this machine, and these rows are about "
            "one; --device cpu --quick tries the script itself"
        )
    harness.run(ROW, options, torch.device(options.device))


ROW = Row("gpu", measure, gpu_report.tables, gpu_report.targets)

if __name__ == "__main__":
    sys.exit(cli.run(main))
