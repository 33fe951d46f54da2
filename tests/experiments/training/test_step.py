"""The training step against a plain one written here, and steps that are not finite."""

import dataclasses
import functools
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd

from experiments.config.schema import MixupConfig
from experiments.data.augment import BatchMixer
from experiments.data.loading import Division, divide_batch
from experiments.errors import TrainingStopped
from experiments.models.build import build_model
from experiments.training.distributed import ONE_PROCESS, World
from experiments.training.metrics import Progress, RunningStatistics, read_metrics
from experiments.training.optim import Schedule, build_optimizer
from experiments.training.run import Run, train_step
from experiments.training.step import Learner, StepResult
from tests.helpers.others_warnings import uses_inductor
from tests.helpers.runs_helper import HTM, VTM, small_config

DROPOUT = {"attn_drop_rate": 0.2, "drop_path_rate": 0.2}


def learner_of(config, steps_per_epoch=5, device=ONE_PROCESS.device):
    model = build_model(config, 10).train().to(device)
    optimizer = build_optimizer(config.optimizer, config.schedule, model)
    schedule = Schedule(config.schedule, optimizer, steps_per_epoch)
    division = divide_batch(config.data, 0, 1)
    mixer = BatchMixer(config.mixup, 10, config.seed)
    return Learner(config, model, optimizer, schedule, mixer, division, World(0, 1, device))


def batch(size=8, seed=0):
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(size, 3, 16, 16, generator=generator)
    return images, torch.randint(0, 10, (size,), generator=generator)


def with_nan(images, labels):
    bad = images.clone()
    bad[0] = torch.nan
    return bad, labels


def step_of(learner, images, labels, step=0):
    """One step; gives what it measured."""
    statistics = RunningStatistics(learner.device)
    learner.schedule.set_step(step)
    progress = Progress(step=step)
    train_step(learner, images, labels, progress, statistics)
    statistics.refuse_not_finite(ONE_PROCESS, progress)
    return statistics.read(ONE_PROCESS)


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


class Batches:
    """TrainBatches' interface over one batch, with not-a-number in it at some steps of the run."""

    def __init__(self, steps_per_epoch, bad_steps=(), size=8):
        self.steps_per_epoch, self.bad_steps, self.size = steps_per_epoch, bad_steps, size
        self.num_images, self.bad_images = steps_per_epoch * size, {}
        self.division = Division(size, 0, 1)

    def epoch(self, epoch, first_step=0):
        good = batch(self.size)
        for step in range(first_step, self.steps_per_epoch):
            bad = epoch * self.steps_per_epoch + step in self.bad_steps
            yield with_nan(*good) if bad else good

    def close(self):
        pass


def fit(folder, batches, prepare=lambda learner: None, **sections):
    """Train on given batches; gives the learner and the rows of metrics of the training."""
    folder.mkdir(exist_ok=True)
    sections = {"schedule": {"epochs": 1}, "data": {"val_split": "validation[:20]"}} | sections
    config = small_config(folder, **sections)
    run = Run(config, ONE_PROCESS)
    run.batches = batches
    prepare(run.learner)
    run.fit()
    rows = read_metrics(folder / "output" / "small")
    return run.learner, [row for row in rows if row["split"] == "train"]


def spoil_gradient(*steps):
    """Makes the gradient infinite at these steps of the run (from 1)."""

    def prepare(learner):
        calls = itertools.count(1)
        weight = learner.model.backbone.head.weight
        weight.register_hook(lambda gradient: gradient / (0.0 if next(calls) in steps else 1.0))

    return prepare


