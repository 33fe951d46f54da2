"""What an experiment is: typed sections, with what each value may be.

This is the one place where a config's values are checked.
"""

import json
from collections.abc import Mapping
from dataclasses import field
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, ConfigDict, Field, TypeAdapter
from pydantic.dataclasses import dataclass

from experiments.errors import FieldError
from tokenmixup.config import HorizontalConfig, VerticalConfig


def _rising(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[0] > pair[1]:
        raise ValueError("the larger number comes first")
    return pair


def _as_word(value: Any) -> Any:
    if isinstance(value, bool):  # as files of earlier versions have it
        return "on" if value else "off"
    return value


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    json.dumps(values, allow_nan=False)  # a ValueError for nan and infinity
    return values


_STRICT = ConfigDict(strict=True, allow_inf_nan=False, use_attribute_docstrings=True)
_INT = 2**31 - 1
_LONGEST_TEXT = 4096  # as long as a path may be
# Types of values. Text among the annotations says what is allowed where the bounds do not.
Text = Annotated[
    str,
    Field(min_length=1, max_length=_LONGEST_TEXT, pattern=r"^[^\x00]+$"),
    f"text of 1 to {_LONGEST_TEXT} characters",
]
Name = Annotated[
    str,
    Field(max_length=_LONGEST_TEXT, pattern=r"^[^\x00]*$"),
    f"text of up to {_LONGEST_TEXT} characters",
]
Whole = Annotated[int, Field(ge=0, le=_INT)]
Count = Annotated[int, Field(ge=1, le=_INT)]
NotNegative = Annotated[float, Field(ge=0)]
Positive = Annotated[float, Field(gt=0)]
Probability = Annotated[float, Field(ge=0, le=1)]
Rate = Annotated[float, Field(ge=0, lt=1)]
Share = Annotated[float, Field(gt=0, le=1)]
Shares = Annotated[
    tuple[Share, Share],
    AfterValidator(_rising),
    "a list of 2 numbers above 0 up to 1, the smaller first",
]
Ratios = Annotated[
    tuple[Positive, Positive],
    AfterValidator(_rising),
    "a list of 2 finite numbers above 0, the smaller first",
]
Arguments = Annotated[dict[str, Any], AfterValidator(_finite), "names with finite, plain values"]
Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]
Compile = Annotated[Literal["off", "on", "graphs", "auto"], BeforeValidator(_as_word)]
EvalPrecision = Literal["fp32", "tf32", "bf16", "fp16"]


@dataclass(frozen=True, config=_STRICT)
class ModelConfig:
    """The host model, built by `timm.create_model`."""

    name: Text = "cct_7_3x1_32"
    """Name of a model that timm knows, or one of this project's CCTs."""
    num_classes: Annotated[int, Field(ge=2, le=_INT)] | None = None
    """Number of classes; null takes the data set's."""
    image_size: Count = 32
    """Height and width of the images in pixels."""
    drop_rate: Rate | None = None
    """Dropout probability; null keeps the model's own."""
    attn_drop_rate: Rate | None = None
    """Dropout probability of the attention map; null keeps the model's own."""
    drop_path_rate: Rate | None = None
    """Stochastic depth at the last layer; null keeps the model's own."""
    mlp_drop_rate: Rate | None = None
    """Dropout probability inside the MLPs only; timm's ViT has no argument for it."""
    weights: Text | None = None
    """File of weights to start from, of any kind that `experiments.evaluate` takes."""
    new_head: bool = False
    """Do not load the classifier and the ScoreNets of `weights`, for a data set of other
    classes."""
    kwargs: Arguments = field(default_factory=dict)
    """Further arguments of the model's constructor."""

    def __post_init__(self) -> None:
        if self.new_head and self.weights is None:
            raise FieldError("new_head", True, "false without weights to start from")
        own_fields = {"num_classes", "img_size", "drop_rate", "attn_drop_rate", "drop_path_rate"}
        clash = sorted(own_fields.intersection(self.kwargs))
        if clash:
            raise FieldError("kwargs", clash[0], "arguments that have no field of their own")


