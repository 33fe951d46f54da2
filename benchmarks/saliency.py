"""Row 4: saliency by attention against saliency by input gradients, and whole steps with each.

By attention, saliency comes from the queries and keys of the layer that mixes. By gradients, it
takes one more forward and backward pass of the whole model (as in Kim, Choo and Song, "Puzzle Mix",
ICML 2020), without the gradients of the weights.

Dimensions: B batch, T patch tokens, C classes.
"""

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from benchmarks import row
from benchmarks.row import Row, Settings, Target
from benchmarks.steps import Steps, Workload, sized, time_steps
from benchmarks.timing import interleaved, milliseconds, ratio, recorded, times
from experiments.documents.markdown import aligned_table
from experiments.study.variants import GradientSaliency, gradient_saliency
from tokenmixup import TokenMixupModel, attach
from tokenmixup.hosts.base import input_saliency

WORKLOADS = (Workload("CCT-7/3×1", 128), Workload("ViT-B/16", 8))
SPEED_UP = 30


def guided_by_gradients(model: TokenMixupModel) -> TokenMixupModel:
    """The same host with `GradientSaliency`; the given model must not be used any more."""
    return attach(model.detach(), horizontal=model.horizontal, rules=GradientSaliency())


def attention_saliency_of(model: TokenMixupModel, images: Tensor) -> Callable[[], Tensor]:
    """A function that computes the saliency at the layer that mixes, from its input tokens."""
    assert model.horizontal is not None
    layout, adapter = model.layout, model.adapter
    layer = adapter.layers(model.backbone)[model.horizontal.layers[0]]
    seen: list[Tensor] = []
    handle = layer.register_forward_pre_hook(lambda _, args: seen.append(args[0].detach()))
    with torch.no_grad():
        model.backbone(images)
    handle.remove()
    return lambda: input_saliency(adapter, layout, layer, seen[0], (), {})


def measure(settings: Settings) -> dict[str, Any]:
    """The saliency, then whole HTM steps, in both ways in turn."""
    workloads = sized(WORKLOADS, settings.quick)
    return {"models": [_model(settings, workload) for workload in workloads]}


def _model(settings: Settings, workload: Workload) -> dict[str, Any]:
    attention = Steps(workload, "HTM")
    model = attention.learner.model
    images, soft = attention.learner.mixer(attention.images.clone(), attention.labels, 0, 0, 0)
    obtaining = interleaved(
        {
            "attention": attention_saliency_of(model, images),
            "gradients": lambda: gradient_saliency(model, images, soft),
        },
        settings.rounds(5),
    )
    gradients = Steps(workload, "HTM", wrap=guided_by_gradients)
    whole, _ = time_steps({"attention": attention, "gradients": gradients}, settings.rounds(5))
    return {
        "model": workload.model,
        "batch": workload.batch,
        "obtaining": recorded(obtaining),
        "speed_up": ratio(obtaining["gradients"], obtaining["attention"]),
        "steps": recorded(whole),
        "step_ratio": ratio(whole["gradients"], whole["attention"]),
    }


def tables(values: dict[str, Any]) -> str:
    """One line per model."""
    rows = [
        [
            f"{model['model']}, B={model['batch']}",
            milliseconds(model["obtaining"]["gradients"]),
            milliseconds(model["obtaining"]["attention"]),
            times(model["speed_up"], 1),
            milliseconds(model["steps"]["gradients"]),
            milliseconds(model["steps"]["attention"]),
            times(model["step_ratio"]),
        ]
        for model in values["models"]
    ]
    head = (
        *("model", "saliency by gradients (ms)", "by attention (ms)", "times faster (95%)"),
        *("HTM step by gradients (ms)", "by attention (ms)", "times faster (95%)"),
    )
    return aligned_table(head, rows, range(1, 7))


def targets(values: dict[str, Any]) -> list[Target]:
    """Computing the saliency, per model."""
    return [
        Target(
            f"4. saliency, {model['model']}, B={model['batch']}",
            f"≥ {SPEED_UP} × faster than by gradients",
            f"{times(model['speed_up'], 1)}; whole step {times(model['step_ratio'])} × faster",
            model["speed_up"]["ratio"] >= SPEED_UP,
        )
        for model in values["models"]
    ]


ROW = Row("saliency", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(row.main(ROW))
