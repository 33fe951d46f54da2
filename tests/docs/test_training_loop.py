"""docs/training_loop.md: its code runs in the order of the page, and its table is right."""

import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from timm.data.mixup import mixup_target
from timm.optim import param_groups_layer_decay

from experiments.provenance import ROOT
from tests.helpers.documented import PRELUDE, code_of, imported, replaced, run_in_two_processes
from tests.helpers.others_warnings import uses_inductor
from tokenmixup import HorizontalConfig
from tokenmixup.functional import sample_difficulty

pytestmark = uses_inductor

TEXT = (ROOT / "docs" / "training_loop.md").read_text(encoding="utf-8")

CODE = code_of("training_loop.md")
SHARDED = code_of("trainers.md")["FSDP and DDP"]
IN_PARALLEL = "Several GPUs"


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """The names defined after all blocks for one process have run."""
    code = [PRELUDE, *(code for heading, code in CODE.items() if heading != IN_PARALLEL)]
    folder = tmp_path_factory.mktemp("training_loop")
    with imported(folder, "documented_loop", "\n".join(code)) as module:
        yield vars(module)
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


@pytest.mark.parametrize(
    ("part", "saved"),
    [
        pytest.param(CODE[IN_PARALLEL], {}, id="DDP"),
        pytest.param(
            SHARDED,
            {"training.pt": {"backbone", "scorenets"}, "plain.pt": {"blocks", "head", "norm"}},
            id="FSDP",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_two_processes(part: str, saved: dict[str, set[str]], tmp_path: Path) -> None:
    ended = "\nassert not torch.distributed.is_initialized()\nprint('done', flush=True)\n"
    code = PRELUDE + CODE["The loop"] + part + ended
    changes = {'"cuda" if torch.cuda.is_available() else "cpu"': '"cpu"'}
    out = run_in_two_processes(tmp_path, replaced(code, changes))
    assert out.count("done") == 2
    for name, parts in saved.items():
        weights = torch.load(tmp_path / name, weights_only=True)
        assert parts <= {key.partition(".")[0] for key in weights}
        assert all(torch.isfinite(value).all() for value in weights.values())


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
