"""Row 9: batches from the loader, and steps on them."""

import dataclasses
import math
import os
import time
from contextlib import closing

import torch

from benchmarks.gpu.models import Model
from benchmarks.pipeline import JpegPhotographs
from benchmarks.row import Settings, Target, Values
from benchmarks.steps import FAMILIES, Steps
from experiments.data.loading import TrainBatches
from experiments.training.distributed import World

LOADER_STEPS = 300
WAITED = 0.1
"""A step waited for data if the loader took more than this share of a mean step."""
WAITED_SHARE = 0.02


def measure(model: Model, settings: Settings, found: Values) -> None:
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
            torch.get_device_module(device).synchronize(device)
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


def tables(model: Model, values: Values) -> str:
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


def targets(model: Model, values: Values) -> list[Target]:
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
