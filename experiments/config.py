"""What an experiment is: typed sections, each value checked where the field is born.

`experiments.config_file` reads them from YAML and from the command line.
"""

import dataclasses
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from experiments.checks import choice, flag, integer, interval, number, numbers, text
from experiments.errors import FieldError
from experiments.strict_yaml import is_plain_argument
from tokenmixup.config import HorizontalConfig, VerticalConfig

Device = Literal["auto", "cpu", "cuda"]
Precision = Literal["fp32", "bf16", "fp16"]
Interpolation = Literal["bilinear", "bicubic"]
TrainInterpolation = Literal["bilinear", "bicubic", "random"]


@dataclass(frozen=True)
class ModelConfig:
    """The host model, as `timm.create_model` builds it."""

    name: str = "cct_7_3x1_32"
    """Name of a model that timm knows, or one of this project's CCTs."""
    num_classes: int | None = None
    """Number of classes; null takes the data set's."""
    image_size: int = 32
    """Height and width of the images in pixels."""
    drop_rate: float | None = None
    """Dropout probability; null keeps the model's own."""
    attn_drop_rate: float | None = None
    """Dropout probability of the attention map; null keeps the model's own."""
    drop_path_rate: float | None = None
    """Stochastic depth at the last layer; null keeps the model's own."""
    mlp_drop_rate: float | None = None
    """Dropout probability inside the MLPs alone; timm's ViT has no argument for it."""
    weights: str | None = None
    """File of weights to start from: any kind that `experiments.evaluate` takes."""
    new_head: bool = False
    """Leave the classifier and the ScoreNets of `weights` out, for a data set of other classes."""
    kwargs: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the model's constructor."""

    def __post_init__(self) -> None:
        text(self, "name")
        integer(self, "num_classes", low=2, optional=True)
        integer(self, "image_size", low=1)
        text(self, "weights", optional=True)
        flag(self, "new_head")
        if self.new_head and self.weights is None:
            raise FieldError("new_head", True, "false without weights to start from")
        for name in ("drop_rate", "attn_drop_rate", "drop_path_rate", "mlp_drop_rate"):
            number(self, name, low=0, below=1, optional=True)
        if not isinstance(self.kwargs, dict):
            raise FieldError("kwargs", self.kwargs, "names with values")
        if not is_plain_argument(self.kwargs):
            raise FieldError("kwargs", self.kwargs, "names with finite, plain values")
        taken = {"num_classes", "img_size", "drop_rate", "attn_drop_rate", "drop_path_rate"}
        clash = sorted(taken.intersection(self.kwargs))
        if clash:
            raise FieldError("kwargs", clash[0], "arguments that have no field of their own")


@dataclass(frozen=True)
class DataConfig:
    """The images, how they are read and how they are augmented (timm's names)."""

    dataset: str = "digits"
    """digits, or a name of timm's create_dataset: torch/cifar100, torch/fashion_mnist, hfds/NAME,
    wds/NAME for WebDataset shards, "" for folders of images or one tar file a split."""
    root: str = "data"
    """Folder that holds the data set; digits needs none."""
    train_split: str = "train"
    """Split that is trained on; train[:10000] is its first 10,000 images in the data set's order,
    train[50000:60000] a part further on."""
    val_split: str = "validation"
    """Split that is evaluated; a part of one is written as for train_split."""
    download: bool = True
    """Fetch a missing data set where torchvision can."""
    batch_size: int = 128
    """Images an optimiser step, over all processes; an incomplete last batch is left out."""
    micro_batch: int | None = None
    """Images of one forward pass in one process, within which HTM finds partners. A batch is
    divided into such parts, and each process computes its share of them one after another, so that
    results do not depend on the number of processes. null: each process's share at once."""
    eval_batch_size: int | None = None
    """Images a batch in evaluation; null takes batch_size."""
    workers: int = 2
    """Data-loader processes; 0 loads in the main process. Results do not depend on it."""
    max_bad_images: int = 0
    """Training images of one process that may turn out unreadable: each is named and counted, and
    another one, drawn from (seed, epoch, index), takes its place. In evaluation there is none."""
    mean: tuple[float, float, float] | None = None
    """Mean of each channel; null takes the data set's, or ImageNet's for an unknown one."""
    std: tuple[float, float, float] | None = None
    """Standard deviation of each channel; null as for mean."""
    interpolation: Interpolation = "bicubic"
    """Resizing in evaluation."""
    crop_pct: float = 1.0
    """Share of the resized image that evaluation keeps."""
    train_interpolation: TrainInterpolation = "random"
    """Resizing in training; random chooses between bilinear and bicubic."""
    scale: tuple[float, float] = (0.08, 1.0)
    """Area range of the random resized crop."""
    ratio: tuple[float, float] = (0.75, 1.3333333333333333)
    """Aspect-ratio range of the random resized crop."""
    hflip: float = 0.5
    """Probability of a horizontal flip."""
    vflip: float = 0.0
    """Probability of a vertical flip."""
    color_jitter: float = 0.4
    """Strength of the colour jitter; timm leaves it out when auto_augment is given."""
    auto_augment: str | None = None
    """timm's augmentation policy, such as rand-m9-mstd0.5-inc1."""
    re_prob: float = 0.0
    """Probability of random erasing."""
    re_mode: Literal["const", "rand", "pixel"] = "pixel"
    """What random erasing writes."""
    re_count: int = 1
    """Largest number of erased rectangles an image."""

    def __post_init__(self) -> None:
        text(self, "dataset", empty=True)
        for name in ("root", "train_split", "val_split"):
            text(self, name)
        flag(self, "download")
        integer(self, "batch_size", low=1)
        integer(self, "micro_batch", low=1, optional=True)
        if self.micro_batch is not None and self.batch_size % self.micro_batch:
            allowed = f"a divisor of data.batch_size, which is {self.batch_size}"
            raise FieldError("micro_batch", self.micro_batch, allowed)
        integer(self, "eval_batch_size", low=1, optional=True)
        integer(self, "workers", low=0, high=1024)
        integer(self, "max_bad_images", low=0)
        numbers(self, "mean", count=3, optional=True)
        numbers(self, "std", count=3, above=0, optional=True)
        choice(self, "interpolation", get_args(Interpolation))
        number(self, "crop_pct", above=0, high=1)
        choice(self, "train_interpolation", get_args(TrainInterpolation))
        interval(self, "scale", high=1)
        interval(self, "ratio")
        for name in ("hflip", "vflip", "re_prob"):
            number(self, name, low=0, high=1)
        number(self, "color_jitter", low=0)
        text(self, "auto_augment", optional=True)
        choice(self, "re_mode", ("const", "rand", "pixel"))
        integer(self, "re_count", low=1)