@dataclass(frozen=True, config=_STRICT)
class DataConfig:
    """The images, how they are read and how they are augmented (timm's names)."""

    dataset: Name = "digits"
    """digits, or a name of timm's create_dataset: torch/cifar100, torch/fashion_mnist, hfds/NAME,
    wds/NAME for WebDataset shards, "" for folders of images or one tar file per split."""
    root: Text = "data"
    """Folder that holds the data set; digits needs none."""
    train_split: Text = "train"
    """Training split; train[:10000] is its first 10,000 images in the data set's order,
    train[50000:60000] a later part."""
    per_class: Count | None = None
    """Images of each class, drawn by the seed from train_split; null takes all of the split."""
    val_split: Text = "validation"
    """Validation split, of the same classes and of other images; parts are written as for
    train_split."""
    download: bool = True
    """Download a missing data set where torchvision can."""
    batch_size: Count = 128
    """Images per optimiser step, over all processes; an incomplete last batch is dropped."""
    micro_batch: Count | None = None
    """Images per forward pass in one process, within which HTM finds partners. A batch is divided
    into micro-batches, and each process computes its share of them one after another, so that
    results do not depend on the number of processes. null: each process's share at once."""
    eval_batch_size: Count | None = None
    """Images per batch in evaluation; null takes batch_size."""
    workers: Annotated[int, Field(ge=0, le=1024)] = 2
    """Data-loader processes; 0 loads in the main process. Results do not depend on it."""
    max_bad_images: Whole = 0
    """Unreadable training images that one process tolerates: each is named and counted, and another
    image, drawn from (seed, epoch, index), takes its place. Evaluation tolerates none."""
    mean: tuple[float, float, float] | None = None
    """Mean of each channel; null takes the data set's, or ImageNet's for an unknown one."""
    std: tuple[Positive, Positive, Positive] | None = None
    """Standard deviation of each channel; null as for mean."""
    interpolation: Literal["bilinear", "bicubic"] = "bicubic"
    """Resizing in evaluation."""
    crop_pct: Share = 1.0
    """Share of the resized image that evaluation keeps."""
    train_interpolation: Literal["bilinear", "bicubic", "random"] = "random"
    """Resizing in training; random chooses between bilinear and bicubic."""
    scale: Shares = (0.08, 1.0)
    """Area range of the random resized crop."""
    ratio: Ratios = (0.75, 1.3333333333333333)
    """Aspect-ratio range of the random resized crop."""
    hflip: Probability = 0.5
    """Probability of a horizontal flip."""
    vflip: Probability = 0.0
    """Probability of a vertical flip."""
    color_jitter: NotNegative = 0.4
    """Strength of the colour jitter; timm drops it when auto_augment is given."""
    auto_augment: Text | None = None
    """timm's augmentation policy, such as rand-m9-mstd0.5-inc1."""
    re_prob: Probability = 0.0
    """Probability of random erasing."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    """What random erasing writes."""
    re_count: Count = 1
    """Largest number of erased rectangles per image."""

    def __post_init__(self) -> None:
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            allowed = f"a divisor of data.batch_size, which is {self.batch_size}"
            raise FieldError("micro_batch", self.micro_batch, allowed)


@dataclass(frozen=True, config=_STRICT)
class MixupConfig:
    """Mixup and CutMix of whole images before the model, by timm's Mixup, and label smoothing."""

    mixup_alpha: NotNegative = 0.0
    """Parameter of Mixup's Beta distribution; 0 switches Mixup off."""
    cutmix_alpha: NotNegative = 0.0
    """Parameter of CutMix's Beta distribution; 0 switches CutMix off."""
    prob: Probability = 1.0
    """Probability that a batch is mixed."""
    switch_prob: Probability = 0.5
    """Probability of CutMix where both are on."""
    mode: Literal["batch", "pair", "elem"] = "batch"
    """Draw the parameters once per batch, per pair or per element."""
    label_smoothing: Rate = 0.0
    """Share of the target that is spread over all classes."""
    off_epoch: Count | None = None
    """Mixup and CutMix are on for this many epochs, and off after them, label smoothing excepted;
    null: on to the end."""

    def __post_init__(self) -> None:
        if self.off_epoch is not None and not self.active:
            raise FieldError("off_epoch", self.off_epoch, "null where Mixup and CutMix are off")

    @property
    def active(self) -> bool:
        """Whether images are mixed at all."""
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


@dataclass(frozen=True, config=_STRICT)
class OptimizerConfig:
    """The optimiser, by timm's create_optimizer_v2."""

    name: Text = "adamw"
    """Name of an optimiser that timm knows."""
    weight_decay: NotNegative = 0.05
    """Weight decay of weights; biases and norms have none."""
    momentum: Rate | None = None
    """Momentum, for an optimiser that has one; null is timm's 0.9."""
    betas: tuple[Rate, Rate] | None = None
    """Betas, for an optimiser that has them; null keeps its own."""
    eps: Positive | None = None
    """Epsilon, for an optimiser that has one; null keeps its own."""
    clip_grad: Positive | None = None
    """Largest norm of the gradient; null does not clip."""


