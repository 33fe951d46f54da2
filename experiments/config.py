"""What an experiment is: typed sections, read from YAML and the command line."""

import dataclasses
import difflib
import functools
import math
import re
import sys
import types
import typing
from argparse import ArgumentError
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import yaml
from jsonargparse import ArgumentParser, Namespace, set_parsing_settings

from experiments.errors import ConfigError, FieldError
from tokenmixup.config import HorizontalConfig, VerticalConfig

_LARGEST_FILE = 1 << 18  # bytes
_LONGEST_TEXT = 4096  # characters, as long as a path may be
_DEEPEST = 16
_LARGEST_NUMBER = 2**63


class _StrictLoader(yaml.SafeLoader):
    """Safe YAML without aliases and tags, and with each key once."""

    _depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            raise _problem("aliases are not allowed", event)
        if getattr(event, "tag", None) not in (None, "!"):
            raise _problem(f"the tag {event.tag!r:.80} is not allowed", event)
        if len(getattr(event, "value", "")) > _LONGEST_TEXT:
            raise _problem(f"a value of more than {_LONGEST_TEXT} characters", event)
        if self._depth > _DEEPEST:
            raise _problem("nested too deeply", event)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        return node

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if not isinstance(key_node, yaml.ScalarNode):
                raise _problem("a key must be plain text", key_node)
            if key_node.value in seen:
                raise _problem(f"the key {key_node.value!r:.80} stands twice", key_node)
            seen.add(key_node.value)
        return super().construct_mapping(node, deep=deep)


# a date is plain text here, and so are `<<` and `=`
_StrictLoader.yaml_implicit_resolvers = {
    first: [
        (tag, pattern)
        for tag, pattern in resolvers
        if tag.rpartition(":")[2] in ("bool", "int", "float", "null")
    ]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}


def _problem(text: str, place: Any) -> yaml.constructor.ConstructorError:
    return yaml.constructor.ConstructorError(None, None, text, place.start_mark)


def read_yaml(path: str | Path) -> Any:
    """The content of a YAML file, as dicts, lists and plain values.

    Raises:
        ConfigError: it cannot be read, is too large, or is no such YAML; with file and line.
    """
    try:
        with Path(path).open("rb") as file:
            content = file.read(_LARGEST_FILE + 1)  # what is named may have no end
        if len(content) > _LARGEST_FILE:
            raise ConfigError(f"{path}: is larger than {_LARGEST_FILE} bytes, so it is no config")
        text = content.decode("utf-8")
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: is not text; a config is a YAML file in UTF-8") from None
    except (OSError, ValueError) as error:  # a path with a null character is a ValueError
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot read the config: {reason}") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, origin: str) -> Any:
    """The same for text that comes from `origin`."""
    try:
        # _StrictLoader is a SafeLoader: it builds plain types alone
        content = yaml.load(text, Loader=_StrictLoader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark is not None else ""
        problem = getattr(error, "problem", None) or str(error)
        raise ConfigError(f"{origin}{line}: {' '.join(problem.split())[:300]}") from None
    except ValueError as error:  # a number of thousands of digits
        raise ConfigError(f"{origin}: cannot read the config: {str(error)[:300]}") from None
    refuse_strange(content, origin)
    return content


def refuse_strange(value: Any, origin: str, depth: int = 0) -> None:
    """Raise a ConfigError unless a value is one that a config can hold.

    Those are null, true and false, numbers of 64 bits, text, and lists and keys with values of
    such: what YAML, JSON and a checkpoint keep as it is.
    """
    if depth > _DEEPEST:
        raise ConfigError(f"{origin}: nested too deeply")
    if value is None or isinstance(value, bool | float):
        return
    if isinstance(value, int):
        if not -_LARGEST_NUMBER <= value < _LARGEST_NUMBER:
            raise ConfigError(f"{origin}: a whole number of more than 64 bits")
    elif isinstance(value, str):
        _refuse_strange_text(value, origin)
    elif isinstance(value, list | tuple):
        for inner in value:
            refuse_strange(inner, origin, depth + 1)
    elif isinstance(value, dict):
        for key, inner in value.items():
            refuse_strange(key, origin, _DEEPEST)
            refuse_strange(inner, origin, depth + 1)
    else:
        raise ConfigError(f"{origin}: a value of the type {type(value).__name__}")


def _refuse_strange_text(text: str, origin: str) -> None:
    if len(text) > _LONGEST_TEXT:
        raise ConfigError(f"{origin}: a value of more than {_LONGEST_TEXT} characters")
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ConfigError(f"{origin}: {text!r:.80}: is not Unicode text") from None


def is_plain_argument(value: Any) -> bool:
    """Whether a value is finite and all its keys are text, so that writing it keeps it."""
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, list | tuple):
        return all(map(is_plain_argument, value))
    if isinstance(value, dict):
        return all(isinstance(k, str) and is_plain_argument(v) for k, v in value.items())
    return value is None or isinstance(value, bool | int | str)


