"""Row 13: what the host does in a training step, besides launching the compiled pass.

The step is the training's own, on CUDA, of the configs with HTM and VTM. One operation that gives
gradients takes the place of the compiled forward and backward pass, and its time is left out.
Where there is no GPU one is simulated (`pretended.py`): kernels do nothing, so that a step
takes as long as its host.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import row
from benchmarks.pretended import environment as pretended_environment
from benchmarks.row import Row, Settings, Target
from benchmarks.steps import FAMILIES, Steps, Workload
from benchmarks.timing import Timing
from experiments.documents.markdown import aligned_table
from experiments.errors import DataError
from experiments.provenance import ROOT
from experiments.training.distributed import World
from experiments.training.step import StepResult

WORKLOADS = tuple(
    Workload(model, FAMILIES[model].gpu_batch, "bf16") for model in ("CCT-7/3×1", "ViT-B/16")
)
LIMIT = 0.6  # milliseconds
PARTS = {
    "mixer": "Mixup",
    "clip_gradient": "gradient norm",
    "update": "optimiser",
    "add_step": "statistics",
}
"""Titles of the functions that a step consists of; "the rest" is what they leave."""
_COMPILED = ("forward", "backward")
_IN_A_PROCESS = "import sys; from benchmarks import host; host.print_times(*map(int, sys.argv[1:]))"
_VALUES = 16  # as many as both statistics, losses and more


class _Gradients(torch.autograd.Function):
    """A loss of parameters, with gradients that are there already."""

    @staticmethod
    def forward(ctx: Any, gradients: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.gradients = gradients
        return parameters[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *outputs: Any) -> Any:
        return None, *(gradient.detach() for gradient in ctx.gradients)


def times(step: Steps, rounds: int) -> dict[str, list[float]]:
    """Seconds of each of several steps and of their parts, the compiled pass replaced."""
    learner, seconds = step.learner, defaultdict[str, list[float]](list)
    parameters = list(learner.model.parameters())
    gradients = [torch.zeros_like(parameter) for parameter in parameters]
    values = torch.zeros(_VALUES, device=learner.device)
    finite, names = values[:2].isfinite(), tuple(f"value {number}" for number in range(_VALUES))
    compiled: Any = _Gradients.apply
    learner.training_pass = lambda images, targets: StepResult(
        compiled(gradients, *parameters), names, values, finite
    )

    def timed(thing: Any, name: str) -> Any:
        inner = getattr(thing, name)

        def outer(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = inner(*arguments)
            seconds[name].append(time.perf_counter() - start)
            return result

        setattr(thing, name, outer)

    for name in (*_COMPILED, *list(PARTS)[:-1]):
        timed(learner, name)
    timed(step.statistics, "add_step")
    timed(step, "train")
    for _ in range(rounds + 5):
        step()
    return {name: found[5:] for name, found in seconds.items()}


def print_times(rounds: int, quick: int) -> None:
    """Measure in this process, whose GPU may be pretended, and print JSON."""
    torch.set_num_threads(1)
    world, found = World(0, 1, torch.device("cuda")), []
    for workload in WORKLOADS:
        step = Steps(replace(workload, quick=bool(quick)), "HVTM", world)
        count = len(list(step.learner.model.parameters()))
        seconds = times(step, rounds)
        found.append({"model": workload.model, "parameters": count, "seconds": seconds})
    print(json.dumps(found))


def measure(settings: Settings) -> dict[str, Any]:
    """CCT-7/3×1 (AdamW, Mixup and CutMix) and ViT-B/16 (momentum, clipping), on one core."""
    with tempfile.TemporaryDirectory() as folder:
        pretended = not torch.cuda.is_available()
        environment = pretended_environment(Path(folder)) if pretended else dict(os.environ)
        done = subprocess.run(
            [
                *(sys.executable, "-c", _IN_A_PROCESS),
                *(str(settings.rounds(1000)), str(int(settings.quick))),
            ],
            env=environment,
            cwd=ROOT,
            capture_output=True,
            text=True,
        )
    if done.returncode:
        raise DataError(f"a step on the GPU failed:\n{done.stderr.strip()}")
    models = []
    for model in json.loads(done.stdout):
        seconds = model.pop("seconds")
        left_out = zip(*(seconds[name] for name in _COMPILED), strict=True)
        whole = [t - sum(out) for t, out in zip(seconds["train"], left_out, strict=True)]
        parts = {name: Timing(tuple(seconds[name])).record() for name in PARTS}
        models.append({**model, "host": Timing(tuple(whole)).record(), "parts": parts})
    return {"pretended": pretended, "models": models}


def tables(values: dict[str, Any]) -> str:
    """One line per model, of lower quartiles: whatever disturbs a step adds to its time."""
    rows = []
    for model in values["models"]:
        parts = [model["parts"][name] for name in PARTS]
        seconds = [timing["lower_quartile"] for timing in (model["host"], *parts)]
        cells = [*seconds, seconds[0] - sum(seconds[1:]), model["host"]["seconds"]]
        title = f"{model['model']}, {model['parameters']} parameters"
        rows.append([title, *(f"{1e3 * cell:.2f}" for cell in cells)])
    head = ("model", "host (ms)", *PARTS.values(), "the rest", "host, median")
    note = "The GPU is simulated: its kernels do nothing.\n" if values["pretended"] else ""
    return f"{aligned_table(head, rows, range(1, 8))}\n{note}".rstrip("\n") + "\n"


def targets(values: dict[str, Any]) -> list[Target]:
    """The model whose step is the shortest on a GPU."""
    model = values["models"][0]
    host = 1e3 * model["host"]["lower_quartile"]
    name = f"13. host's part of a step, {model['model']}"
    return [Target(name, f"≤ {LIMIT} ms", f"{host:.2f} ms", host <= LIMIT)]


ROW = Row("host", measure, tables, targets, threads=1)

if __name__ == "__main__":
    sys.exit(row.main(ROW))