@dataclass(frozen=True, config=_STRICT)
class ScheduleConfig:
    """How long training lasts and how the learning rate changes, by timm's scheduler factory."""

    name: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    epochs: Count = 300
    """Epochs of the schedule, including the warm-up, excluding the cool-down."""
    warmup_epochs: Whole = 0
    """Epochs of linear warm-up."""
    cooldown_epochs: Whole = 0
    """Epochs at min_lr after the cosine."""
    lr: Positive = 5e-4
    """Learning rate after the warm-up."""
    min_lr: NotNegative = 0.0
    """Learning rate at the end of the cosine."""
    warmup_lr: NotNegative = 1e-6
    """Learning rate at the start of the warm-up."""
    interval: Literal["epoch", "step"] = "epoch"
    """How often the learning rate changes: at each epoch, as in timm, or at each step."""

    def __post_init__(self) -> None:
        if self.name == "constant":
            for name in ("cooldown_epochs", "min_lr"):
                if getattr(self, name) != 0:
                    raise FieldError(name, getattr(self, name), "0 for the constant schedule")

    @property
    def total_epochs(self) -> int:
        """Epochs of the training, including the cool-down."""
        return self.epochs + self.cooldown_epochs


@dataclass(frozen=True, config=_STRICT)
class LoggingConfig:
    """What a run reports, and how often."""

    interval: Count = 50
    """Optimiser steps between two rows of metrics; only then is the device synchronised."""
    evaluate_every: Count = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    tensorboard: bool = True
    """Write TensorBoard scalars."""


@dataclass(frozen=True, config=_STRICT)
class CheckpointConfig:
    """When a run is saved."""

    every: Count = 1
    """Epochs between two checkpoints; the last epoch is always saved."""
    every_steps: Count | None = None
    """Optimiser steps between two further checkpoints within an epoch; null makes none."""
    keep: Annotated[int, Field(ge=2, le=_INT)] = 3  # one to fall back to
    """How many of the newest checkpoints are kept, besides the best."""


@dataclass(frozen=True, config=_STRICT)
class RunConfig:
    """One experiment."""

    seed: Annotated[int, Field(ge=0, le=2**63 - 1)] = 42
    """Everything random is a function of it."""
    device: Device = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    precision: Precision = "fp32"
    """Of training: fp32, or mixed precision in bf16 or fp16."""
    eval_precision: EvalPrecision = "fp32"
    """Of evaluation: fp32, as every figure in the documents; on a GPU tf32, which rounds the
    factors of products in float32; or mixed precision in bf16 or fp16. It is recorded with each
    figure."""
    compile: Compile = "off"
    """Compile forward pass, loss and statistics with torch.compile: on; graphs, which also replays
    them as CUDA graphs; auto, which is on with CUDA and off on a CPU."""
    channels_last: bool = False
    """Keep images and convolutions in channels-last memory format, which is often faster."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops the run; or its step is skipped and counted,
    which costs one device synchronisation per step."""
    skip_limit: Whole = 10
    """Largest number of skipped steps over the whole run."""
    timeout_minutes: Positive = 10.0
    """How long a process waits for the others before it treats them as lost."""
    output: Text | None = None
    """Run folder; null is output/NAME for a config file NAME.yaml."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mixup: MixupConfig = field(default_factory=MixupConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    horizontal: HorizontalConfig | None = None
    vertical: VerticalConfig | None = None
    tokenmixup_off_epoch: Count | None = None
    """HTM and VTM are on for this many epochs, and off after them; null: on to the end."""
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        name = "batch_size" if self.data.micro_batch is None else "micro_batch"
        images = getattr(self.data, name)
        if self.mixup.active and images % 2:
            raise FieldError(f"data.{name}", images, "for Mixup and CutMix, an even number")
        ends = {
            "tokenmixup_off_epoch": self.tokenmixup_off_epoch,
            "mixup.off_epoch": self.mixup.off_epoch,
        }
        total = self.schedule.total_epochs
        for key, end in ends.items():
            if end is not None and end >= total:
                raise FieldError(key, end, f"null, or less than the training's {total} epochs")
        end = self.tokenmixup_off_epoch
        if end is not None and self.horizontal is None and self.vertical is None:
            raise FieldError("tokenmixup_off_epoch", end, "null without horizontal or vertical")


def is_on(off_epoch: int | None, epoch: int) -> bool:
    """Whether what is off from `off_epoch` on is still on in an epoch; both count from 0."""
    return off_epoch is None or epoch < off_epoch


_PLAIN = TypeAdapter(Any)


def as_plain(config: Any) -> Any:
    """The same values as dicts, lists and plain types, for YAML, JSON and checkpoints."""
    return _PLAIN.dump_python(config, mode="json")


def dotted_keys(plain: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """What `as_plain` gave as `section.key` -> value; an absent section is one key with None."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            flat.update(dotted_keys(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