_LARGEST = sys.float_info.max


def text(section: Any, name: str, empty: bool = False, optional: bool = False) -> None:
    value = getattr(section, name)
    if value is None and optional:
        return
    if not isinstance(value, str) or (not value and not empty) or "\0" in value:
        raise FieldError(name, value, "text" if empty else "text that is not empty")


def flag(section: Any, name: str) -> None:
    if not isinstance(getattr(section, name), bool):
        raise FieldError(name, getattr(section, name), "true or false")


def choice(section: Any, name: str, allowed: tuple[str, ...]) -> None:
    if getattr(section, name) not in allowed:
        raise FieldError(name, getattr(section, name), "one of " + ", ".join(allowed))


def integer(
    section: Any,
    name: str,
    low: int,
    high: int = 2**31 - 1,
    optional: bool = False,
) -> None:
    value = getattr(section, name)
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise FieldError(name, value, f"a whole number from {low} to {high}")


def _range_text(low: Any, above: Any, high: Any, below: Any) -> str:
    parts = [
        f"{word} {bound}"
        for word, bound in (("from", low), ("above", above), ("up to", high), ("below", below))
        if bound is not None
    ]
    return " ".join(["a finite number", *parts])


def _in_range(value: Any, low: Any, above: Any, high: Any, below: Any) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return (
        -_LARGEST <= value <= _LARGEST  # neither nan nor a whole number that no float holds
        and (low is None or value >= low)
        and (above is None or value > above)
        and (high is None or value <= high)
        and (below is None or value < below)
    )