@pytest.mark.parametrize("horizontal", [None, HTM | {"scorenet_lambda": 0.5}])
def test_a_step_is_the_naive_one(tmp_path, horizontal):
    """Losses, gradient norm and new weights, by a loop written out."""
    optimizer = {"name": "momentum", "momentum": 0.9, "weight_decay": 0.0, "clip_grad": 0.5}
    sections = {"optimizer": optimizer, "horizontal": horizontal, "schedule": {"lr": 0.1}}
    config = small_config(tmp_path, mixup={"label_smoothing": 0.1}, **sections)
    learner = learner_of(config)
    reference = build_model(config, 10).train()
    images, labels = batch()
    targets = F.one_hot(labels, 10) * 0.9 + 0.01
    momentum = {name: torch.zeros_like(p) for name, p in reference.named_parameters()}
    for step in range(3):
        measured = step_of(learner, images, labels, step)
        assert ("scorenet_loss" in measured) == (horizontal is not None)
        rate = learner.optimizer.param_groups[0]["lr"]
        out = reference(images, targets)
        loss = -(out.targets * out.logits.log_softmax(1)).sum(1).mean()
        reference.zero_grad()
        (loss + out.scorenet_loss).backward()
        gradients = {name: p.grad for name, p in reference.named_parameters()}
        norm = torch.stack([g.norm() for g in gradients.values()]).norm()
        assert measured["loss"] == pytest.approx(loss.item(), rel=1e-5)
        assert measured.get("scorenet_loss", 0) == pytest.approx(out.scorenet_loss.item(), rel=1e-5)
        assert measured["gradient_norm"] == pytest.approx(norm.item(), rel=1e-4)
        with torch.no_grad():
            for name, parameter in reference.named_parameters():
                clipped = gradients[name] * min(1.0, 0.5 / norm)
                momentum[name] = 0.9 * momentum[name] + clipped
                parameter -= rate * momentum[name]
    for name, parameter in reference.named_parameters():
        torch.testing.assert_close(learner.model.get_parameter(name), parameter, msg=name)


def test_bf16_computes_in_bf16_and_no_statistic_keeps_the_graph(tmp_path):
    learner = learner_of(small_config(tmp_path, precision="bf16", horizontal=HTM))
    seen = []
    learner.model.register_forward_hook(lambda *of: seen.append(of[2].logits.dtype))
    result = learner.forward(batch()[0], F.one_hot(batch()[1], 10).float())
    assert seen == [torch.bfloat16]
    assert result.loss.requires_grad
    assert not result.values.requires_grad and not result.finite.requires_grad


def test_a_step_depends_on_its_number_alone(tmp_path):
    """Dropout, drop path and Mixup are the same whatever was drawn before."""
    config = small_config(
        tmp_path, horizontal=HTM, vertical=VTM, model=DROPOUT, mixup={"mixup_alpha": 0.8}
    )
    results = []
    for drawn in (0, 7):
        torch.manual_seed(drawn)
        np.random.seed(drawn)
        learner = learner_of(config)
        step_of(learner, *batch(), step=4)
        results.append(weights(learner.model))
    assert all(torch.equal(results[0][name], results[1][name]) for name in results[0])
    learner = learner_of(config)
    step_of(learner, *batch(), step=5)
    other = weights(learner.model)
    assert any(not torch.equal(results[0][name], other[name]) for name in other)


def test_accumulation_gives_the_gradient_of_the_whole_batch(tmp_path):
    config = small_config(tmp_path, optimizer={"name": "momentum", "weight_decay": 0.0})
    parts = dataclasses.replace(
        config, data=dataclasses.replace(config.data, batch_size=8, micro_batch=2)
    )
    whole, divided = learner_of(config), learner_of(parts)
    losses = [step_of(learner, *batch())["loss"] for learner in (whole, divided)]
    assert losses[0] == pytest.approx(losses[1])
    for name, value in whole.model.state_dict().items():
        torch.testing.assert_close(divided.model.state_dict()[name], value)


def replayed(graph, inputs):
    """Compiles as CUDA graphs work: outputs have one place, where the next replay writes as well.

    What is read although a replay has overwritten it is not a number.
    """
    given = []  # the outputs of each graph in this generation

    def place(compiled, _):
        memory = []

        def replay(*arguments):
            found = compiled(*arguments)
            if not memory:
                memory.extend(t.clone() if isinstance(t, torch.Tensor) else t for t in found)
            for kept, new in zip(memory, found, strict=True):
                if isinstance(new, torch.Tensor):
                    kept.copy_(new)
            given.append(memory)
            return tuple(k.detach() if isinstance(k, torch.Tensor) else k for k in memory)

        return make_boxed_func(replay)

    def forward(*arguments):
        for memory in given:
            for kept in memory:
                if isinstance(kept, torch.Tensor) and kept.is_floating_point():
                    kept.fill_(torch.nan)
        given.clear()
        return run(*arguments)

    run = aot_autograd(fw_compiler=place, bw_compiler=place)(graph, inputs)
    return forward


