"""Training steps to be timed: the engine's own, on a config of this repository and fixed images.

Dimensions: B batch, C classes.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.timing import Timing, interleaved
from experiments.config import RunConfig, load_config
from experiments.data.augment import BatchMixer
from experiments.data.loading import Division
from experiments.models.build import build_model
from experiments.provenance import ROOT
from experiments.training.distributed import World
from experiments.training.evaluation import memory_format, place
from experiments.training.metrics import Progress, RunningStatistics
from experiments.training.optim import Schedule, build_optimizer
from experiments.training.run import train_step
from experiments.training.step import Learner

CONFIGS = {
    "CCT-7/3×1": {
        "plain": "cct_7-3x1_cifar100_baseline",
        "HTM": "cct_7-3x1_cifar100_HTM",
        "VTM": "cct_7-3x1_cifar100_VTM",
        "HVTM": "cct_7-3x1_cifar100_HVTM",
    },
    "ViT-B/16": {
        "plain": "vit_imagenet_baseline",
        "HTM": "vit_imagenet_HTM",
        "VTM": "vit_imagenet_VTM",
        "HVTM": "vit_imagenet_HVTM",
    },
}
CLASSES = {"CCT-7/3×1": 100, "ViT-B/16": 1000}
_TINY = {"CCT-7/3×1": "cct_2_3x2_32", "ViT-B/16": "vit_tiny_patch16_224"}
_SHARPER = {"CCT-7/3×1": 8.0, "ViT-B/16": 4.0}
"""Factor of the query and key weights, so that untrained maps are as uneven as trained ones are."""


@dataclass(frozen=True)
class Workload:
    """What a step is timed on.

    Attributes:
        model: a key of `CONFIGS`.
        batch: B.
        precision: of the config.
        compile: of the config.
        quick: a tiny model of the same family.
    """

    model: str
    batch: int
    precision: str = "fp32"
    compile: bool = False
    quick: bool = False


def sized(workloads: Sequence[Workload], quick: bool) -> Sequence[Workload]:
    """The workloads, or tiny ones of the same families for a smoke run."""
    return [Workload(w.model, 4, quick=True) for w in workloads] if quick else workloads


def make_config(workload: Workload, variant: str, device: torch.device) -> RunConfig:
    """The repository's config of a variant, with the workload's batch.

    tau is so large that every sample is easy, which costs the most.
    """
    overrides: dict[str, str] = {
        "device": device.type,
        "precision": workload.precision,
        "compile": str(workload.compile).lower(),
        "data.batch_size": str(workload.batch),
        "data.micro_batch": "null",
        "model.weights": "null",
    }
    if workload.quick:
        overrides["model.name"] = _TINY[workload.model]
        overrides["model.image_size"] = "32" if workload.model.startswith("CCT") else "64"
    name = CONFIGS[workload.model][variant]
    config = load_config(ROOT / "configs" / f"{name}.yaml", overrides)
    if config.horizontal is not None:
        layers = (1,) if workload.quick else config.horizontal.layers
        horizontal = dataclasses.replace(config.horizontal, tau=100.0, layers=layers)
        config = dataclasses.replace(config, horizontal=horizontal)
    if config.vertical is not None and workload.quick:
        vertical = dataclasses.replace(config.vertical, layers=(1,), kappa=3)
        config = dataclasses.replace(config, vertical=vertical)
    return config


def make_learner(
    workload: Workload,
    variant: str,
    world: World,
    wrap: Callable[[Any], nn.Module] = lambda model: model,
) -> Learner:
    """The engine's learner of a variant; all variants of a workload start from the same host.

    Args:
        workload: what is trained.
        variant: a key of `CONFIGS[workload.model]`.
        world: the processes.
        wrap: puts another form of the model in its place.
    """
    config = make_config(workload, variant, world.device)
    classes = CLASSES[workload.model]
    model = build_model(config, classes)
    _sharpen(model.backbone, _SHARPER[workload.model])
    place(model, world.device, config)
    wrapped: Any = wrap(model.train())
    wrapped.train()
    optimizer = build_optimizer(config.optimizer, config.schedule, wrapped)
    return Learner(
        config,
        wrapped,
        optimizer,
        Schedule(config.schedule, optimizer, steps_per_epoch=100),
        BatchMixer(config.mixup, classes, config.seed),
        Division(workload.batch, world.rank, 1),
        world,
    )


def _sharpen(host: nn.Module, factor: float) -> None:
    with torch.no_grad():
        for name, parameter in host.named_parameters():
            if name.endswith("attn.qkv.weight"):
                parameter[: 2 * parameter.shape[0] // 3] *= factor  # queries and keys


def make_batch(workload: Workload, config: RunConfig, device: torch.device) -> tuple[Tensor, Any]:
    """Fixed images (B, 3, S, S), normal noise, and labels (B,)."""
    generator = torch.Generator().manual_seed(0)
    side = config.model.image_size
    images = torch.randn(workload.batch, 3, side, side, generator=generator)
    labels = torch.randint(CLASSES[workload.model], (workload.batch,), generator=generator)
    moved = images.to(device=device, memory_format=memory_format(config))
    return moved, labels.to(device)


class Steps:
    """Consecutive steps of a learner on one batch; each call trains one."""

    def __init__(self, workload: Workload, learner: Learner) -> None:
        self.learner = learner
        self.images, self.labels = make_batch(workload, learner.config, learner.device)
        self.progress = Progress()
        self.statistics = RunningStatistics(learner.device)

    def __call__(self) -> None:
        self.learner.schedule.set_step(self.progress.step)
        train_step(self.learner, self.images, self.labels, self.progress, self.statistics)

    def measured(self) -> dict[str, float]:
        """The statistics of the steps since the last call; waits for the device."""
        return self.statistics.read(self.learner.world)

    def mixing(self) -> dict[str, float]:
        """How much these steps mixed: the statistics of HTM, by the last part of their name."""
        return {
            name.rpartition("/")[2]: value
            for name, value in self.measured().items()
            if name.startswith("htm/")
        }


def time_steps(
    steps: Mapping[str, Steps], rounds: int, warm_up: int = 1
) -> tuple[dict[str, Timing], dict[str, dict[str, float]]]:
    """Time steps in turn, and tell how much each of them mixed.

    Raises:
        RuntimeError: HTM mixed less than a tenth of the samples, so that its time says nothing.
    """
    timings = interleaved(steps, rounds, warm_up=warm_up)
    mixing = {name: step.mixing() for name, step in steps.items()}
    for name, found in mixing.items():
        if found and found["mixed_share"] < 0.1:
            raise RuntimeError(f"{name}: HTM mixed {found['mixed_share']:.0%} of the samples")
    return timings, mixing