@dataclass(frozen=True)
class MixupConfig:
    """Mixup and CutMix of whole images before the model, by timm's Mixup, and label smoothing."""

    mixup_alpha: float = 0.0
    """Parameter of Mixup's Beta distribution; 0 switches Mixup off."""
    cutmix_alpha: float = 0.0
    """Parameter of CutMix's Beta distribution; 0 switches CutMix off."""
    prob: float = 1.0
    """Probability that a batch is mixed."""
    switch_prob: float = 0.5
    """Probability of CutMix where both are on."""
    mode: Literal["batch", "pair", "elem"] = "batch"
    """Draw the parameters once a batch, a pair or an element."""
    label_smoothing: float = 0.0
    """Share of the target that is spread over all classes."""

    def __post_init__(self) -> None:
        for name in ("mixup_alpha", "cutmix_alpha"):
            number(self, name, low=0)
        for name in ("prob", "switch_prob"):
            number(self, name, low=0, high=1)
        choice(self, "mode", ("batch", "pair", "elem"))
        number(self, "label_smoothing", low=0, below=1)

    @property
    def active(self) -> bool:
        """Whether images are mixed at all."""
        return self.prob > 0 and (self.mixup_alpha > 0 or self.cutmix_alpha > 0)


@dataclass(frozen=True)
class OptimizerConfig:
    """The optimiser, by timm's create_optimizer_v2."""

    name: str = "adamw"
    """Name of an optimiser that timm knows."""
    weight_decay: float = 0.05
    """Weight decay of weights; biases and norms have none."""
    momentum: float | None = None
    """Momentum, for an optimiser that has one; null is timm's 0.9."""
    betas: tuple[float, float] | None = None
    """Betas, for an optimiser that has them; null keeps its own."""
    eps: float | None = None
    """Epsilon, for an optimiser that has one; null keeps its own."""
    clip_grad: float | None = None
    """Largest norm of the gradient; null does not clip."""

    def __post_init__(self) -> None:
        text(self, "name")
        number(self, "weight_decay", low=0)
        number(self, "momentum", low=0, below=1, optional=True)
        numbers(self, "betas", count=2, low=0, below=1, optional=True)
        number(self, "eps", above=0, optional=True)
        number(self, "clip_grad", above=0, optional=True)