@uses_inductor
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_a_step_keeps_outlasts_the_replay_of_its_graph(tmp_path, monkeypatch, device):
    """Gradients of several parts, and what they measured; a CPU has a stand-in for the replay."""
    if device == "cpu":
        compiled = functools.partial(torch.compile, backend=replayed)
        monkeypatch.setattr(torch, "compile", lambda *of, mode, **how: compiled(*of, **how))
    sections = {"horizontal": HTM, "vertical": VTM, "precision": "bf16"}
    sections |= {"optimizer": {"name": "momentum"}, "data": {"batch_size": 8, "micro_batch": 4}}
    found = []
    for mode in ("off", "graphs"):
        config = small_config(tmp_path, compile=mode, **sections)
        learner = learner_of(config, device=torch.device(device))
        parts, forward = [], learner.forward
        learner.forward = lambda *of, kept=parts, inner=forward: kept.append(inner(*of)) or kept[-1]
        images, labels = (tensor.to(device) for tensor in batch())
        rows = [step_of(learner, images, labels, step) for step in range(3)]
        found.append((rows, parts, weights(learner.model)))
    (wanted_rows, wanted_parts, wanted), (rows, parts, actual) = found
    assert rows == [pytest.approx(row, rel=1e-4) for row in wanted_rows]
    torch.testing.assert_close(actual, wanted)
    for part, eager in zip(parts, wanted_parts, strict=True):
        torch.testing.assert_close((part.values, part.finite), (eager.values, eager.finite))
    if device == "cpu":  # the stand-in does overwrite what is not kept
        assert parts[0].loss == parts[-1].loss and wanted_parts[0].loss != wanted_parts[-1].loss


def test_each_part_of_each_step_draws_its_own_numbers(tmp_path):
    """Dropout, as Mixup, depends on (seed, step, part), whichever process computes the part."""
    config = small_config(tmp_path, data={"batch_size": 8, "micro_batch": 2})

    def drawn(step, seed=0, first=0, count=4):
        learner = learner_of(dataclasses.replace(config, seed=seed))
        learner.division = Division(2, first, count)
        images, labels = batch(2 * count)
        parts = learner.micro_batches(images, labels, Progress(step=step))
        return [torch.rand(()).item() for _ in parts]

    first, second, other_seed = drawn(0), drawn(1), drawn(0, seed=1)
    assert len({*first, *second, *other_seed}) == 12
    assert drawn(1) == second and drawn(1, first=2, count=2) == second[2:]


def test_places_are_erased_after_images_are_mixed(tmp_path):
    """So erased places hold noise of deviation 1: mixed noise would have less."""
    mixup = {"mixup_alpha": 0.8, "cutmix_alpha": 1.0}
    data = {"batch_size": 256, "re_prob": 0.25, "re_mode": "pixel"}
    learner = learner_of(small_config(tmp_path, data=data, mixup=mixup))
    seen = []
    learner.model.register_forward_pre_hook(lambda _, arguments: seen.append(arguments[0]))
    for _ in range(2):
        step_of(learner, torch.full((256, 3, 16, 16), 9.0), torch.arange(256) % 10)
    assert torch.equal(*seen)
    noise = seen[0] != 9
    assert noise.any((1, 2, 3)).float().mean() == pytest.approx(0.25, abs=0.1)
    assert seen[0][noise].std() == pytest.approx(1, abs=0.05)
    assert seen[0][noise].mean() == pytest.approx(0, abs=0.05)


def test_parts_of_a_batch_are_mixed_like_batches_of_their_own(tmp_path):
    mixup = MixupConfig(mixup_alpha=0.8, cutmix_alpha=1.0)
    images, labels = batch()
    mixer = BatchMixer(mixup, 10, 3)
    first = mixer(images[:4].clone(), labels[:4], 0, 2, 0)
    second = mixer(images[:4].clone(), labels[:4], 0, 2, 1)
    assert not torch.equal(first[0], second[0])


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_rows_come_at_the_interval_and_at_the_end(tmp_path, precision):
    sections = {"logging": {"interval": 2}, "horizontal": HTM, "precision": precision}
    sections["schedule"] = {"epochs": 2}
    _, rows = fit(tmp_path, Batches(5, size=64), **sections)
    assert [row["step"] for row in rows] == [2, 4, 5, 7, 9, 10]
    assert [row["steps"] for row in rows] == [2, 2, 1] * 2
    for row in rows:
        assert {"loss", "scorenet_loss", "lr", "step_seconds", "data_seconds"} <= set(row)
        assert "htm/layer1/easy_share" in row


def test_a_loss_or_gradient_that_is_not_finite_stops_with_its_step(tmp_path):
    sections = {"logging": {"interval": 3}, "schedule": {"epochs": 2}}
    with pytest.raises(TrainingStopped, match=r"^step 11 \(epoch 2\): the training loss is not"):
        fit(tmp_path, Batches(6, bad_steps=(10,)), **sections)
    message = r"^step 2 \(epoch 1\): the norm of the gradient is not finite; there is no checkpoint"
    with pytest.raises(TrainingStopped, match=message):
        fit(tmp_path / "gradient", Batches(4), spoil_gradient(2), **sections)


