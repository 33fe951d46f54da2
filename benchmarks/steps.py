"""Rows 2 and 3: a training step with TokenMixup, against the plain step and the direct form.

Each step is the training's own (Mixup and CutMix, forward, loss, backward, gradient norm,
optimiser) with the config's drop rates, in float32. Every sample is easy.

Dimensions: B batch, C classes.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import row
from benchmarks.direct import DirectModel
from benchmarks.row import Row, Settings, Target
from benchmarks.timing import Timing, interleaved, milliseconds, ratio, recorded, times
from experiments.config.reading import load_config
from experiments.config.schema import RunConfig
from experiments.data.augment import BatchMixer
from experiments.data.loading import Division
from experiments.data.transfer import memory_format
from experiments.documents.markdown import aligned_table
from experiments.models.build import build_model
from experiments.provenance import ROOT
from experiments.training.distributed import ONE_PROCESS, World
from experiments.training.evaluation import place
from experiments.training.metrics import Progress, RunningStatistics
from experiments.training.optim import Schedule, build_optimizer
from experiments.training.run import train_step
from experiments.training.step import Learner

VARIANTS = ("plain", "HTM", "VTM", "HVTM")
KAPPA = ", κ = "
"""Stands before another number of remembered tokens than that of the variant's config."""
PLAIN_RATIO = {"CCT-7/3×1": 1.03, "ViT-B/16": 1.01, "Swin-T": 1.03}
BOTH_RATIO = {**PLAIN_RATIO, "CCT-7/3×1": 1.04}
DIRECT_RATIO = 0.8


@dataclass(frozen=True)
class Family:
    """A model with its configs."""

    configs: str  # start of the names of its configs
    classes: int  # C
    gpu_batch: int  # B on a GPU
    tiny: Mapping[str, str]  # what a smoke run changes in them
    sharper: float
    """Factor on the query and key weights: untrained attention maps become as uneven as trained
    ones."""
    other: Mapping[str, str] = field(default_factory=dict)  # what every run changes in them
    variants: Sequence[str] = VARIANTS  # that it has
    direct: bool = True  # whether `DirectModel` takes it

    def config(self, variant: str) -> str:
        """The name of the config of a variant."""
        return f"{self.configs}_{'baseline' if variant == 'plain' else variant.split(KAPPA)[0]}"


FAMILIES = {
    "CCT-7/3×1": Family(
        "cct_7-3x1_cifar100",
        100,
        128,
        {"model.name": "cct_2_3x2_32", "model.image_size": "32"},
        8.0,
        variants=("plain", "HTM", "VTM", f"VTM{KAPPA}3", "HVTM"),  # VTM has 80
    ),
    "ViT-B/16": Family(
        "vit_imagenet",
        1000,
        126,
        {"model.name": "vit_tiny_patch16_224", "model.image_size": "64"},
        4.0,
    ),
    "Swin-T": Family(
        "vit_imagenet",
        1000,
        128,
        {
            "model.image_size": "64",
            "model.kwargs": "{embed_dim: 24, depths: [2, 1], num_heads: [3, 6], window_size: 4}",
            "horizontal.rho": "0.004",  # 1 / T
        },
        16.0,
        {
            "model.name": "swin_tiny_patch4_window7_224",
            "model.mlp_drop_rate": "null",  # timm's own rates, a drop path of 0.1
            "model.kwargs": "{}",
            "horizontal.layers": "[1]",  # the most tokens, in shifted windows
            "horizontal.rho": "0.00032",  # 1 / T
            "horizontal.scorenet": "average",
        },
        ("plain", "HTM"),
        direct=False,
    ),
}


@dataclass(frozen=True)
class Workload:
    """What a step trains on."""

    model: str  # a key of `FAMILIES`
    batch: int  # B
    precision: str = "fp32"
    compile: str = "off"  # of the config
    quick: bool = False  # a tiny model of the same family


