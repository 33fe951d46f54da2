"""docs/training_loop.md: its code runs in the order of the page, and its table is right."""

import functools
import importlib
import math
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from timm.data.mixup import mixup_target
from timm.optim import param_groups_layer_decay

from tests.helpers.documents import ROOT
from tests.helpers.others_warnings import uses_inductor
from tokenmixup import HorizontalConfig
from tokenmixup.functional import sample_difficulty

pytestmark = uses_inductor

TEXT = (ROOT / "docs" / "training_loop.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^## (.+?)$|```python\n(.*?)```", TEXT, flags=re.DOTALL | re.MULTILINE)

PRELUDE = """
import functools, timm, torch
torch.manual_seed(0)
timm.create_model = functools.partial(
    timm.create_model, img_size=16, patch_size=4, embed_dim=32, depth=5, num_heads=2
)
images = torch.randn(4, 8, 3, 16, 16)
loader = [(part, torch.randint(100, (8,))) for part in images]
"""


def blocks() -> dict[str, str]:
    """The code below each heading, with a tau and a rho with which an untrained model mixes."""
    found: dict[str, str] = {}
    heading = ""
    for title, code in BLOCKS:
        heading = title or heading
        if code:
            code = code.replace("tau=0.2, rho=0.005", "tau=9.0, rho=0.0")
            found[heading] = found.get(heading, "") + code
    return found


CODE = blocks()
IN_PARALLEL = "Several GPUs"


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names defined after all blocks for one process have run."""
    folder = tmp_path_factory.mktemp("training_loop")
    code = [code for heading, code in CODE.items() if heading != IN_PARALLEL]
    (folder / "documented_loop.py").write_text("\n".join([PRELUDE, *code]), encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        patch.setattr(timm, "create_model", timm.create_model)  # the prelude replaces it
        patch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
        yield vars(importlib.import_module("documented_loop"))
    torch._dynamo.reset()


def test_every_section_with_code_is_there() -> None:
    assert list(CODE) == [
        "The loop",
        "Mixed precision",
        "Mixup, CutMix, label smoothing",
        "Gradient accumulation",
        "Averaged weights",
        "Saving and loading",
        "Compiling",
        IN_PARALLEL,
        "Adapters of peft",
    ]


def test_training_mixes(after: dict[str, Any]) -> None:
    stats = after["out"].stats
    assert stats["htm/layer3/easy_share"] == 1
    assert stats["htm/layer3/tokens_mixed"] > 0
    assert stats["vtm/layer4/remembered_tokens"] == 4 * 3
    assert after["scaler"].get_scale() > 0
    assert 0 <= after["agreement"] <= 1


def test_the_page_names_the_keys(after: dict[str, Any]) -> None:
    model, plain, again = after["model"], after["plain"], after["again"]
    keys = {key.partition(".")[0] for key in model.state_dict()}
    assert keys == {"backbone", "scorenets"}
    images = after["images"]
    expected = model.eval()(images)
    model.train()
    assert torch.equal(plain.eval()(images), expected)
    assert torch.equal(again.eval()(images), expected)
    for name, value in model.scorenets.state_dict().items():
        assert torch.equal(again.scorenets.state_dict()[name], value)


def test_averaged_weights_are_those_of_a_plain_model(after: dict[str, Any]) -> None:
    averaged, images = after["ema"].module, after["images"]
    assert not averaged.training
    plain = after["timm"].create_model("vit_base_patch16_224", num_classes=100).eval()
    plain.load_state_dict(averaged.backbone.state_dict())
    assert torch.equal(plain(images), averaged(images))


def test_timms_layer_decay_is_that_of_the_host(after: dict[str, Any]) -> None:
    model = after["model"]
    scales = [
        {group["lr_scale"] for group in param_groups_layer_decay(one, layer_decay=0.5)}
        for one in (model, model.backbone)
    ]
    assert scales[0] == scales[1] and len(scales[0]) > 2


def test_peft_saves_the_scorenets(after: dict[str, Any]) -> None:
    saved = load_file(Path(after["__file__"]).parent / "adapters" / "adapter_model.safetensors")
    scorenet = after["attached"].scorenets["3"].state_dict()
    for name, value in scorenet.items():
        assert torch.equal(saved[f"base_model.model.scorenets.3.{name}"], value)
    assert after["attached"].scorenets["3"].head.weight.grad.abs().sum() > 0
    assert "base_model.model.backbone.head.weight" in saved


def test_two_processes(tmp_path: Path) -> None:
    ended = "\nassert not torch.distributed.is_initialized()\nprint('done', flush=True)\n"
    code = PRELUDE + CODE["The loop"] + CODE[IN_PARALLEL] + ended
    program = tmp_path / "train.py"
    program.write_text(code.replace('"cuda" if torch.cuda.is_available() else "cpu"', '"cpu"'))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc_per_node=2", str(program)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("done") == 2


def least(targets: torch.Tensor) -> float:
    """The difficulty of the best prediction, which is the target itself."""
    return sample_difficulty(targets.log(), targets)[0].item()


def limits(classes: int) -> list[float]:
    """A row of the table, from timm's own smoothing and mixing."""
    label = torch.tensor([0, 1])
    row = [least(mixup_target(label, classes, smoothing=s).double()) for s in (0.05, 0.1, 0.2)]
    row.append(least(mixup_target(label, classes, lam=0.5, smoothing=0.1).double()))
    return [*row, math.log(classes) / 10]


def test_the_table_of_limits_of_tau() -> None:
    rows = re.findall(r"^\| (10+) \| (0\.\d.*) \|$", TEXT, re.MULTILINE)
    assert [int(classes) for classes, _ in rows] == [10, 100, 1000]
    for classes, cells in rows:
        row = [f"{value:.3f}" for value in limits(int(classes))]
        assert cells.split(" | ") == row
        assert row[1] in (HorizontalConfig.__doc__ or "")
