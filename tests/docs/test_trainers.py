"""docs/trainers.md: the code below its headings runs, and gives what the page promises."""

import importlib
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from safetensors.torch import load_file
from timm.loss import PolyCrossEntropy
from transformers import TrainingArguments

from tests.helpers.documents import ROOT

TEXT = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
LOADERS = """
import functools, timm, torch
torch.manual_seed(0)
timm.create_model = functools.partial(
    timm.create_model, img_size=16, patch_size=4, embed_dim=32, depth=5, num_heads=2
)
pairs = [(torch.randn(3, 16, 16), label) for label in range(16)]
train_loader = torch.utils.data.DataLoader(pairs, batch_size=4)
validation_loader = torch.utils.data.DataLoader(pairs, batch_size=3)
"""
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


def code_below(heading: str) -> str:
    """With a tau and a rho with which an untrained model mixes."""
    section = TEXT.partition(f"\n## {heading}\n")[2].partition("\n## ")[0]
    code = "\n".join(re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL))
    return code.replace("tau=0.2, rho=0.005", "tau=9.0, rho=0.0")


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """Run code in an empty folder, and give the names that it defines."""

    def run(name: str, *code: str) -> dict[str, Any]:
        (tmp_path / f"{name}.py").write_text("\n".join(code), encoding="utf-8")
        return vars(importlib.import_module(name))

    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(timm, "create_model", timm.create_model)  # the code replaces it
    yield run
    AcceleratorState._reset_state(reset_partial_state=True)


def test_the_trainer_of_transformers(run: Callable[..., Any]) -> None:
    code = code_below("The Trainer of transformers")
    for theirs, ours in (
        ("google/vit-base-patch16-224-in21k", "pretrained"),
        ('TrainingArguments("run", ', 'TrainingArguments("run", dataloader_pin_memory=False, '),
    ):
        assert theirs in code
        code = code.replace(theirs, ours)
    after = run("documented_trainer", DATA_SETS, code)
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
    after = run("documented_accelerate", LOADERS, code_below("accelerate"))
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
    (tmp_path / "train.py").write_text(LOADERS + code_below("accelerate") + ended)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    environment = os.environ | {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    environment |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [*command, "train.py"],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    weights = [line for line in done.stdout.splitlines() if line.startswith("weights")]
    assert len(weights) == 2 and len(set(weights)) == 1
    assert done.stdout.count("epoch 1: top-1") == 1