@dataclass(frozen=True)
class ScheduleConfig:
    """How long training lasts and how the learning rate goes, by timm's scheduler factory."""

    name: Literal["cosine", "constant"] = "cosine"
    """Shape after the warm-up."""
    epochs: int = 300
    """Epochs of the schedule, warm-up included, cool-down not."""
    warmup_epochs: int = 0
    """Epochs of linear warm-up."""
    cooldown_epochs: int = 0
    """Epochs at min_lr after the cosine."""
    lr: float = 5e-4
    """Learning rate after the warm-up."""
    min_lr: float = 0.0
    """Learning rate at the end of the cosine."""
    warmup_lr: float = 1e-6
    """Learning rate at the start of the warm-up."""
    interval: Literal["epoch", "step"] = "epoch"
    """How often the learning rate changes: at each epoch, as timm does, or at each step."""

    def __post_init__(self) -> None:
        choice(self, "name", ("cosine", "constant"))
        integer(self, "epochs", low=1)
        integer(self, "warmup_epochs", low=0)
        integer(self, "cooldown_epochs", low=0)
        number(self, "lr", above=0)
        number(self, "min_lr", low=0)
        number(self, "warmup_lr", low=0)
        choice(self, "interval", ("epoch", "step"))
        if self.name == "constant":
            for name in ("cooldown_epochs", "min_lr"):
                if getattr(self, name) != 0:
                    raise FieldError(name, getattr(self, name), "0 for the constant schedule")

    @property
    def total_epochs(self) -> int:
        """Epochs that are trained, the cool-down included."""
        return self.epochs + self.cooldown_epochs


@dataclass(frozen=True)
class LoggingConfig:
    """What a run reports, and how often."""

    interval: int = 50
    """Optimiser steps between two rows of metrics; the device is asked only then."""
    evaluate_every: int = 1
    """Epochs between two evaluations; the last epoch is always evaluated."""
    tensorboard: bool = True
    """Write TensorBoard scalars."""

    def __post_init__(self) -> None:
        integer(self, "interval", low=1)
        integer(self, "evaluate_every", low=1)
        flag(self, "tensorboard")


@dataclass(frozen=True)
class CheckpointConfig:
    """When a run is saved."""

    every: int = 1
    """Epochs between two checkpoints; the last epoch is always saved."""
    every_steps: int | None = None
    """Optimiser steps between two further checkpoints within an epoch; null makes none."""
    keep: int = 3
    """How many of the newest checkpoints stay, besides the best."""

    def __post_init__(self) -> None:
        integer(self, "every", low=1)
        integer(self, "every_steps", low=1, optional=True)
        integer(self, "keep", low=2)  # one to fall back to


@dataclass(frozen=True)
class RunConfig:
    """One experiment."""

    seed: int = 42
    """Everything random is a function of it."""
    device: Device = "auto"
    """cpu, cuda, or auto: cuda where there is one."""
    precision: Precision = "fp32"
    """Of training: fp32, or mixed precision in bf16 or fp16."""
    eval_precision: Precision = "fp32"
    """Of evaluation."""
    compile: bool = False
    """Compile the model with torch.compile."""
    channels_last: bool = False
    """Keep images and convolutions in the memory format that is often faster for them."""
    on_nonfinite: Literal["stop", "skip"] = "stop"
    """A loss or gradient that is not finite stops the run; or its step is left out and counted,
    which costs one exchange with the device a step."""
    skip_limit: int = 10
    """Steps that may be left out so over the whole run."""
    timeout_minutes: float = 10.0
    """How long a process waits for the others before it takes them for lost."""
    output: str | None = None
    """Run folder; null is output/NAME for a config file NAME.yaml."""
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    mixup: MixupConfig = field(default_factory=MixupConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    horizontal: HorizontalConfig | None = None
    vertical: VerticalConfig | None = None
    logging: LoggingConfig = field(default_factory=LoggingConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        integer(self, "seed", low=0, high=2**63 - 1)
        choice(self, "device", get_args(Device))
        choice(self, "precision", get_args(Precision))
        choice(self, "eval_precision", get_args(Precision))
        flag(self, "compile")
        flag(self, "channels_last")
        choice(self, "on_nonfinite", ("stop", "skip"))
        integer(self, "skip_limit", low=0)
        number(self, "timeout_minutes", above=0)
        text(self, "output", optional=True)
        name = "batch_size" if self.data.micro_batch is None else "micro_batch"
        images = getattr(self.data, name)
        if self.mixup.active and images % 2:
            raise FieldError(f"data.{name}", images, "for Mixup and CutMix, an even number")


def as_plain(config: Any) -> Any:
    """The same values as dicts, lists and plain types, for YAML, JSON and checkpoints."""
    if dataclasses.is_dataclass(config):
        return {f.name: as_plain(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        return {key: as_plain(value) for key, value in config.items()}
    if isinstance(config, (tuple, list)):
        return [as_plain(value) for value in config]
    return config


def dotted_keys(plain: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """What `as_plain` gave as `section.key` -> value; an absent section is one key with None."""
    flat: dict[str, Any] = {}
    for key, value in plain.items():
        if isinstance(value, dict):
            flat.update(dotted_keys(value, f"{prefix}{key}."))
        else:
            flat[prefix + key] = value
    return flat
