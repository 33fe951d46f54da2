"""timm's train.py with TokenMixup: each flag's mechanism, by timm's own functions.

The last test runs train.py, validate.py and inference.py themselves.
"""

import argparse
import csv
import json
import os
import re
import runpy
import subprocess
import sys
import textwrap
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from timm.data import Mixup
from timm.loss import (
    BinaryCrossEntropy,
    JsdCrossEntropy,
    LabelSmoothingCrossEntropy,
    PolyCrossEntropy,
    SoftTargetCrossEntropy,
)
from timm.models import load_checkpoint
from timm.optim import create_optimizer_v2
from timm.task import load_task_ema_checkpoint, resume_task_checkpoint
from timm.utils import CheckpointSaver, dispatch_clip_grad, unwrap_model
from torch import nn

from experiments.provenance import ROOT
from tests.helpers.cases import same_bits
from tests.helpers.host_builders import CLASSES, IMAGE
from tests.helpers.host_cases import BY_NAME
from tokenmixup import HorizontalConfig, VerticalConfig, attach
from tokenmixup.integrations.timm import TokenMixupTask

HTM = HorizontalConfig(layers=(1,), tau=0.5, rho=0.005, scorenet_lambda=0.5)
EVERY = HorizontalConfig(layers=(1,), rho=0.005, scorenet=None)
VTM = VerticalConfig(layers=(2,), kappa=3)
BATCH = 6


def task(criterion=None, horizontal=HTM, vertical=VTM, **options):
    torch.manual_seed(3)
    model = attach(BY_NAME["vit"].build(), horizontal=horizontal, vertical=vertical)
    if criterion is None:
        criterion = LabelSmoothingCrossEntropy(0.1)
    return TokenMixupTask(model, criterion, verbose=False, **options)


def batch(number=0):
    generator = torch.Generator().manual_seed(number)
    images = torch.randn(BATCH, 3, IMAGE, IMAGE, generator=generator)
    return images, torch.randint(CLASSES - 1, (BATCH,), generator=generator)


def mixed_by_timm():
    """Images and soft targets, as `--mixup --cutmix` makes them."""
    return Mixup(mixup_alpha=0.8, cutmix_alpha=1.0, num_classes=CLASSES, label_smoothing=0.1)(
        *batch()
    )


# Losses

INDICES = {
    "plain": nn.CrossEntropyLoss(),
    "torch": nn.CrossEntropyLoss(label_smoothing=0.2),
    "smoothing": LabelSmoothingCrossEntropy(0.1),
    "bce": BinaryCrossEntropy(smoothing=0.1),
    "bce_without": BinaryCrossEntropy(smoothing=0.0),
    "bce_threshold": BinaryCrossEntropy(smoothing=0.1, target_threshold=0.2, sum_classes=True),
    "bce_weights": BinaryCrossEntropy(weight=torch.rand(CLASSES), pos_weight=3.0),
    "poly": PolyCrossEntropy(smoothing=0.1),
}
SOFT = {
    "soft": SoftTargetCrossEntropy(),
    **{name: INDICES[name] for name in INDICES if name not in ("torch", "smoothing")},
}
CASES = [
    *((f"{name}-indices", criterion, batch()) for name, criterion in INDICES.items()),
    *((f"{name}-mixup", criterion, mixed_by_timm()) for name, criterion in SOFT.items()),
]


@pytest.mark.parametrize(
    "criterion, data", [case[1:] for case in CASES], ids=[case[0] for case in CASES]
)
def test_the_loss_is_timms_where_nothing_is_mixed(criterion, data):
    images, targets = data
    hard = HorizontalConfig(layers=(1,), tau=0.11, rho=0.005, scorenet_lambda=0.5)
    for horizontal, enabled in ((None, True), (hard, True), (EVERY, False)):
        tested = task(criterion, horizontal=horizontal, vertical=None)
        model = tested.get_trainable_module()
        model.enabled = enabled
        with torch.no_grad():
            for scorenet in model.scorenets.values():  # sure of the class that no image has
                scorenet.head.bias.copy_(torch.eye(CLASSES)[-1] * 50)
            result = tested(images, targets)
            expected = criterion(model.backbone(images), targets)
        assert result.get("htm/layer1/mixed_share", 0) == 0
        assert (result["scorenet_loss"] > 0) == (horizontal is hard)
        loss = result["loss"] - result["scorenet_loss"]
        torch.testing.assert_close(loss, expected, rtol=1e-6, atol=1e-6)


