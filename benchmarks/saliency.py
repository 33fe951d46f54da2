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
from torch import Tensor, nn

from benchmarks import row
from benchmarks.direct import pixel_gradient_saliency
from benchmarks.row import Row, Settings, Target
from benchmarks.steps import Steps, Workload, make_config, sized, time_steps
from benchmarks.timing import interleaved, milliseconds, ratio, recorded, times
from experiments.documents.markdown import aligned_table
from experiments.models.build import build_model
from experiments.training.distributed import ONE_PROCESS
from tokenmixup import TokenMixupModel, TokenMixupOutput
from tokenmixup.functional import horizontal_mixup, sample_difficulty, soft_cross_entropy
from tokenmixup.hosts.base import input_saliency

WORKLOADS = (Workload("CCT-7/3×1", 128), Workload("ViT-B/16", 8))
SPEED_UP = 30


class GradientGuided(nn.Module):
    """A host with HTM whose saliency comes from input gradients; the rest is the library's.

    It takes over the parameters of a `TokenMixupModel`, which must not be used any more.
    """

    def __init__(self, model: TokenMixupModel) -> None:
        super().__init__()
        assert model.horizontal is not None and model.vertical is None, "HTM alone"
        self.horizontal = model.horizontal
        self.layout = model.layout
        self.scorenets = model.scorenets
        self.layers = model.adapter.layers(model.backbone)
        self.backbone = model.detach()

    def forward(self, images: Tensor, targets: Tensor) -> TokenMixupOutput:
        config, patches = self.horizontal, self.layout.num_patch_tokens
        tau = config.tau
        assert tau is not None and patches is not None
        saliency = pixel_gradient_saliency(self.backbone, images, targets, patches)
        found: dict[str, Any] = {"targets": targets, "loss": 0, "stats": {}}

        def mix(index: int, tokens: Tensor) -> Tensor:
            net = self.scorenets[str(index)]
            logits = net(tokens.detach() if config.scorenet_stop_gradient else tokens)
            losses = soft_cross_entropy(logits, found["targets"])
            easy = sample_difficulty(logits, found["targets"]) <= tau
            prefix = self.layout.num_prefix_tokens
            mixed = horizontal_mixup(tokens, found["targets"], saliency, easy, config.rho, prefix)
            found["loss"] = found["loss"] + config.scorenet_lambda * losses.mean()
            found["targets"] = mixed.targets
            found["stats"][f"htm/layer{index}/mixed_share"] = mixed.mask.any(1).float().mean()
            return mixed.tokens

        handles = []
        for index in config.layers:

            def at_input(_: nn.Module, args: Any, index: int = index) -> Any:
                return (mix(index, args[0]), *args[1:])

            handles.append(self.layers[index].register_forward_pre_hook(at_input))
        try:
            logits = self.backbone(images)
        finally:
            for handle in handles:
                handle.remove()
        return TokenMixupOutput(logits, found["targets"], found["loss"], found["stats"])


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
    """Computing the saliency, then whole HTM steps, in both ways in turn."""
    workloads = sized(WORKLOADS, settings.quick)
    return {"models": [_model(settings, workload) for workload in workloads]}


def _model(settings: Settings, workload: Workload) -> dict[str, Any]:
    attention = Steps(workload, "HTM")
    model = attention.learner.model
    images, soft = attention.learner.mixer(attention.images.clone(), attention.labels, 0, 0, 0)
    plain = make_config(workload, "plain", ONE_PROCESS.device)
    host = build_model(plain, soft.shape[1]).backbone.train()
    patches = model.layout.num_patch_tokens
    assert patches is not None
    obtaining = interleaved(
        {
            "attention": attention_saliency_of(model, images),
            "gradients": lambda: pixel_gradient_saliency(host, images, soft, patches),
        },
        settings.rounds(5),
    )
    gradients = Steps(workload, "HTM", wrap=GradientGuided)
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
