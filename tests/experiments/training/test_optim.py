"""Learning rates and weight-decay groups against independently computed values."""

import math

import pytest
import torch
from torch import nn

from experiments.config.reading import load_config
from experiments.config.schema import OptimizerConfig, ScheduleConfig
from experiments.models.build import build_model
from experiments.provenance import ROOT
from experiments.training.optim import Schedule, build_optimizer
from tests.helpers.runs_helper import HTM, small_config


def schedule_of(config, steps_per_epoch):
    optimizer = torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=config.lr)
    return Schedule(config, optimizer, steps_per_epoch), optimizer


def paper_rate(epoch, lr, warmup_lr):
    """10 epochs of warm-up, cosine to 1e-5 until epoch 1500, then 1e-5."""
    if epoch < 10:
        return warmup_lr + (lr - warmup_lr) * epoch / 10
    if epoch >= 1500:
        return 1e-5
    return 1e-5 + 0.5 * (lr - 1e-5) * (1 + math.cos(math.pi * epoch / 1500))


@pytest.mark.parametrize("epoch", [0, 5, 10, 755, 1499, 1509])
def test_the_papers_learning_rates(epoch):
    config = load_config(ROOT / "configs" / "cct_7-3x1_cifar100_HTM.yaml").schedule
    schedule, optimizer = schedule_of(config, steps_per_epoch=390)
    expected = paper_rate(epoch, lr=6e-4, warmup_lr=1e-6)
    for step in (0, 200, 389):  # held within an epoch
        rate = schedule.set_step(390 * epoch + step)
        assert rate == pytest.approx(expected, rel=1e-9)
        assert optimizer.param_groups[0]["lr"] == rate
    assert schedule.total_epochs == 1510


def test_a_rate_for_each_step():
    config = ScheduleConfig(epochs=4, warmup_epochs=1, lr=1.0, warmup_lr=0.0, interval="step")
    schedule, _ = schedule_of(config, steps_per_epoch=10)
    for step in (39, 25, 10):  # backwards: the schedule has no memory
        assert schedule.set_step(step) == pytest.approx(0.5 * (1 + math.cos(math.pi * step / 40)))
    for step in (0, 3, 9):
        assert schedule.set_step(step) == pytest.approx(step / 10)


def test_a_constant_rate_after_the_warm_up():
    config = ScheduleConfig(name="constant", epochs=3, warmup_epochs=1, lr=0.5, warmup_lr=0.1)
    schedule, _ = schedule_of(config, steps_per_epoch=2)
    rates = [schedule.set_step(step) for step in range(6)]
    assert rates == pytest.approx([0.1, 0.1, 0.5, 0.5, 0.5, 0.5])


def test_biases_and_norms_have_no_weight_decay(tmp_path):
    config = small_config(tmp_path, horizontal=HTM)
    model = build_model(config, 10)
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.06), ScheduleConfig(), model)
    decay = {id(p): g["weight_decay"] for g in optimizer.param_groups for p in g["params"]}
    assert len(decay) == len(list(model.parameters()))
    for name, parameter in model.named_parameters():
        expected = 0.0 if parameter.ndim <= 1 else 0.06
        assert decay[id(parameter)] == expected, name
    assert isinstance(optimizer, torch.optim.AdamW)


def test_a_vits_own_list_is_without_weight_decay(tmp_path):
    model = {
        "name": "vit_tiny_patch16_224",
        "image_size": 32,
        "kwargs": {"depth": 2, "embed_dim": 24, "num_heads": 3},
    }
    host = build_model(small_config(tmp_path, model=model), 10)
    optimizer = build_optimizer(OptimizerConfig(weight_decay=0.1), ScheduleConfig(), host)
    free = {id(p) for g in optimizer.param_groups if g["weight_decay"] == 0 for p in g["params"]}
    names = dict(host.named_parameters())
    assert id(names["backbone.pos_embed"]) in free
    assert id(names["backbone.cls_token"]) in free
    assert id(names["backbone.head.weight"]) not in free


def test_settings_reach_the_optimiser():
    settings = OptimizerConfig(name="adamw", betas=(0.8, 0.9), eps=1e-5)
    optimizer = build_optimizer(settings, ScheduleConfig(lr=0.25), nn.Linear(2, 2))
    group = optimizer.param_groups[0]
    assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.9), 1e-5, 0.25)
    settings = OptimizerConfig(name="momentum", momentum=0.7, weight_decay=0.0)
    group = build_optimizer(settings, ScheduleConfig(), nn.Linear(2, 2)).param_groups[0]
    assert (group["momentum"], group["nesterov"]) == (0.7, False)
