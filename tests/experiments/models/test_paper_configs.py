"""The twelve configs of the paper: their values, and that each builds and takes a real step."""

import pytest
import torch

from experiments.config.reading import load_config
from experiments.data.augment import (
    BatchMixer,
    eval_transform,
    normalisation,
    train_transform,
)
from experiments.data.loading import divide_batch
from experiments.models.build import build_model
from experiments.provenance import ROOT
from experiments.training.distributed import ONE_PROCESS
from experiments.training.evaluation import evaluate
from experiments.training.metrics import Progress, RunningStatistics
from experiments.training.optim import Schedule, build_optimizer
from experiments.training.run import train_step
from experiments.training.step import Learner

VARIANTS = ("baseline", "HTM", "VTM", "HVTM")
CIFAR = [f"cct_7-3x1_{data}_{v}" for data in ("cifar10", "cifar100") for v in VARIANTS]
IMAGENET = [f"vit_imagenet_{v}" for v in VARIANTS]
CLASSES = {"cifar10": 10, "cifar100": 100, "imagenet": 1000}

# HTM layer, tau, rho; VTM layer, kappa: the paper's, config by config
SETTINGS = {
    "cct_7-3x1_cifar10_HTM": ((2, 0.1, 0.003), None),
    "cct_7-3x1_cifar10_VTM": (None, (1, 5)),
    "cct_7-3x1_cifar10_HVTM": ((2, 0.1, 0.004), (3, 3)),
    "cct_7-3x1_cifar100_HTM": ((2, 0.2, 0.005), None),
    "cct_7-3x1_cifar100_VTM": (None, (2, 80)),
    "cct_7-3x1_cifar100_HVTM": ((3, 0.2, 0.005), (2, 3)),
    "vit_imagenet_HTM": ((3, 0.1, 0.01), None),
    "vit_imagenet_VTM": (None, (3, 3)),
    "vit_imagenet_HVTM": ((3, 0.1, 0.01), (4, 3)),
}
VIT_PARAMETERS = 86_567_656
SCORENET = {"cifar10": 257 + 2570, "cifar100": 257 + 25_700, "imagenet": 769_000}
PLAIN = {"cifar10": 3_760_139, "cifar100": 3_783_269, "imagenet": VIT_PARAMETERS}


def config_of(name, **overrides):
    path = ROOT / "configs" / f"{name}.yaml"
    return load_config(path, {key.replace("__", "."): str(v) for key, v in overrides.items()})


def data_of(name):
    return "imagenet" if name.startswith("vit") else name.split("_")[2]


def test_these_are_all_the_configs_of_the_paper():
    found = {path.stem for path in (ROOT / "configs").glob("*.yaml")}
    assert set(CIFAR + IMAGENET) == {n for n in found if n.startswith(("cct_7", "vit_imagenet"))}


@pytest.mark.parametrize("name", CIFAR + IMAGENET)
def test_tokenmixup_is_the_papers(name):
    config, data = config_of(name), data_of(name)
    horizontal, vertical = SETTINGS.get(name, (None, None))
    if horizontal is None:
        assert config.horizontal is None
    else:
        htm = config.horizontal
        assert (htm.layers, htm.tau, htm.rho) == ((horizontal[0],), *horizontal[1:])
        head = ("cls", 1.0, True) if data == "imagenet" else ("attention", 0.001, False)
        assert (htm.scorenet, htm.scorenet_lambda, htm.scorenet_stop_gradient) == head
    if vertical is None:
        assert config.vertical is None
    else:
        vtm = config.vertical
        assert (vtm.layers, vtm.kappa, vtm.stop_gradient) == ((vertical[0],), vertical[1], False)