def log_of(probability):
    return np.log(np.maximum(probability, 1e-30))


def by_hand(name, logits, targets):
    """The losses of mixed targets, sample by sample and class by class."""
    total = 0.0
    for row, target in zip(logits, targets, strict=True):
        chances = np.exp(row) / np.exp(row).sum()
        ones = 1 / (1 + np.exp(-row))
        if name.startswith("bce"):
            kept = (target > 0.2).astype(float) if name == "bce_threshold" else target
            terms = -(kept * log_of(ones) + (1 - kept) * log_of(1 - ones))
            total += terms.sum() if name == "bce_threshold" else terms.mean()
        else:
            total += -(target * log_of(chances)).sum()
            if name == "poly":
                total += 2 * (1 - (target * chances).sum())
    return total / len(logits)


@pytest.mark.parametrize("name", [name for name in INDICES if name != "bce_weights"])
def test_labels_are_smoothed_and_then_mixed(name):
    smoothing = {"plain": 0, "bce_without": 0, "torch": 0.2}.get(name, 0.1)
    images, labels = batch()
    smoothed = torch.full((BATCH, CLASSES), smoothing / CLASSES)
    for sample, label in enumerate(labels.tolist()):
        smoothed[sample, label] += 1 - smoothing
    tested = task(INDICES[name], horizontal=EVERY)
    out = tested.get_trainable_module()(images, smoothed)
    assert (out.targets != smoothed).any(1).sum() > 2
    expected = by_hand(name, out.logits.detach().double().numpy(), out.targets.double().numpy())
    result = tested(images, labels)
    assert result["loss"].item() == pytest.approx(expected, rel=1e-5)
    assert same_bits(result["output"], out.logits)


REFUSED = {
    "JsdCrossEntropy: allowed are torch's CrossEntropyLoss and": JsdCrossEntropy(),
    "MultiLabelSoftMarginLoss: allowed are": nn.MultiLabelSoftMarginLoss(),
    "cross_entropy: allowed are": nn.functional.cross_entropy,
    "CrossEntropyLoss: weights of classes": nn.CrossEntropyLoss(weight=torch.ones(CLASSES)),
    "CrossEntropyLoss: ignore_index": nn.CrossEntropyLoss(ignore_index=0),
    "CrossEntropyLoss: its reduction must be 'mean', got 'sum'": nn.CrossEntropyLoss(
        reduction="sum"
    ),
    "BinaryCrossEntropy: its reduction": BinaryCrossEntropy(reduction="none"),
    "BinaryCrossEntropy: smooth_dense": BinaryCrossEntropy(smooth_dense=True),
    "PolyCrossEntropy: its reduction": PolyCrossEntropy(reduction="none"),
}


@pytest.mark.parametrize("message", REFUSED)
def test_other_criteria_are_refused_by_name(message):
    with pytest.raises(ValueError, match=re.escape(f"cannot mix labels for {message}")):
        task(REFUSED[message])


def test_what_else_is_refused():
    with pytest.raises(ValueError, match="got VisionTransformer: write model = "):
        TokenMixupTask(BY_NAME["vit"].build(), nn.CrossEntropyLoss())
    # the entropy of 0.9 + 0.1/7, and six times 0.1/7, is 0.446
    low = HorizontalConfig(layers=(1,), tau=0.043, rho=0.005)
    with pytest.raises(ValueError, match=r"label smoothing 0\.1 and 7 .* is below 0\.0446"):
        task(LabelSmoothingCrossEntropy(0.1), horizontal=low)
    task(SoftTargetCrossEntropy(), horizontal=low)
    for criterion in (LabelSmoothingCrossEntropy(0.1), nn.CrossEntropyLoss(label_smoothing=0.1)):
        with pytest.raises(ValueError, match="soft already: use SoftTargetCrossEntropy"):
            task(criterion)(*mixed_by_timm())


def test_criterion_kwargs_make_the_same_task():
    expected = task(LabelSmoothingCrossEntropy(0.1))(*batch())["loss"]
    model = task().get_trainable_module()
    made = TokenMixupTask(model, criterion_kwargs={"smoothing": 0.1}, verbose=False)
    assert same_bits(made(*batch())["loss"], expected)


# A training


def optimiser_of(tested):
    return create_optimizer_v2(
        tested.get_trainable_module(), "adamw", lr=1e-2, weight_decay=0.1, layer_decay=0.7
    )