WORKLOADS = (Workload("CCT-7/3×1", 32), Workload("ViT-B/16", 8), Workload("Swin-T", 16))


def sized(workloads: Sequence[Workload], quick: bool) -> Sequence[Workload]:
    """The workloads, or tiny ones of the same families for a smoke run."""
    return [Workload(w.model, 4, quick=True) for w in workloads] if quick else workloads


def make_config(workload: Workload, variant: str, device: torch.device) -> RunConfig:
    """The repository's config of a variant, with the workload's batch.

    tau is so large that every sample is easy, which costs the most.
    """
    family = FAMILIES[workload.model]
    overrides: dict[str, str] = {
        "device": device.type,
        "precision": workload.precision,
        "compile": workload.compile,
        "data.batch_size": str(workload.batch),
        "data.micro_batch": "null",
        "model.weights": "null",
        "horizontal.tau": "100.0",
        **family.other,
    }
    if workload.quick:
        overrides |= {"horizontal.layers": "[1]", "vertical.layers": "[1]", "vertical.kappa": "3"}
        overrides |= family.tiny
    if KAPPA in variant:
        overrides["vertical.kappa"] = variant.split(KAPPA)[1]
    there = {"horizontal": "H" in variant, "vertical": "V" in variant}
    overrides = {k: v for k, v in overrides.items() if there.get(k.partition(".")[0], True)}
    return load_config(ROOT / "configs" / f"{family.config(variant)}.yaml", overrides)


