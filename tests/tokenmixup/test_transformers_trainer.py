"""tokenmixup.integrations.transformers: what the Trainer trains, saves and reads again."""

import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.multiprocessing
from safetensors import safe_open
from timm.data.mixup import mixup_target
from torch import Tensor
from transformers import (
    AutoModelForImageClassification,
    Trainer,
    ViTForImageClassification,
)

from tests.helpers.trainer_worker import (
    CLASSES,
    HTM,
    VTM,
    InOrder,
    arguments,
    build,
    data,
    run,
    weights,
)
from tokenmixup import TokenMixupModel, VerticalConfig, attach
from tokenmixup.integrations.transformers import TokenMixupTrainer


class Doubled(TokenMixupTrainer):
    """Twice the cross-entropy."""

    def criterion(self, logits: Tensor, targets: Tensor) -> Tensor:
        return 2 * super().criterion(logits, targets)


class DoubledInOrder(Doubled, InOrder):
    pass


class Raised(TokenMixupTrainer):
    """An override of compute_loss."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        return (loss + 1, outputs) if return_outputs else loss + 1


class ByItself(InOrder):
    """An override of compute_loss that does all itself."""

    def compute_loss(
        self, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        return model(inputs["pixel_values"], inputs["labels"]).loss()


def images(count: int = 16) -> Tensor:
    return torch.stack([sample["pixel_values"] for sample in data(count)])


def labels(count: int = 16) -> Tensor:
    return torch.tensor([sample["labels"] for sample in data(count)])


def trained(
    folder: Path,
    model: Any = None,
    count: int = 16,
    kind: type[TokenMixupTrainer] = TokenMixupTrainer,
    **options: Any,
) -> TokenMixupTrainer:
    """After some steps of SGD."""
    keys = ("compute_metrics", "eval_dataset")
    given = {key: options.pop(key) for key in keys if key in options}
    resume = options.pop("resume_from_checkpoint", None)
    trainer = kind(
        model or build(), arguments(folder, **options), train_dataset=data(count), **given
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def logits_of(model: TokenMixupModel) -> Tensor:
    with torch.no_grad():
        return model.backbone.eval()(images()).logits


def doubled(logits: Tensor, targets: Tensor) -> Tensor:
    return -2 * (targets * logits.log_softmax(1)).sum() / len(logits)


def by_hand(
    model: TokenMixupModel, *batches: slice, smoothing: float = 0.0, criterion: Any = None
) -> None:
    """One step of plain SGD on parts of the data, by their share of the images."""
    x, y = images(), mixup_target(labels(), CLASSES, smoothing=smoothing)
    count = sum(len(x[part]) for part in batches)
    model.train()
    for part in batches:
        loss = model(x[part], y[part]).loss(criterion)
        (loss * len(x[part]) / count).backward()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.grad is not None:
                parameter -= 0.1 * parameter.grad


def assert_same_weights(one: torch.nn.Module, other: torch.nn.Module, **tolerance: float) -> None:
    expected = weights(other)
    assert weights(one).keys() == expected.keys()
    for name, value in weights(one).items():
        torch.testing.assert_close(value, expected[name], msg=name, **tolerance)


BIT_FOR_BIT = {"rtol": 0.0, "atol": 0.0}
SMALL = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize(
    "kind, bf16", [("ViT", False), ("ViT", True), ("DeiT", False), ("Dinov2", False)]
)
def test_from_pretrained_reads_every_checkpoint(tmp_path: Path, kind: str, bf16: bool) -> None:
    start = weights(build(kind=kind))
    options = {"save_strategy": "steps", "save_steps": 1, "logging_steps": 1, "max_steps": 2}
    trainer = trained(tmp_path, build(kind=kind), bf16=bf16, **options)
    for row in trainer.state.log_history[:2]:
        assert row["htm/layer1/easy_share"] == 1 and row["htm/layer1/tokens_mixed"] > 0
        assert row["vtm/layer2/remembered_tokens"] == 4
    trainer.save_model()
    model = trainer.model
    for folder in (tmp_path / "checkpoint-2", tmp_path):
        host = AutoModelForImageClassification.from_pretrained(folder)
        assert torch.equal(host.eval()(images()).logits, logits_of(model))
        with safe_open(folder / "tokenmixup.safetensors", "pt") as file:
            assert json.loads(file.metadata()["horizontal"])["tau"] == HTM.tau
            assert json.loads(file.metadata()["vertical"])["kappa"] == VTM.kappa
            for name, value in model.scorenets.state_dict().items():
                assert torch.equal(file.get_tensor(name), value)
    first = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-1")
    assert not torch.equal(first.classifier.weight, host.classifier.weight)
    moved = {name for name, value in weights(model).items() if not torch.equal(value, start[name])}
    assert {"backbone.classifier.weight", "scorenets.1.head.weight"} <= moved


@pytest.mark.parametrize("bf16", [False, True])
def test_a_resumed_training_is_an_uninterrupted_one(tmp_path: Path, bf16: bool) -> None:
    options = {
        "bf16": bf16,
        "optim": "adamw_torch",
        "max_steps": 4,
        "save_strategy": "steps",
        "save_steps": 2,
        "gradient_accumulation_steps": 2,
        "per_device_train_batch_size": 4,
    }
    whole = trained(tmp_path, build(dropout=0.1), **options)
    torch.manual_seed(1)
    checkpoint = str(tmp_path / "checkpoint-2")
    again = trained(
        tmp_path, build(seed=3, dropout=0.1), resume_from_checkpoint=checkpoint, **options
    )
    assert again.state.global_step == 4
    assert_same_weights(again.model, whole.model, **BIT_FOR_BIT)


def test_every_image_of_a_step_weighs_the_same(tmp_path: Path) -> None:
    """10 images in batches of 4, 4 and 2, in one step."""
    options = {"max_steps": 1, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 3}
    parts = slice(0, 4), slice(4, 8), slice(8, 10)
    for kind, criterion in ((InOrder, None), (ByItself, None), (DoubledInOrder, doubled)):
        trained(tmp_path, by_trainer := build(), 10, kind, **options)
        by_hand(expected := build(), *parts, criterion=criterion)
        assert_same_weights(by_trainer, expected, **SMALL)
    for model in (by_trainer := build(), expected := build()):
        model.enabled = False
    trained(tmp_path, by_trainer, 10, InOrder, **options)
    by_hand(expected, slice(0, 10))
    assert_same_weights(by_trainer, expected, **SMALL)


def test_targets_are_smoothed_before_they_are_mixed(tmp_path: Path) -> None:
    by_trainer, expected = build(), build()
    trained(tmp_path, by_trainer, max_steps=1, label_smoothing_factor=0.2)
    by_hand(expected, slice(0, 16), smoothing=0.2)
    assert_same_weights(by_trainer, expected, **SMALL)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_the_loss_is_the_trainers_own_where_nothing_is_mixed(
    tmp_path: Path, smoothing: float
) -> None:
    model = build()
    model.enabled = False
    options = {"label_smoothing_factor": smoothing, "max_steps": 3, "logging_steps": 1}
    ours = trained(tmp_path, model, **options)
    own = Trainer(build().detach(), arguments(tmp_path, **options), train_dataset=data())
    own.train()
    losses = [[row["loss"] for row in t.state.log_history if "loss" in row] for t in (ours, own)]
    assert len(losses[0]) == 3
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert ours.evaluate(data())["eval_loss"] == pytest.approx(
        own.evaluate(data())["eval_loss"], rel=1e-5
    )


def test_evaluation_and_training_have_the_same_loss_of_your_own(tmp_path: Path) -> None:
    model = build()
    model.enabled = False
    loss = torch.nn.functional.cross_entropy(logits_of(model), labels()).item()
    options = {"max_steps": 1, "logging_steps": 1, "include_for_metrics": ["inputs", "loss"]}
    for kind, expected in ((TokenMixupTrainer, loss), (Doubled, 2 * loss), (Raised, loss + 1)):

        def metrics(found: Any, expected: float = expected) -> dict[str, float]:
            assert found.losses.mean() == pytest.approx(expected, rel=1e-5)
            assert len(found.inputs) == len(found.predictions) == 16
            return {}

        given = arguments(tmp_path, **options, learning_rate=0.0)
        trainer = kind(model.train(), given, train_dataset=data(), compute_metrics=metrics)
        trainer.train()
        evaluated = trainer.evaluate(data())["eval_loss"]
        assert trainer.state.log_history[0]["loss"] == pytest.approx(expected, rel=1e-4)
        assert evaluated == pytest.approx(expected, rel=1e-5)


def test_soft_labels(tmp_path: Path) -> None:
    hard = data()
    soft = [{**sample, "labels": torch.eye(CLASSES)[sample["labels"]].tolist()} for sample in hard]
    losses = [
        TokenMixupTrainer(build(), arguments(tmp_path, max_steps=1), train_dataset=one).train()
        for one in (hard, soft)
    ]
    assert losses[0].training_loss == pytest.approx(losses[1].training_loss, rel=1e-6)


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing` is deprecated:FutureWarning")
def test_checkpointing_of_activations_changes_nothing(tmp_path: Path) -> None:
    plain = trained(tmp_path, max_steps=2)
    checkpointed = trained(tmp_path, max_steps=2, gradient_checkpointing=True)
    parts = checkpointed.model.backbone.modules()
    assert sum(getattr(part, "gradient_checkpointing", False) for part in parts) >= 3
    assert_same_weights(checkpointed.model, plain.model, **SMALL)


def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    scores = iter([0.1, 0.9, 0.5])

    def metrics(predictions: Any) -> dict[str, float]:
        assert predictions.predictions.shape == (16, CLASSES)
        assert (predictions.label_ids == labels().numpy()).all()
        return {"score": next(scores)}

    trainer = trained(
        tmp_path,
        max_steps=3,
        save_strategy="steps",
        save_steps=1,
        eval_strategy="steps",
        eval_steps=1,
        load_best_model_at_end=True,
        metric_for_best_model="score",
        compute_metrics=metrics,
        eval_dataset=data(),
    )
    assert trainer.state.best_global_step == 2
    host = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert torch.equal(logits_of(trainer.model), host(images()).logits)
    with safe_open(tmp_path / "checkpoint-2" / "tokenmixup.safetensors", "pt") as file:
        for name, value in trainer.model.scorenets.state_dict().items():
            assert torch.equal(file.get_tensor(name), value)


def test_predictions_are_those_of_the_host(tmp_path: Path) -> None:
    model = build()
    trainer = TokenMixupTrainer(model, arguments(tmp_path))
    without = [{"pixel_values": sample["pixel_values"]} for sample in data()]
    found = trainer.predict(without)
    assert found.label_ids is None and "test_loss" not in found.metrics
    torch.testing.assert_close(torch.tensor(found.predictions), logits_of(model))
    loss = torch.nn.functional.cross_entropy(logits_of(model), labels())
    assert trainer.predict(data()).metrics["test_loss"] == pytest.approx(loss.item(), rel=1e-5)


def test_model_init_and_the_model_card(tmp_path: Path) -> None:
    trainer = TokenMixupTrainer(
        args=arguments(tmp_path, max_steps=1), train_dataset=data(), model_init=lambda: build()
    )
    trainer.train()
    trainer.create_model_card(model_name="mixed")
    card = (tmp_path / "README.md").read_text()
    assert "image-classification" in card or "mixed" in card
    assert isinstance(trainer.model, TokenMixupModel)


def test_a_plain_trainer_is_refused(tmp_path: Path) -> None:
    model = build()
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"tokenmixup\.integrations\.transformers"):
            Trainer(model, arguments(tmp_path))
        TokenMixupTrainer(model, arguments(tmp_path))
    with pytest.raises(RuntimeError, match="TokenMixupTrainer"):
        Trainer(args=arguments(tmp_path), model_init=lambda: build())


def test_what_it_does_not_support_is_refused(tmp_path: Path) -> None:
    host = build().detach()
    hard = build(horizontal=replace(HTM, tau=0.05))
    smooth = arguments(tmp_path, label_smoothing_factor=0.2)
    sigmoid = build()
    sigmoid.backbone.config.problem_type = "multi_label_classification"
    parallel = arguments(tmp_path)
    assert parallel.n_gpu <= 1  # found out by this first question
    parallel._n_gpu = 4
    for model, options, error, match in (
        (host, {}, TypeError, "got ViTForImageClassification"),
        (build(), {"compute_loss_func": print}, ValueError, "override criterion"),
        (sigmoid, {}, ValueError, "multi_label"),
        (build(), {"args": parallel}, ValueError, "torchrun --nproc_per_node=4.*VISIBLE"),
        (hard, {"args": smooth}, ValueError, r"below 0\.0661"),
        (build(), {"args": arguments(tmp_path, label_names=["y"])}, ValueError, "'labels'"),
    ):
        with pytest.raises(error, match=match):
            TokenMixupTrainer(model, **{"args": arguments(tmp_path), **options})
    with pytest.raises(TypeError, match="got ViTForImageClassification"):
        TokenMixupTrainer(args=arguments(tmp_path), model_init=lambda: host)
    trainer = TokenMixupTrainer(build(), arguments(tmp_path))
    with pytest.raises(ValueError, match="'interpolate', 'pixel_values'"):
        trainer.compute_loss(trainer.model, {"interpolate": True, "pixel_values": images()})
    with pytest.raises(ValueError, match="a loss needs 'labels'"):
        trainer.compute_loss(trainer.model, {"pixel_values": images()})


class WithDropout(ViTForImageClassification):
    """A head of its own."""

    def __init__(self, config: Any) -> None:
        super().__init__(config)
        self.classifier = torch.nn.Sequential(torch.nn.Dropout(0.1), self.classifier)


def test_a_host_that_from_pretrained_would_not_make_is_refused(tmp_path: Path) -> None:
    """When the Trainer is made, not when it reads its checkpoints after the training."""
    for change, classes, match in (
        (lambda host: setattr(host, "classifier", torch.nn.Linear(32, 7)), 7, r"\(7,\).*\(5,\)"),
        (
            lambda host: setattr(host, "classifier", torch.nn.Sequential(host.classifier)),
            CLASSES,
            r"classifier\.0\.bias is \(5,\) in it, but missing",
        ),
        (
            lambda host: host.add_adapter(peft.LoraConfig(target_modules=["dense", "fc1"])),
            CLASSES,
            "base_layer.*accelerate",
        ),
    ):
        host = build().detach()
        change(host)
        model = attach(host, horizontal=HTM, num_classes=classes)
        with pytest.raises(ValueError, match=match):
            TokenMixupTrainer(model, arguments(tmp_path))
        with pytest.raises(ValueError, match=match):
            TokenMixupTrainer(
                args=arguments(tmp_path), model_init=partial(lambda model: model, model)
            )
    host = WithDropout(build().detach().config)
    options = {"save_strategy": "steps", "save_steps": 1}
    model = attach(host, vertical=VTM, num_classes=CLASSES)
    trained(tmp_path, model, max_steps=1, **options)
    whole = trained(tmp_path, model, max_steps=2, resume_from_checkpoint=True, **options)
    read = WithDropout.from_pretrained(tmp_path / "checkpoint-2")
    assert_same_weights(read, whole.model.backbone, **BIT_FOR_BIT)


def test_a_checkpoint_of_another_model_is_refused(tmp_path: Path) -> None:
    trained(tmp_path, max_steps=1, save_strategy="steps", save_steps=1)
    checkpoint = tmp_path / "checkpoint-1"
    for model, match in (
        (build(vertical=VerticalConfig(layers=(2,), kappa=5)), "kappa.*2.*kappa.*5"),
        (build(horizontal=None), "horizontal=.*null"),
    ):
        with pytest.raises(ValueError, match=match):
            trained(tmp_path, model, resume_from_checkpoint=str(checkpoint), max_steps=2)
    (checkpoint / "tokenmixup.safetensors").unlink()
    with pytest.raises(ValueError, match=r"no tokenmixup\.safetensors"):
        trained(tmp_path, resume_from_checkpoint=str(checkpoint), max_steps=2)


@pytest.mark.slow
@pytest.mark.parametrize("bf16", [False, True])
def test_compiled(tmp_path: Path, bf16: bool) -> None:
    plain = trained(tmp_path, max_steps=2, bf16=bf16)
    options = {"torch_compile_backend": "aot_eager", "bf16": bf16}
    compiled = trained(tmp_path, max_steps=2, save_strategy="steps", save_steps=1, **options)
    assert isinstance(compiled.model_wrapped, torch._dynamo.OptimizedModule)
    assert_same_weights(compiled.model, plain.model, rtol=1e-2 if bf16 else 1e-4, atol=1e-4)
    host = AutoModelForImageClassification.from_pretrained(tmp_path / "checkpoint-2").eval()
    assert torch.equal(logits_of(compiled.model), host(images()).logits)


@pytest.mark.slow
def test_two_processes(tmp_path: Path) -> None:
    """Each process mixes its own 8 images; the step is that of all 16, with checkpointing, too."""
    torch.multiprocessing.spawn(run, (str(tmp_path),), nprocs=2)
    expected = build()
    by_hand(expected, slice(0, 8), slice(8, 16))
    for checkpointed in (False, True):
        for rank in range(2):
            found = torch.load(tmp_path / f"{rank}_{checkpointed}.pt", weights_only=True)
            for name, value in weights(expected).items():
                torch.testing.assert_close(found[name], value, **SMALL)
        folder = tmp_path / str(checkpointed) / "checkpoint-1"
        host = AutoModelForImageClassification.from_pretrained(folder).eval()
        torch.testing.assert_close(host(images()).logits, logits_of(expected), **SMALL)