def train(tested, optimiser, updates):
    """train.py's loop: bfloat16, two batches per update, adaptive clipping, averaged weights."""
    tested.get_trainable_module().train()
    for update in updates:
        for half in range(2):
            with torch.autocast("cpu", torch.bfloat16):
                loss = tested(*batch(10 * update + half))["loss"]
            loss /= 2
            loss.backward()
        dispatch_clip_grad(tested.get_clip_parameters(exclude_head=True), 0.02, mode="agc")
        optimiser.step()
        optimiser.zero_grad()
        tested.update_ema(step=update)


def saver_of(tested, optimiser, folder):
    model = tested.get_trainable_module()
    return CheckpointSaver(model, optimiser, checkpoint_dir=str(folder), task=tested)


def state(tested):
    averages = tested.get_trainable_module(ema=True).state_dict()
    return {**tested.get_trainable_module().state_dict(), **averages}


def test_checkpoints_are_the_hosts_own_and_resume_exactly(tmp_path):
    straight = task()
    straight.get_trainable_module().set_grad_checkpointing()
    optimiser = optimiser_of(straight)
    straight.setup_ema(decay=0.5)
    train(straight, optimiser, (1, 2))
    saver_of(straight, optimiser, tmp_path).save_checkpoint(0, metric=1)
    file = str(tmp_path / "last.pth.tar")

    images, _ = batch()
    for ema, key in ((False, "state_dict"), (True, "state_dict_ema")):
        plain = BY_NAME["vit"].build_fresh(0).eval()
        saved = torch.load(file, weights_only=True)[key]
        assert saved.keys() == plain.state_dict().keys()
        load_checkpoint(plain, file, use_ema=ema)
        logits = straight.get_eval_model(ema=ema).eval()(images)
        assert same_bits(logits, plain(images))
    assert not same_bits(logits, straight.get_eval_model()(images))

    resumed = task()
    for parameter in resumed.parameters():
        nn.init.zeros_(parameter)
    resumed.get_trainable_module().set_grad_checkpointing()
    again = optimiser_of(resumed)
    assert resume_task_checkpoint(resumed, file, again) == 1
    resumed.setup_ema(decay=0.5)
    load_task_ema_checkpoint(resumed, file)
    for tested, its_optimiser in ((straight, optimiser), (resumed, again)):
        train(tested, its_optimiser, (3, 4))
    expected = state(straight)
    assert len(expected) == 2 * len(straight.get_trainable_module().state_dict())
    for name, value in state(resumed).items():
        assert same_bits(value, expected[name]), name


def test_averages_are_of_host_and_scorenets():
    tested = task()
    model, optimiser = tested.get_trainable_module(), optimiser_of(tested)
    tested.setup_ema(decay=0.5)
    train(tested, optimiser, (1,))
    expected = {name: value.clone() for name, value in model.state_dict().items()}  # timm's start
    for update in (2, 3):
        train(tested, optimiser, (update,))
        for name, value in model.state_dict().items():
            expected[name] = (expected[name] + value) / 2
    averages = tested.get_trainable_module(ema=True).module
    for name, value in averages.state_dict().items():
        torch.testing.assert_close(value, expected[name])
    images, _ = batch()
    assert not averages.training
    assert same_bits(tested.get_eval_model(ema=True)(images), averages(images))


@pytest.mark.parametrize(
    "horizontal, vertical, message",
    [
        (None, VTM, r"with horizontal={'layers': \(1,\), .* model has horizontal=None: resume"),
        (HTM, None, r"with vertical={'layers': \(2,\), 'kappa': 3, .* model has vertical=None"),
        (EVERY, VTM, "'tau': 0.5, .*'tau': None,"),
    ],
)
def test_resuming_with_other_settings_is_an_error(horizontal, vertical, message):
    saved = task().get_checkpoint_state()
    other = task(horizontal=horizontal, vertical=vertical)
    with pytest.raises(ValueError, match=message):
        other.load_checkpoint_state(saved["state_dict"], saved["task_state"])
    with pytest.raises(ValueError, match=r"training without TokenMixup .* --initial-checkpoint"):
        other.load_checkpoint_state(saved["state_dict"])


def test_adaptive_clipping_leaves_out_the_heads():
    """timm leaves out the last two parameters, which would be ScoreNet's."""
    tested = task()
    model = tested.get_trainable_module()
    names = {parameter: name for name, parameter in model.named_parameters()}
    assert [names[p] for p in tested.get_clip_parameters()] == list(names.values())
    clipped = {names[p] for p in tested.get_clip_parameters(exclude_head=True)}
    left_out = set(names.values()) - clipped
    heads = {f"scorenets.1.{name}" for name, _ in model.scorenets["1"].named_parameters()}
    assert left_out == {"backbone.head.weight", "backbone.head.bias", *heads}


