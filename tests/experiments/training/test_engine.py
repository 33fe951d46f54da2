"""The training step and the evaluation against plain ones written here."""

import dataclasses
import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from experiments.config import MixupConfig
from experiments.data.loading import BatchMixer, divide_batch
from experiments.errors import TrainingStopped
from experiments.models.build import build_model
from experiments.training.distributed import ONE_PROCESS, World
from experiments.training.evaluation import evaluate
from experiments.training.optim import Schedule, build_optimizer
from experiments.training.step import Learner, Tally, train_epoch
from tests.helpers.runs_helper import HTM, VTM, small_config

DROPOUT = {"attn_drop_rate": 0.2, "drop_path_rate": 0.2}


def learner_of(config, steps_per_epoch=5):
    model = build_model(config, 10)
    optimizer = build_optimizer(config.optimizer, config.schedule, model)
    schedule = Schedule(config.schedule, optimizer, steps_per_epoch)
    division = divide_batch(config.data, 0, 1)
    mixer = BatchMixer(config.mixup, 10, config.seed)
    return Learner(config, model, optimizer, schedule, mixer, division, ONE_PROCESS)


def batch(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 16, 16, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Batches:
    """TrainBatches' interface over given batches."""

    def __init__(self, *given):
        self.given = given
        self.steps_per_epoch = len(given)

    def epoch(self, epoch, first_step=0):
        return iter(self.given[first_step:])


def reports_of(learner, batches, epoch=0, first_step=0):
    tally = Tally(learner.device)
    steps = list(train_epoch(learner, batches, epoch, tally, first_step))
    assert len(steps) == batches.steps_per_epoch - first_step
    return [report for report in steps if report is not None]


class Fixed(nn.Module):
    """Answers with given logits, one row a image."""

    def __init__(self, logits):
        super().__init__()
        self.logits, self.seen = logits, 0

    def forward(self, images):
        start, self.seen = self.seen, self.seen + len(images)
        return self.logits[start : self.seen]


@pytest.mark.parametrize("classes", [3, 10])
def test_evaluation_counts_each_image_once(tmp_path, classes):
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(23, classes, generator=generator)
    labels = torch.randint(0, classes, (23,), generator=generator)
    batches = [(torch.zeros(len(part), 3, 2, 2), part) for part in labels.split(5)]
    model = Fixed(logits).train()
    result = evaluate(model, batches, ONE_PROCESS, small_config(tmp_path))
    order = logits.sort(1, descending=True).indices.tolist()
    truth = labels.tolist()
    top1 = sum(order[i][0] == truth[i] for i in range(23))
    top5 = sum(truth[i] in order[i][:5] for i in range(23))
    loss = sum(-logits[i].log_softmax(0)[truth[i]].item() for i in range(23)) / 23
    assert result.top1 == pytest.approx(100 * top1 / 23)
    assert result.top5 == pytest.approx(100 * top5 / 23)
    assert result.loss == pytest.approx(loss, rel=1e-5)
    assert result.images == 23
    assert model.training


def test_a_step_is_the_naive_one(tmp_path):
    """Loss, gradient norm and new weights of a plain model, by a loop written out."""
    optimizer = {"name": "momentum", "momentum": 0.9, "weight_decay": 0.0, "clip_grad": 0.5}
    config = small_config(
        tmp_path, optimizer=optimizer, mixup={"label_smoothing": 0.1}, schedule={"lr": 0.1}
    )
    learner = learner_of(config)
    reference = build_model(config, 10).backbone
    assert torch.equal(reference.head.weight, learner.model.backbone.head.weight)
    images, labels = batch()
    momentum = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    reference.train()
    learner.model.train()
    for step in range(3):
        learner.schedule.set_step(step)
        rate = learner.optimizer.param_groups[0]["lr"]
        result = learner.step(images, labels, 0, step)
        loss = F.cross_entropy(reference(images), labels, label_smoothing=0.1)
        reference.zero_grad()
        loss.backward()
        gradients = {name: p.grad for name, p in reference.named_parameters()}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert result.statistics[0]["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert result.statistics[0]["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        assert result.finite.all()
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                clipped = gradients[name] * min(1.0, 0.5 / norm)
                momentum[name] = 0.9 * momentum[name] + clipped
                parameter -= rate * momentum[name]
    for name, parameter in reference.named_parameters():
        actual = learner.model.backbone.get_parameter(name)
        torch.testing.assert_close(actual, parameter, rtol=1e-4, atol=1e-6)


def test_a_step_depends_on_its_number_alone(tmp_path):
    """Dropout, drop path and Mixup are the same whatever was drawn before."""
    config = small_config(
        tmp_path, horizontal=HTM, vertical=VTM, model=DROPOUT, mixup={"mixup_alpha": 0.8}
    )
    results = []
    for drawn in (0, 7):
        torch.manual_seed(drawn)
        torch.rand(drawn)
        learner = learner_of(config)
        learner.model.train()
        learner.step(*batch(), epoch=0, step=4)
        results.append(weights(learner.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    learner = learner_of(config)
    learner.model.train()
    learner.step(*batch(), epoch=0, step=5)
    other = weights(learner.model)
    assert any(not torch.equal(results[0][name], other[name]) for name in other)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    config = small_config(tmp_path, optimizer={"name": "momentum", "weight_decay": 0.0})
    parts = dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch_size=8, micro_batch=2)
    )
    whole, divided = learner_of(config), learner_of(parts)
    for learner in (whole, divided):
        learner.model.train()
        result = learner.step(*batch(), 0, 0)
        assert len(result.statistics) == learner.division.count
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(divided.model.state_dict()[name], value)


def test_parts_of_a_batch_are_mixed_like_batches_of_their_own(tmp_path):
    mixup = MixupConfig(mixup_alpha=0.8, cutmix_alpha=1.0)
    images, labels = batch()
    mixer = BatchMixer(mixup, 10, 3)
    first = mixer(images[:4].clone(), labels[:4], 0, 2, 0)
    second = mixer(images[:4].clone(), labels[:4], 0, 2, 1)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_reports_come_at_the_interval_and_at_the_end(tmp_path, precision):
    config = small_config(tmp_path, logging={"interval": 2}, horizontal=HTM, precision=precision)
    learner = learner_of(config)
    batches = Batches(*(batch(128, seed) for seed in range(5)))
    reports = reports_of(learner, batches, epoch=2)
    assert [report.step for report in reports] == [12, 14, 15]
    assert [report.values["steps"] for report in reports] == [2, 2, 1]
    for report in reports:
        assert {"loss", "scorenet_loss", "lr", "step_seconds", "data_seconds"} <= set(report.values)
        assert "htm/layer1/easy_share" in report.values
        assert not any("good_steps" in name for name in report.values)


def test_a_loss_that_is_not_finite_stops_with_its_step(tmp_path):
    config = small_config(tmp_path, logging={"interval": 3})
    learner = learner_of(config)
    images, labels = batch()
    bad = images.clone()
    bad[0] = torch.nan
    batches = Batches(*[(images, labels)] * 4, (bad, labels), (images, labels))
    with pytest.raises(TrainingStopped, match=r"^step 11 \(epoch 2\): the training loss is not"):
        reports_of(learner, batches, epoch=1)


def test_a_gradient_that_is_not_finite_stops_as_well(tmp_path):
    learner = learner_of(small_config(tmp_path, logging={"interval": 3}))
    calls = itertools.count(1)
    weight = learner.model.backbone.head.weight
    weight.register_hook(lambda gradient: gradient / (0.0 if next(calls) == 2 else 1.0))
    with pytest.raises(TrainingStopped, match=r"^step 2 \(epoch 1\): the norm of the gradient is"):
        reports_of(learner, Batches(*[batch()] * 4))


def test_fp16_may_overflow(tmp_path):
    """The scaler leaves such a step out and lowers its scale: no fault."""
    learner = learner_of(small_config(tmp_path, precision="fp16"))
    before = weights(learner.model)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    (report,) = reports_of(learner, Batches(batch()))
    assert report.values["loss"] > 0
    assert learner.scaler.get_scale() == 2.0**119
    assert all(torch.equal(before[name], value) for name, value in weights(learner.model).items())
    assert (report.values["finite_share"], report.values["gradient_norm"]) == (0, 0)


def test_the_norm_of_the_gradient_is_that_of_the_steps_that_did_not_overflow(tmp_path):
    config = small_config(tmp_path, precision="fp16", logging={"interval": 4})
    sections = {"schedule": {"name": "constant", "lr": 1e-12}}
    learner, expected = learner_of(config), learner_of(small_config(tmp_path, **sections))
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
    learner.schedule = expected.schedule  # its weights stay as they are
    calls = itertools.count(1)
    weight = learner.model.backbone.head.weight
    weight.register_hook(lambda gradient: gradient / (0.0 if next(calls) in (1, 3) else 1.0))
    for group in learner.optimizer.param_groups:
        group["lr"] = 0.0
    (report,) = reports_of(learner, Batches(*[batch()] * 4))
    (wanted,) = reports_of(expected, Batches(batch()))
    assert report.values["finite_share"] == 0.5
    assert report.values["gradient_norm"] == pytest.approx(wanted.values["gradient_norm"], rel=0.05)


def test_a_gradient_of_fp16_that_is_never_finite_stops(tmp_path):
    learner = learner_of(small_config(tmp_path, precision="fp16", logging={"interval": 50}))
    calls = itertools.count(1)
    weight = learner.model.backbone.head.weight
    # two overflows, a good step, and then none
    weight.register_hook(lambda gradient: gradient / (1.0 if next(calls) == 3 else 0.0))
    with pytest.raises(TrainingStopped, match=r"^step 35 \(epoch 1\): the norm of the gradient is"):
        reports_of(learner, Batches(*[batch(2)] * 40))


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
def test_a_step_that_is_skipped_changes_nothing(tmp_path, precision):
    sections = {"on_nonfinite": "skip", "skip_limit": 2, "schedule": {"name": "constant"}}
    config = small_config(tmp_path, precision=precision, logging={"interval": 4}, **sections)
    images, labels = batch()
    bad = images.clone()
    bad[0] = torch.nan
    with_bad, without = learner_of(config, 5), learner_of(config, 3)
    good = (images, labels)
    with_bad_batches = Batches(good, (bad, labels), good, (bad, labels), good)
    reports = reports_of(with_bad, with_bad_batches)
    assert [report.values["skipped_steps"] for report in reports] == [2, 2]
    expected = reports_of(without, Batches(good, good, good))
    if precision == "fp32":  # in fp16 the scale falls, which rounds otherwise
        for name, value in weights(without.model).items():
            assert torch.equal(weights(with_bad.model)[name], value), name
    assert reports[-1].values["loss"] == pytest.approx(expected[-1].values["loss"], rel=0.1)
    with pytest.raises(TrainingStopped, match=r"^step 7 .*2 steps were left out for that already"):
        reports_of(with_bad, with_bad_batches, epoch=1)


def test_an_epoch_can_be_begun_in_its_middle(tmp_path):
    config = small_config(tmp_path, model=DROPOUT, horizontal=HTM, vertical=VTM)
    batches = Batches(*(batch(16, seed) for seed in range(4)))
    whole, cut = learner_of(config, 4), learner_of(config, 4)
    reports_of(whole, batches)
    for position in range(2):
        cut.model.train()
        cut.schedule.set_step(position)
        cut.step(*batches.given[position], 0, position)
    reports_of(cut, batches, first_step=2)
    for name, value in whole.model.state_dict().items():
        assert torch.equal(cut.model.state_dict()[name], value), name


@pytest.mark.gpu
def test_training_waits_for_the_gpu_at_reports_alone(tmp_path):
    """HTM's one exchange a step is the library's; a plain model and VTM have none."""
    device = torch.device("cuda")
    config = small_config(tmp_path, vertical=VTM, logging={"interval": 100}, device="cuda")
    learner = learner_of(config)
    learner.model.to(device)  # the optimiser's parameters are the same objects
    learner = dataclasses.replace(learner, world=World(0, 1, device))
    learner.model.train()
    images, labels = (tensor.to(device) for tensor in batch())
    learner.step(images, labels, 0, 0)  # optimisers allocate their state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for step in range(1, 4):
            learner.step(images, labels, 0, step)
    finally:
        torch.cuda.set_sync_debug_mode("default")
