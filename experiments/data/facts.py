"""What is known of a data set and of its classes: mean, deviation, their number and names."""

import re
from dataclasses import dataclass

from experiments.config.schema import DataConfig, RunConfig
from experiments.data.images import Images
from experiments.errors import ConfigError

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Facts:
    """What is known about a data set before it is read."""

    num_classes: int
    mean: tuple[float, float, float]
    std: tuple[float, float, float]


FACTS = {
    # of the training split, grey as three equal channels
    "digits": Facts(10, (0.3054,) * 3, (0.3237,) * 3),
    "torch/cifar10": Facts(10, (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "torch/cifar100": Facts(100, (0.5071, 0.4867, 0.4408), (0.2675, 0.2565, 0.2761)),
    "torch/mnist": Facts(10, (0.1307,) * 3, (0.3081,) * 3),
    "torch/fashion_mnist": Facts(10, (0.2860,) * 3, (0.3530,) * 3),
}


def known_facts(config: DataConfig) -> Facts | None:
    """What is known about the configured data set, whose name may be in any case."""
    return FACTS.get(dataset_name(config))


def dataset_name(config: DataConfig) -> str:
    """The data set's name, as timm reads those of torchvision."""
    return re.sub("^torch/[^/]*/", "torch/", config.dataset.lower())


def known_num_classes(config: RunConfig) -> int | None:
    """The number of classes, where the config alone tells it.

    Raises:
        ConfigError: the config contradicts the data set.
    """
    wanted, facts = config.model.num_classes, known_facts(config.data)
    if facts is not None and wanted not in (None, facts.num_classes):
        raise _wrong_classes(config, facts.num_classes)
    return facts.num_classes if facts is not None else None


def stated_num_classes(config: RunConfig, images: Images) -> int:
    """The number of classes of a data set that has been opened.

    Raises:
        ConfigError: the config contradicts the data set, or neither states it.
    """
    wanted, names = config.model.num_classes, images.class_names
    found = wanted if names is None else len(names)
    if found is None:
        raise ConfigError(
            f"data.dataset: {config.data.dataset!r} does not state its number of classes; "
            "set model.num_classes"
        )
    if wanted not in (None, found):
        raise _wrong_classes(config, found)
    return found


def readable_names(names: tuple[str, ...]) -> tuple[str, ...]:
    """The same names, with words in place of ImageNet's WordNet numbers."""
    if not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return names
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    known = set(info.label_names())
    words = [info.label_name_to_description(n) if n in known else n for n in names]
    return tuple(word.partition(",")[0] for word in words)


def _wrong_classes(config: RunConfig, found: int) -> ConfigError:
    return ConfigError(
        f"model.num_classes: got {config.model.num_classes}; allowed: {found}, as many classes "
        f"as the data set {config.data.dataset!r} has"
    )