def gradients(tested):
    model = unwrap_model(tested.get_trainable_module())
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def test_compiled(tmp_path):
    """The step is compiled as a whole, and evaluation is the compiled plain host."""
    images, labels = batch()
    eager, compiled = task(), task()
    for tested in (eager, compiled):
        tested.setup_ema(decay=0.5)
    compiled.compile(backend="aot_eager")
    compiled.compile_ema(backend="aot_eager")
    results = []
    for tested in (eager, compiled):
        tested.get_trainable_module().train()
        results.append(tested(images, labels))
        results[-1]["loss"].backward()
    torch.testing.assert_close(results[1], results[0])
    assert results[0]["htm/layer1/mixed_share"] > 0
    torch.testing.assert_close(gradients(compiled), gradients(eager))
    compiled.update_ema(step=1)
    for ema in (False, True):
        evaluated = compiled.get_eval_model(ema=ema).eval()
        expected = eager.get_eval_model(ema=ema).eval()
        with torch.inference_mode():
            torch.testing.assert_close(evaluated(images), expected(images))
        host = BY_NAME["vit"].build_fresh(0)
        (weights,) = (v for k, v in compiled.get_checkpoint_state(ema).items() if "dict" in k)
        host.load_state_dict(weights)


def test_distributed(tmp_path):
    """Only the training step goes through DistributedDataParallel, and no key tells of it."""
    alone, tested = task(), task()
    expected = alone.get_checkpoint_state()
    meeting = f"file://{tmp_path}/meeting"
    torch.distributed.init_process_group("gloo", init_method=meeting, rank=0, world_size=1)
    try:
        tested.prepare_distributed()
        with tested.no_sync():
            tested(*batch())["loss"].backward()
        alone(*batch())["loss"].backward()
        torch.testing.assert_close(gradients(tested), gradients(alone))
        found = tested.get_checkpoint_state()
        torch.testing.assert_close(found["state_dict"], expected["state_dict"])
        torch.testing.assert_close(
            found["task_state"]["scorenets"], expected["task_state"]["scorenets"]
        )
        assert tested.get_eval_model() is tested.get_trainable_module().module.backbone
        tested.load_checkpoint_state(expected["state_dict"], expected["task_state"])
    finally:
        torch.distributed.destroy_process_group()


# train.py itself

CHECKOUT = os.environ.get("TIMM_CHECKOUT")
PAGE = (ROOT / "docs" / "trainers.md").read_text(encoding="utf-8")
SECTION = re.search(r"^## timm's train.py$(.*?)(^## |\Z)", PAGE, re.DOTALL | re.MULTILINE)[1]
IMPORTS, ATTACH, TASK = re.findall(r"```python\n(.*?)```", SECTION, re.DOTALL)
SURELY = ATTACH.replace("tau=0.2", "tau=0.3")  # above ln(10) / 10: all samples are easy at first
AFTER_CREATION = "    if args.head_init_scale is not None:\n"
DESTROY = "    if torch.distributed.is_initialized(): torch.distributed.destroy_process_group()\n"
EDITS = (
    ("import torch\n", "import torch\n" + IMPORTS),
    (AFTER_CREATION, textwrap.indent(SURELY, "    ") + AFTER_CREATION),
    (TASK.partition("\n")[0].replace("TokenMixup", "Classification"), TASK.partition("\n")[0]),
    # not for TokenMixup: DistributedDataParallel takes no list of devices on a CPU
    ("device_ids=[device]", "device_ids=None"),
    # nor this: a process that leaves its group to the interpreter's end hangs there now and then
    ("    main()\n", "    main()\n" + DESTROY),
)
SIZES = {"img_size": "32", "patch_size": "8", "embed_dim": "48", "depth": "5", "num_heads": "3"}
COMMON = (
    *(
        "--model",
        "vit_tiny_patch16_224",
        "--model-kwargs",
        *map("=".join, SIZES.items()),
        "--num-classes",
        "10",
    ),
    *("--img-size", "32", "--workers", "0", "--device", "cpu", "--amp", "--amp-dtype", "bfloat16"),
)
RUNS = {
    "averaged": (
        *("--model-ema", "--model-ema-decay", "0.9", "--grad-accum-steps", "2"),
        *("--clip-grad", "0.5", "--clip-mode", "agc", "--grad-checkpointing"),
        *("--layer-decay", "0.7", "--head-init-scale", "0.5", "--mixup", "0"),
    ),
    "compiled": ("--mixup", "0.8", "--cutmix", "1.0", "--torchcompile", "aot_eager"),
    "two_processes": (
        "--bce-loss",
        "--bce-sum",
        "--clip-grad",
        "1",
        "--model-ema",
        "--model-ema-decay",
        "0.9",
    ),
}