def test_fp16_may_overflow(tmp_path):
    """The scaler leaves such a step out and lowers its scale: no fault."""
    learner = learner_of(small_config(tmp_path, precision="fp16"))
    before = weights(learner.model)
    learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**120)
    measured = step_of(learner, *batch())
    assert measured["loss"] > 0
    assert learner.scaler.get_scale() == 2.0**119
    assert all(torch.equal(before[name], value) for name, value in weights(learner.model).items())
    assert (measured["finite_share"], measured["gradient_norm"]) == (0, 0)


def test_the_norm_of_the_gradient_is_that_of_the_steps_that_did_not_overflow(tmp_path):
    still = {"name": "constant", "lr": 1e-12, "epochs": 1, "warmup_lr": 1e-12}

    def prepare(learner):
        learner.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**8)
        spoil_gradient(1, 3)(learner)

    sections = {"precision": "fp16", "logging": {"interval": 4}, "schedule": still}
    _, (row,) = fit(tmp_path, Batches(4), prepare, **sections)
    wanted = step_of(learner_of(small_config(tmp_path)), *batch())["gradient_norm"]
    assert row["finite_share"] == 0.5
    assert row["gradient_norm"] == pytest.approx(wanted, rel=0.05)


def test_a_gradient_of_fp16_that_is_never_finite_stops(tmp_path):
    prepare = spoil_gradient(1, 2, *range(4, 41))  # two overflows, a good step, and then none
    sections = {"precision": "fp16", "logging": {"interval": 50}}
    with pytest.raises(TrainingStopped, match=r"^step 35 \(epoch 1\): the norm of the gradient is"):
        fit(tmp_path, Batches(40, size=2), prepare, **sections)


@pytest.mark.parametrize("policy, finite", [("skip", False), ("stop", True)])
def test_all_processes_skip_a_step_together(tmp_path, policy, finite):
    """Here all is finite, but not in another process; a minimum over processes wants numbers."""

    class WithAnother(World):
        def minimum(self, tensor):
            return tensor.masked_fill_(tensor.isfinite() & tensor.is_floating_point(), 0)

    learner = learner_of(small_config(tmp_path, on_nonfinite=policy))
    learner.world = WithAnother(0, 1, torch.device("cpu"))
    one = torch.tensor(1.0)
    part = StepResult(one, ("loss",), torch.ones(1), torch.ones(2, dtype=torch.bool))
    assert learner.finite([part], one).tolist() == [finite] * 3


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("mixing", [{}, {"horizontal": HTM}], ids=["plain", "HTM"])
def test_a_step_that_is_skipped_changes_nothing(tmp_path, precision, mixing):
    schedule = {"name": "constant", "epochs": 1, "warmup_epochs": 0}
    sections = {"on_nonfinite": "skip", "skip_limit": 2, "schedule": schedule}
    sections |= {"precision": precision, "logging": {"interval": 4}, **mixing}
    with_bad, rows = fit(tmp_path / "bad", Batches(5, bad_steps=(1, 3)), **sections)
    assert [row["skipped_steps"] for row in rows] == [2, 2]
    without, expected = fit(tmp_path / "good", Batches(3), **sections)
    if precision == "fp32":  # in fp16 the scale falls, which rounds otherwise
        for name, value in weights(without.model).items():
            assert torch.equal(weights(with_bad.model)[name], value), name
    assert rows[-1]["loss"] == pytest.approx(expected[-1]["loss"], rel=0.1)
    with pytest.raises(TrainingStopped, match=r"^step 5 .*2 steps were skipped for that already"):
        fit(tmp_path / "worse", Batches(5, bad_steps=(1, 3, 4)), **sections)


@pytest.mark.gpu
def test_training_waits_for_the_gpu_at_rows_alone(tmp_path):
    """HTM's one exchange per step is the library's; a plain model and VTM have none."""
    device = torch.device("cuda")
    config = small_config(tmp_path, vertical=VTM, logging={"interval": 100}, device="cuda")
    learner = learner_of(config, device=device)
    images, labels = (tensor.to(device) for tensor in batch())
    progress, statistics = Progress(), RunningStatistics(device)
    train_step(learner, images, labels, progress, statistics)  # optimisers allocate their state
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            train_step(learner, images, labels, progress, statistics)
    finally:
        torch.cuda.set_sync_debug_mode("default")
