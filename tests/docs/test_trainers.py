"""docs/trainers.md: the code below its headings runs, and gives what the page promises."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.loss import PolyCrossEntropy
from transformers import TrainingArguments

from tests.helpers.documented import PRELUDE, code_of, imported, replaced, run_in_two_processes

CODE = code_of("trainers.md")
DATA_SETS = """
import torch
from transformers import ViTConfig, ViTForImageClassification
ViTForImageClassification(ViTConfig(
    hidden_size=32, num_hidden_layers=5, num_attention_heads=2, intermediate_size=64,
    image_size=16, patch_size=4, num_labels=100,
)).save_pretrained("pretrained")
train_dataset = eval_dataset = [
    {"pixel_values": torch.randn(3, 16, 16), "labels": label} for label in range(16)
]
"""


@pytest.fixture
def run(tmp_path: Path) -> Iterator[Callable[[str, str], dict[str, Any]]]:
    """Run code in an empty folder, and give the names that it defines."""
    with ExitStack() as stack:
        yield lambda name, code: vars(stack.enter_context(imported(tmp_path, name, code)))
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_trainer_of_transformers(run: Callable[..., Any]) -> None:
    changes = {
        "google/vit-base-patch16-224-in21k": "pretrained",
        'TrainingArguments("run", ': 'TrainingArguments("run", dataloader_pin_memory=False, ',
    }
    code = DATA_SETS + replaced(CODE["The Trainer of transformers"], changes)
    after = run("documented_trainer", code)
    assert after["trainer"].state.log_history[-1]["eval_top1"] >= 0
    images = torch.stack([sample["pixel_values"] for sample in after["eval_dataset"]])
    with torch.no_grad():
        expected = after["model"].eval()(images)
        assert torch.equal(after["plain"].eval()(images).logits, expected)
    arguments = TrainingArguments("own", dataloader_pin_memory=False, report_to=[])
    trainer = after["Poly1Trainer"](after["model"], arguments)
    found = trainer.evaluate(after["eval_dataset"])["eval_loss"]
    loss = PolyCrossEntropy(epsilon=1.0)(expected, torch.arange(16)).item()
    assert found == pytest.approx(loss, rel=1e-5)


def test_accelerate(run: Callable[..., Any], tmp_path: Path) -> None:
    after = run("documented_accelerate", PRELUDE + CODE["accelerate"])
    out, model = after["out"], after["model"]
    assert out.stats["htm/layer3/tokens_mixed"] > 0
    assert model.scorenets["3"].head.weight.grad is None  # zeroed after the last step
    saved = load_file(tmp_path / "checkpoint" / "model.safetensors")
    trained = {name: value.clone() for name, value in model.state_dict().items()}
    assert saved.keys() == trained.keys()
    torch.nn.init.ones_(model.scorenets["3"].head.weight)
    after["accelerator"].load_state("checkpoint")
    for name, value in model.state_dict().items():
        assert torch.equal(value, trained[name])
        assert torch.equal(value, saved[name])
    plain = timm.create_model("vit_base_patch16_224", num_classes=100)
    plain.load_state_dict(load_file(tmp_path / "plain" / "model.safetensors"))
    assert torch.equal(plain.head.weight, model.backbone.head.weight)


@pytest.mark.slow
def test_accelerate_in_two_processes(tmp_path: Path) -> None:
    """Both end with the weights of the checkpoint."""
    # in one write: lines of two processes would run into each other
    ended = """
import os
weights = [p.double().sum().item() for p in model.parameters()]
os.write(1, f"weights {weights}\\n".encode())
"""
    code = PRELUDE + CODE["accelerate"] + ended
    out = run_in_two_processes(tmp_path, code, ACCELERATE_USE_CPU="true")
    weights = [line for line in out.splitlines() if line.startswith("weights")]
    assert len(weights) == 2 and len(set(weights)) == 1
    assert out.count("epoch 1: top-1") == 1