def test_the_pages_lines_make_a_task(tmp_path):
    host = timm.create_model("vit_tiny_patch16_224", **{k: int(v) for k, v in SIZES.items()})
    utils = SimpleNamespace(is_primary=lambda args: False)
    names = {"model": host, "train_loss_fn": LabelSmoothingCrossEntropy(), "device": None}
    names |= {"dtype": None, "utils": utils, "args": None, "model_dtype": None}
    (tmp_path / "lines.py").write_text(IMPORTS + ATTACH + TASK, encoding="utf-8")
    names = runpy.run_path(str(tmp_path / "lines.py"), names)
    result = names["task"](*batch())
    assert type(names["task"]) is TokenMixupTask
    assert result["vtm/layer4/remembered_tokens"] == 4 * 3
    assert "htm/layer3/easy_share" in result


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    """A folder with timm's scripts, train.py with the lines of docs/trainers.md, and images."""
    from sklearn.datasets import load_digits

    folder = tmp_path_factory.mktemp("timm")
    for name in ("train.py", "validate.py", "inference.py"):
        text = (Path(CHECKOUT) / name).read_text(encoding="utf-8")
        if name == "train.py":
            for old, new in EDITS:
                assert old in text
                text = text.replace(old, new, 1)
        (folder / name).write_text(text, encoding="utf-8")
    digits = load_digits()
    for number in range(480):
        split = "train" if number < 400 else "validation"
        place = folder / "data" / split / str(digits.target[number])
        place.mkdir(parents=True, exist_ok=True)
        pixels = (digits.images[number] * 15.9).astype(np.uint8)
        Image.fromarray(pixels).convert("RGB").resize((32, 32)).save(place / f"{number}.png")
    return folder


def script(folder, *command):
    environment = dict(os.environ, PYTHONPATH=str(ROOT), GLOO_SOCKET_IFNAME="lo")
    command = [sys.executable, *command, *COMMON]
    done = subprocess.run(
        command, cwd=folder, env=environment, capture_output=True, text=True, timeout=1800
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.partition("--result\n")[2])


@pytest.mark.slow
@pytest.mark.skipif(not CHECKOUT, reason="TIMM_CHECKOUT names no folder with timm's train.py")
@pytest.mark.parametrize("name", RUNS)
def test_timms_scripts(name, scripts):
    """Training, resume, then validation and inference of the checkpoint as it is."""
    start = ["train.py"]
    if name == "two_processes":
        start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "train.py"]
    options = ("--data-dir", "data", "--experiment", name, "--opt", "adamw", "--lr", "1.5e-3")
    options = (*options, "--batch-size", "8", "--no-aug", "--warmup-epochs", "0", *RUNS[name])
    script(scripts, *start, *options, "--epochs", "5")
    run = scripts / "output" / "train" / name
    last = str(run / "last.pth.tar")
    script(scripts, *start, *options, "--epochs", "6", "--resume", last)

    with (run / "summary.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert rows[-1]["epoch"] == "5"
    reported = float(rows[-1]["eval_top1"])
    with torch.serialization.safe_globals([argparse.Namespace]):
        state = torch.load(last, weights_only=True)["task_state"]
    assert state["horizontal"]["tau"] == 0.3 and state["vertical"]["layers"] == (4,)
    assert state["scorenets"].keys() == {"3.head.weight", "3.head.bias"}
    checkpoint = ("--data-dir", "data", "--checkpoint", last)
    validated = script(scripts, "validate.py", *checkpoint, "--use-ema", "--split", "validation")
    assert validated["top1"] == pytest.approx(reported, abs=1e-3)
    assert validated["top5"] == pytest.approx(float(rows[-1]["eval_top5"]), abs=1e-3)
    flags = ("--topk", "1", "--include-index", "--fullname", "--label-type", "none")
    found = script(scripts, "inference.py", *checkpoint, "--split", "validation", *flags)
    assert len({answer["index"] for answer in found.values()}) > 1
    right = [answer["index"] == int(Path(file).parent.name) for file, answer in found.items()]
    assert 100 * sum(right) / len(right) == pytest.approx(reported, abs=1e-3)