def number(
    section: Any,
    name: str,
    low: float | None = None,
    above: float | None = None,
    high: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    value = getattr(section, name)
    if value is None and optional:
        return
    if not _in_range(value, low, above, high, below):
        raise FieldError(name, value, _range_text(low, above, high, below))


def numbers(
    section: Any,
    name: str,
    count: int,
    low: float | None = None,
    above: float | None = None,
    below: float | None = None,
    optional: bool = False,
) -> None:
    values = getattr(section, name)
    if values is None and optional:
        return
    valid = isinstance(values, (tuple, list)) and len(values) == count
    if not valid or not all(_in_range(value, low, above, None, below) for value in values):
        raise FieldError(name, values, f"{count} times {_range_text(low, above, None, below)}")


def interval(section: Any, name: str, high: float | None = None) -> None:
    numbers(section, name, count=2, above=0)
    start, end = getattr(section, name)
    if start > end or (high is not None and end > high):
        limit = "" if high is None else f", the larger up to {high}"
        raise FieldError(name, (start, end), f"the smaller number before the larger{limit}")


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


COMMAND_LINE = "command line"
_FILE_OF_A_SECTION = "Path to a configuration file."
_HELP_COLUMN = 24  # where jsonargparse begins the texts of its help, too
_DECIMAL = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")


@dataclass(frozen=True)
class Setting:
    """A value as it was written, and the file or command line that it comes from."""

    value: Any
    origin: str


@functools.cache
def sections() -> dict[str, type]:
    """The sections of RunConfig: name -> dataclass, the optional ones included."""
    hints = typing.get_type_hints(RunConfig)
    found = {name: _dataclass_in(hint) for name, hint in hints.items()}
    return {name: section for name, section in found.items() if section is not None}


@functools.cache
def optional_sections() -> set[str]:
    """The sections that are absent unless one of their keys is set."""
    hints = typing.get_type_hints(RunConfig)
    return {name for name, section in sections().items() if hints[name] is not section}


@functools.cache
def known_keys() -> dict[str, Any]:
    """Every key that a config may have: `section.field` or `field` -> its type."""
    keys: dict[str, Any] = {}
    for name, hint in typing.get_type_hints(RunConfig).items():
        section = _dataclass_in(hint)
        if section is None:
            keys[name] = hint
        else:
            hints = typing.get_type_hints(section)
            keys.update({f"{name}.{field}": fieldhint for field, fieldhint in hints.items()})
    return keys


def load_config(path: str | Path, overrides: Mapping[str, str] | None = None) -> RunConfig:
    """Read a config file; overrides are `section.key` -> text, as on the command line.

    An optional section is switched off by `horizontal` -> "null".

    Raises:
        ConfigError: file, key, what came and what is allowed, in one line.
    """
    config = build_config(override(read_settings(path), overrides or {}), str(path))
    if config.output is None:
        config = dataclasses.replace(config, output=str(Path("output") / Path(path).stem))
    return config


def read_settings(path: str | Path) -> dict[str, Setting]:
    """The settings of a YAML file under their dotted keys, checked against the known ones."""
    return settings_of(read_yaml(path), str(path))


def settings_of(content: Any, origin: str) -> dict[str, Setting]:
    """The settings in plain values that came from anywhere, such as a checkpoint.

    Raises:
        ConfigError: they are not sections with known keys and values that YAML could hold.
    """
    refuse_strange(content, origin)
    settings: dict[str, Setting] = {}
    if content is None:
        return settings
    if not isinstance(content, dict):
        raise ConfigError(f"{origin}: got {_shown(content)}; allowed: keys with values")
    for name, value in content.items():
        if name not in sections():
            _add(settings, name, value, origin)
            continue
        if value is None:
            continue  # a section that is named and left empty keeps its defaults
        if not isinstance(value, dict):
            known = ", ".join(field.name for field in dataclasses.fields(sections()[name]))
            raise ConfigError(
                f"{origin}: {name}: got {_shown(value)}; allowed: a section with the keys {known}"
            )
        for field, inner in value.items():
            _add(settings, f"{name}.{field}", inner, origin)
    return settings


def _add(settings: dict[str, Setting], key: Any, value: Any, origin: str) -> None:
    _check_key(key, origin)
    if key in settings:  # once as `section.key`, once within the section
        raise ConfigError(f"{origin}: the key {key!r} stands twice")
    settings[key] = Setting(value, origin)


def override(settings: Mapping[str, Setting], overrides: Mapping[str, str]) -> dict[str, Setting]:
    """Settings with what a command line says: `section.key` -> text.

    Raises:
        ConfigError: an unknown key.
    """
    found = dict(settings)
    for key, text in overrides.items():
        if key in optional_sections() and text == "null":
            found = {k: v for k, v in found.items() if not k.startswith(f"{key}.")}
            continue
        _check_key(key, COMMAND_LINE)
        refuse_strange(text, f"{COMMAND_LINE}: {key}")
        found[key] = Setting(text, COMMAND_LINE)
    return found


def build_config(settings: Mapping[str, Setting], file: str) -> RunConfig:
    """Turn settings into typed and checked sections; the file names what has no setting."""
    present = {key.partition(".")[0] for key in settings if "." in key}
    values = _typed(settings, file, present)
    arguments: dict[str, Any] = {}
    for field in dataclasses.fields(RunConfig):
        section = sections().get(field.name)
        if section is None:
            arguments[field.name] = values[field.name]
        elif field.name in present:
            arguments[field.name] = _build(
                section, values[field.name].as_dict(), settings, f"{field.name}.", file
            )
    return _build(RunConfig, arguments, settings, "", file)


def _typed(settings: Mapping[str, Setting], file: str, present: set[str]) -> Namespace:
    """All values in their types, by jsonargparse; defaults where nothing was written."""
    parser = make_parser(frozenset(present & optional_sections()))
    understood = {key: _understood(key, setting) for key, setting in settings.items()}
    ready = {key: value for key, value in understood.items() if isinstance(value, str | dict)}
    try:
        # jsonargparse would read text and the values of a dict as YAML once more
        found = parser.parse_object({k: v for k, v in understood.items() if k not in ready})
        for key, value in ready.items():
            found[key] = value
        return found
    except (ArgumentError, RecursionError) as error:
        message = " ".join(str(error).split())
    missing = message.partition("arguments are required: ")[2]
    if missing:
        raise ConfigError(f"{file}: {missing}: missing; it has no default")
    key = message.partition('Parser key "')[2].partition('"')[0]
    if key not in settings:
        raise ConfigError(f"{file}: {message}")
    raise _wrong(key, settings[key])


def _understood(key: str, setting: Setting) -> Any:
    """A setting's value, with text in it read where something else than text is meant."""
    value, kinds = setting.value, _alternatives(known_keys()[key])
    choices = [
        c
        for kind in kinds
        if typing.get_origin(kind) is typing.Literal
        for c in typing.get_args(kind)
    ]
    if isinstance(value, str):
        if value == "null" and type(None) in kinds:
            return None
        if str in kinds or value in choices:
            return value
        value = _read_text(key, setting, value)
    if isinstance(value, list):
        value = [_read_text(key, setting, v) if isinstance(v, str) else v for v in value]
    takes_keys = any(dict in (kind, typing.get_origin(kind)) for kind in kinds)
    parts = value if isinstance(value, list) else [value]
    if not takes_keys and any(isinstance(part, list | dict) for part in parts):
        raise _wrong(key, setting)
    return value


def _read_text(key: str, setting: Setting, text: str) -> Any:
    """What text stands for: YAML, and decimals such as 1e-3, which YAML takes for text."""
    try:
        value = float(text) if _DECIMAL.fullmatch(text) else parse_yaml(text, setting.origin)
    except ConfigError:
        raise _wrong(key, setting) from None
    if isinstance(value, str):
        raise _wrong(key, setting)
    return value


def _alternatives(hint: Any) -> tuple[Any, ...]:
    """The types of a union, or the one type that it is."""
    is_union = typing.get_origin(hint) in (typing.Union, types.UnionType)
    return typing.get_args(hint) if is_union else (hint,)


def _wrong(key: str, setting: Setting) -> ConfigError:
    return ConfigError(
        f"{setting.origin}: {key}: got {_shown(setting.value)}; "
        f"allowed: {describe(known_keys()[key])}"
    )


def _build(
    section: type, values: dict[str, Any], settings: Mapping[str, Setting], prefix: str, file: str
) -> Any:
    """Make a section; what its own checks refuse becomes an error with file and key."""
    try:
        return section(**values)
    except FieldError as error:
        key = prefix + error.field
        origin = settings[key].origin if key in settings else file
        raise ConfigError(
            f"{origin}: {key}: got {_shown(error.came)}; allowed: {error.allowed}"
        ) from None
    except ValueError as error:
        message = " ".join(str(error).replace(f"{section.__name__}.", prefix).split())
        key = message.split(" ", 1)[0]
        origin = settings[key].origin if key in settings else file
        raise ConfigError(f"{origin}: {message}") from None


@functools.cache
def make_parser(wanted: frozenset[str]) -> ArgumentParser:
    """jsonargparse's parser of a RunConfig, with those optional sections that are wanted."""
    set_parsing_settings(docstring_parse_attribute_docstrings=True)
    parser = ArgumentParser(exit_on_error=False, add_help=False)
    optional = optional_sections()
    parser.add_class_arguments(RunConfig, None, skip=set(optional))
    for name in sorted(wanted):
        parser.add_class_arguments(sections()[name], name)
    return parser


def help_text(usage: str, description: str, options: Mapping[str, str]) -> str:
    """The help of an entry point: its own options, then every key with its default."""
    own = "\n".join(_help_line(f"  {option}", text) for option, text in options.items())
    body = make_parser(frozenset(optional_sections())).format_help().partition("\n\n")[2]
    # jsonargparse offers a file for each section, which the command line here does not
    body = "\n".join(line for line in body.splitlines() if not line.endswith(_FILE_OF_A_SECTION))
    return (
        f"usage: {usage}\n\n{description}\n\n"
        f"options (within a name, - and _ are the same):\n{own}\n\nkeys of the config:\n{body}"
    )


def _help_line(option: str, text: str) -> str:
    """An option and its text in two columns; the text begins a new line where the first is full."""
    if len(option) > _HELP_COLUMN - 2:
        return f"{option}\n{' ' * _HELP_COLUMN}{text}"
    return option.ljust(_HELP_COLUMN) + text


def describe(hint: Any) -> str:
    """A type in words: what a person may write."""
    words = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
    if hint in words:
        return words[hint]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(choice) for choice in arguments)
    if len(_alternatives(hint)) > 1:
        words_of = [describe(argument) for argument in arguments if argument is not type(None)]
        return " or ".join((["null"] if type(None) in arguments else []) + words_of)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each item {describe(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each item {describe(arguments[0])}"
    return "keys with values"


def _check_key(key: Any, origin: str) -> None:
    known = known_keys()
    if key in known:
        return
    if key in sections():
        raise ConfigError(f"{origin}: {key}: is a section; set one of its keys, as {key}.KEY")
    near = nearest(str(key), [*known, *sections()])
    raise ConfigError(f"{origin}: {_shown(key)}: unknown key; {near}")


def nearest(name: str, known: Iterable[str]) -> str:
    """A hint that names the closest of the known names."""
    known = list(known)
    field = name.rpartition(".")[2]
    found = [key for key in known if key.rpartition(".")[2] == field]  # in another section
    found = found or difflib.get_close_matches(name, known, n=1, cutoff=0.4)
    return f"the nearest is {found[0]}" if found else "--help lists the known ones"


def _dataclass_in(hint: Any) -> type | None:
    """The dataclass that a type is, or that it is when it is not None."""
    for candidate in (hint, *typing.get_args(hint)):
        if isinstance(candidate, type) and dataclasses.is_dataclass(candidate):
            return candidate
    return None


def _shown(value: Any) -> str:
    """A value as Python writes it, cut off; plain values alone, whose depth is known."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