@pytest.mark.parametrize("name", CIFAR)
def test_cifar_recipe(name):
    config, ten = config_of(name), "cifar10_" in name
    assert (config.schedule.epochs, config.schedule.total_epochs) == (1500, 1510)
    assert (config.schedule.lr, config.optimizer.weight_decay, config.schedule.warmup_lr) == (
        (5e-4, 0.05, 1e-5) if ten else (6e-4, 0.06, 1e-6)
    )
    assert (config.schedule.warmup_epochs, config.schedule.min_lr) == (10, 1e-5)
    assert (config.data.batch_size, config.optimizer.name, config.seed) == (128, "adamw", 42)
    mixup = config.mixup
    assert (mixup.mixup_alpha, mixup.cutmix_alpha, mixup.label_smoothing) == (0.8, 1, 0.1)
    assert (mixup.prob, mixup.switch_prob) == (1, 0.5)
    model = config.model
    assert (model.name, model.attn_drop_rate, model.drop_path_rate) == ("cct_7_3x1_32", 0.1, 0.1)
    assert model.drop_rate is None and not model.kwargs
    assert (config.schedule.name, config.schedule.interval) == ("cosine", "epoch")
    assert (config.precision, config.data.dataset) == ("bf16", f"torch/{data_of(name)}")
    steps = repr(train_transform(config.data, 32)).replace("\n", " ")
    for part in (
        "RandomResizedCropAndInterpolation(size=(32, 32), scale=(0.8, 1.0)",
        "interpolation=bilinear bicubic",
        "RandomHorizontalFlip(p=0.5)",
        "RandAugment(n=2",
    ):
        assert part in steps, steps
    assert "ColorJitter" not in steps
    data = config.data
    assert (data.re_prob, data.re_mode, data.re_count) == (0.25, "pixel", 1)
    means = (0.4914, 0.4822, 0.4465) if ten else (0.5071, 0.4867, 0.4408)
    deviations = (0.247, 0.2435, 0.2616) if ten else (0.2675, 0.2565, 0.2761)
    assert normalisation(data) == (means, deviations)


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_recipe(name):
    config = config_of(name)
    schedule, optimizer = config.schedule, config.optimizer
    assert (schedule.name, schedule.lr, schedule.total_epochs) == ("constant", 0.015, 30)
    assert (optimizer.name, optimizer.momentum, optimizer.weight_decay) == ("momentum", 0.9, 0)
    assert (optimizer.clip_grad, config.data.batch_size, config.data.micro_batch) == (1, 504, 126)
    assert not config.mixup.active and config.mixup.label_smoothing == 0
    training = repr(train_transform(config.data, 224)).replace("\n", " ")
    assert "scale=(0.08, 1.0)" in training and "RandomHorizontalFlip(p=0.5)" in training
    assert "ColorJitter(brightness=(0.6, 1.4)" in training and "RandAugment" not in training
    evaluation = repr(eval_transform(config.data, 224)).replace("\n", " ")
    assert "Resize(size=256, interpolation=bicubic" in evaluation
    assert "CenterCrop(size=(224, 224))" in evaluation
    assert normalisation(config.data) == ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
    for size in (1, 2, 4):
        shares = [divide_batch(config.data, rank, size) for rank in range(size)]
        covered = [part for s in shares for part in range(s.first, s.first + s.count)]
        assert covered == [0, 1, 2, 3] and all(s.micro_batch == 126 for s in shares)


def take_a_step(name, batch, size, **overrides):
    config = config_of(name, device="cpu", data__batch_size=batch, **overrides)
    classes = CLASSES[data_of(name)]
    model = build_model(config, classes)
    count = sum(parameter.numel() for parameter in model.parameters())
    extra = SCORENET[data_of(name)] if config.horizontal else 0
    assert count == PLAIN[data_of(name)] + extra
    optimizer = build_optimizer(config.optimizer, config.schedule, model)
    learner = Learner(
        config,
        model,
        optimizer,
        Schedule(config.schedule, optimizer, 10),
        BatchMixer(config.mixup, classes, config.seed),
        divide_batch(config.data, 0, 1),
        ONE_PROCESS,
    )
    images = torch.rand(batch, 3, size, size)
    labels = torch.randint(0, classes, (batch,))
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    learner.schedule.set_step(20)
    statistics = RunningStatistics(learner.device)
    progress = Progress(epochs_done=2, step=20)
    train_step(learner, images, labels, progress, statistics)
    statistics.refuse_not_finite(ONE_PROCESS, progress)
    still = [n for n, p in model.named_parameters() if torch.equal(p, before[n])]
    assert still == []
    found = evaluate(model, [(images, labels)], ONE_PROCESS, config)
    assert found.images == batch and found.loss > 0


@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=[] if n.endswith("_HVTM") else pytest.mark.slow) for n in CIFAR]
)
def test_one_step_at_full_size_cifar(name):
    take_a_step(name, batch=4, size=32)


@pytest.mark.slow
@pytest.mark.parametrize("name", IMAGENET)
def test_one_step_at_full_size_imagenet(name):
    take_a_step(name, batch=2, size=224, data__micro_batch="null")


@pytest.mark.parametrize("name", CIFAR + IMAGENET)
def test_the_head_comment_tells_what_a_person_needs(name):
    text = (ROOT / "configs" / f"{name}.yaml").read_text()  # test_config looks for its command
    assert "Cost: " in text and "Source: " in text


@pytest.mark.parametrize("verb", ["train", "eval"])
@pytest.mark.parametrize("name", [n for n in CIFAR + IMAGENET if not n.endswith("baseline")])
def test_every_launcher_names_its_config(verb, name):
    script = ROOT / "run" / f"{verb}_{name}.sh"
    lines = [line for line in script.read_text().splitlines() if not line.startswith("#")]
    assert len(lines) <= 2 and f" {name} " in lines[-1] and '"$@"' in lines[-1]
    assert (ROOT / "configs" / f"{name}.yaml").exists()