class Steps:
    """Consecutive training steps of a variant; each call trains one step on the same batch.

    All variants of a workload start from the same weights. The batch is normal noise.

    Args:
        workload: what to train.
        variant: one of the model's.
        world: the processes.
        wrap: replaces the model by another form of it.
    """

    def __init__(
        self,
        workload: Workload,
        variant: str,
        world: World = ONE_PROCESS,
        wrap: Callable[[Any], nn.Module] = lambda model: model,
    ) -> None:
        config, family = make_config(workload, variant, world.device), FAMILIES[workload.model]
        model = build_model(config, family.classes)
        with torch.no_grad():
            for name, parameter in model.backbone.named_parameters():
                if name.endswith("attn.qkv.weight"):  # queries and keys
                    parameter[: 2 * parameter.shape[0] // 3] *= family.sharper
        place(model, world.device, config)
        wrapped: Any = wrap(model.train())
        wrapped.train()
        optimizer = build_optimizer(config.optimizer, config.schedule, wrapped)
        self.learner = Learner(
            config,
            wrapped,
            optimizer,
            Schedule(config.schedule, optimizer, steps_per_epoch=100),
            BatchMixer(config.mixup, family.classes, config.seed),
            Division(workload.batch, world.rank, 1),
            world,
        )
        generator = torch.Generator().manual_seed(0)
        shape = (workload.batch, 3, config.model.image_size, config.model.image_size)
        images = torch.randn(shape, generator=generator)
        labels = torch.randint(family.classes, shape[:1], generator=generator)
        self.images = images.to(world.device, memory_format=memory_format(config))
        self.labels = labels.to(world.device)
        self.progress = Progress()
        self.statistics = RunningStatistics(world.device)

    def __call__(self) -> None:
        # timm's Mixup writes into the images it is given
        self.train(self.images.clone(), self.labels)

    def train(self, images: Tensor, labels: Tensor) -> None:
        """Train one step; the images are overwritten."""
        self.learner.schedule.set_step(self.progress.step)
        train_step(self.learner, images, labels, self.progress, self.statistics)

    def mixing(self) -> dict[str, float]:
        """Means of HTM's statistics since the last call; waits for the device."""
        means = self.statistics.read(self.learner.world)
        return {k.rpartition("/")[2]: v for k, v in means.items() if k.startswith("htm/")}


def time_steps(
    steps: Mapping[str, Steps], rounds: int, warm_up: int = 1
) -> tuple[dict[str, Timing], dict[str, dict[str, float]]]:
    """Time steps in turn, and return the mixing of each.

    Raises:
        RuntimeError: HTM mixed fewer than a tenth of the samples, so its time means nothing.
    """
    timings = interleaved(steps, rounds, warm_up=warm_up)
    mixing = {name: step.mixing() for name, step in steps.items()}
    for name, found in mixing.items():
        if found and found["mixed_share"] < 0.1:
            raise RuntimeError(f"{name}: HTM mixed {found['mixed_share']:.0%} of the samples")
    return timings, mixing


def measure(settings: Settings) -> dict[str, Any]:
    """Each model: its variants and the direct form of HTM in turn."""
    found: dict[str, Any] = {"models": []}
    for workload in sized(WORKLOADS, settings.quick):
        found["models"].append(_model(workload, settings.rounds(11)))
        settings.keep(found)
    return found


def _model(workload: Workload, rounds: int) -> dict[str, Any]:
    family = FAMILIES[workload.model]
    steps = {name: Steps(workload, name) for name in family.variants}
    if family.direct:
        steps["direct"] = Steps(workload, "HTM", wrap=DirectModel)
    timings, mixing = time_steps(steps, rounds)
    over_plain = {
        name: ratio(timings[name], timings["plain"]) for name in family.variants if name != "plain"
    }
    found: dict[str, Any] = {
        "model": workload.model,
        "batch": workload.batch,
        "steps": recorded({name: timings[name] for name in family.variants}),
        "over_plain": over_plain,
        "mixing": mixing,
    }
    if family.direct:
        found["forms"] = recorded({"direct": timings["direct"]})
        found["over_direct"] = ratio(timings["HTM"], timings["direct"])
    return found


def tables(values: dict[str, Any]) -> str:
    """One line per variant, and one for the direct form."""
    rows = []
    for model in values["models"]:
        name = f"{model['model']}, B={model['batch']}"
        for variant, step in model["steps"].items():
            over = model["over_plain"].get(variant)
            mixed = model["mixing"][variant]
            rows.append(
                [
                    name,
                    variant,
                    milliseconds(step),
                    times(over, 3) if over else "1",
                    f"{100 * mixed['mixed_share']:.0f}%" if mixed else "–",
                    f"{mixed['tokens_mixed']:.1f}" if mixed else "–",
                ]
            )
        if "forms" in model:
            over_direct = f"ours / direct {times(model['over_direct'], 3)}"
            direct = milliseconds(model["forms"]["direct"])
            rows.append([name, "HTM, direct form", direct, over_direct, "", ""])
    head = ("model", "step", "ms", "over plain (95%)", "samples mixed", "tokens mixed per sample")
    return aligned_table(head, rows, range(2, 6))


def targets(values: dict[str, Any]) -> list[Target]:
    """Each variant against the plain step, models that an old record lacks, then the two forms."""
    found, forms = [], []
    for model in values["models"]:
        name = f"{model['model']}, B={model['batch']}"
        for variant, over in model["over_plain"].items():
            limit = (BOTH_RATIO if variant == "HVTM" else PLAIN_RATIO)[model["model"]]
            found.append(row.at_most(f"2. step, {name}, {variant}", over, limit, "plain"))
        if "over_direct" in model:
            over = model["over_direct"]
            forms.append(row.at_most(f"3. HTM step, {name}", over, DIRECT_RATIO, "direct form"))
    measured = {model["model"] for model in values["models"]}
    for workload in WORKLOADS:
        if workload.model not in measured:
            name = f"2. step, {workload.model}, B={workload.batch}, HTM"
            found.append(Target(name, f"≤ {PLAIN_RATIO[workload.model]} × plain", None, False))
    return found + forms


ROW = Row("steps", measure, tables, targets)

if __name__ == "__main__":
    sys.exit(row.main(ROW))
