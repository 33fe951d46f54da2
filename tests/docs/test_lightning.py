"""docs/trainers.md, Lightning: the page's module trains as a loop written by hand does."""

import math
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import pytorch_lightning as L
import timm
import torch
from pytorch_lightning.callbacks import Callback, StochasticWeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import update_bn
from torch.utils.data import DataLoader

from tests.helpers.cases import same_bits
from tests.helpers.documented import PRELUDE, code_of, imported, replaced, run_in_two_processes
from tests.helpers.host_builders import IMAGE
from tests.helpers.host_cases import BY_NAME
from tests.helpers.others_warnings import advice_of_lightning
from tests.helpers.waits import Waits
from tokenmixup import HorizontalConfig, VerticalConfig, attach

pytestmark = advice_of_lightning

EPOCHS, IMAGES, CLASSES = 4, 16, 100


def page(devices: str = "") -> str:
    """The code, on a CPU."""
    quiet = f'L.Trainer(accelerator="cpu", enable_progress_bar=False, {devices}'
    return PRELUDE + replaced(code_of("trainers.md")["Lightning"], {"L.Trainer(": quiet})


@pytest.fixture(scope="module")
def lightning(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModuleType]:
    """What the page defines, after its training: `trainer`."""
    with imported(tmp_path_factory.mktemp("lightning"), "documented_lightning", page()) as module:
        torch.manual_seed(1)
        module.trainer = module.main()
        yield module


def afresh(lightning: ModuleType) -> Any:
    """The page's module before its training."""
    torch.manual_seed(1)
    return lightning.TokenMixupModule(**lightning.trainer.lightning_module.hparams)


def a_trainer(**settings: Any) -> L.Trainer:
    """One that writes nothing, unless it is told to."""
    quiet = {"accelerator": "cpu", "enable_progress_bar": False, "enable_checkpointing": False}
    return L.Trainer(**{**quiet, "logger": False, **settings})


def steps_by_hand(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    batches: Iterable[tuple[Tensor, Tensor]],
    parts: int,
    low_precision: bool = False,
) -> Iterator[None]:
    """Train; come back after each step of the optimiser, which has so many parts."""
    for number, (images, labels) in enumerate(batches, 1):
        with torch.autocast("cpu", torch.bfloat16, enabled=low_precision):
            loss = model(images, labels).loss()
        (loss / parts).backward()
        if number % parts == 0:
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            yield


def test_training_is_that_of_a_loop(lightning: ModuleType) -> None:
    model = afresh(lightning).model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=0.05)
    average: list[Tensor] = []
    for epoch in range(EPOCHS):
        optimiser.param_groups[0]["lr"] = 5e-4 * (1 + math.cos(math.pi * epoch / EPOCHS)) / 2
        for _ in steps_by_hand(model, optimiser, lightning.train_loader, 2, low_precision=True):
            now = [parameter.detach().clone() for parameter in model.parameters()]
            pairs = zip(average or now, now, strict=True)
            average = [0.99 * before + 0.01 * weight for before, weight in pairs]
    trained = lightning.trainer.lightning_module.model
    for found, expected in zip(trained.parameters(), average, strict=True):
        torch.testing.assert_close(found.data, expected, atol=1e-6, rtol=0)
    assert (average[-1] - now[-1]).abs().max() > 1e-4


def test_what_is_logged(lightning: ModuleType) -> None:
    metrics = lightning.trainer.callback_metrics
    assert metrics["htm/layer3/easy_share"] == 1 and metrics["htm/layer3/tokens_mixed"] > 0
    assert metrics["vtm/layer4/remembered_tokens"] == 4 * 3
    plain = plain_model()
    hits = torch.cat(
        [plain(images).argmax(1) == labels for images, labels in lightning.validation_loader]
    )
    # of bfloat16: an image or two may be predicted otherwise
    assert abs(metrics["top1"] - hits.float().mean()) <= 2.5 / len(hits)


def plain_model() -> nn.Module:
    """From the file that the page writes last."""
    model = timm.create_model("vit_base_patch16_224", num_classes=CLASSES)
    model.load_state_dict(torch.load("plain.pt", weights_only=True))
    return model.eval()


def test_a_checkpoint_loads(lightning: ModuleType) -> None:
    again = lightning.TokenMixupModule.load_from_checkpoint(f"checkpoints/epoch={EPOCHS - 1}.ckpt")
    trained = lightning.trainer.lightning_module
    assert again.model.horizontal == trained.model.horizontal
    for name, value in trained.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name
    images = next(iter(lightning.validation_loader))[0]
    assert same_bits(again.model.eval()(images), plain_model()(images))


def test_training_resumes(lightning: ModuleType) -> None:
    torch.manual_seed(2)
    module = lightning.TokenMixupModule(**lightning.trainer.lightning_module.hparams)
    lightning.make_trainer().fit(
        module,
        lightning.train_loader,
        lightning.validation_loader,
        ckpt_path="checkpoints/epoch=1.ckpt",
    )
    for name, value in lightning.trainer.lightning_module.state_dict().items():
        assert same_bits(module.state_dict()[name], value), name


def test_logging_the_statistics_does_not_wait_for_the_device(
    lightning: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    counts = {}
    for every in (50, 2):
        trainer = a_trainer(
            max_epochs=1, logger=L.loggers.CSVLogger(f"every_{every}"), log_every_n_steps=every
        )
        with Waits() as waits:
            trainer.fit(afresh(lightning), lightning.train_loader)
        counts[every] = waits.read
    monkeypatch.setattr(lightning.TokenMixupModule, "log_dict", lambda *_: None)
    with Waits() as waits:
        a_trainer(max_epochs=1).fit(afresh(lightning), lightning.train_loader)
    assert waits.read == counts[50] < counts[2]


def test_a_model_in_evaluation_mode(lightning: ModuleType) -> None:
    module = afresh(lightning).eval()
    with pytest.raises(ValueError, match=r"in evaluation mode.*call model.train\(\)"):
        a_trainer(max_epochs=1).fit(module, lightning.train_loader)


class Weights(Callback):
    """Keeps the weights at the beginning of each epoch."""

    def __init__(self) -> None:
        self.kept: list[list[Tensor]] = []

    def on_train_epoch_start(self, trainer: Any, module: Any) -> None:
        self.kept.append([p.detach().clone() for p in module.parameters()])


def test_stochastic_weight_averaging_of_an_own_encoder(lightning: ModuleType) -> None:
    """With batch normalisation, a fused evaluation, and a validation after each epoch."""
    case = BY_NAME["encoder"]

    class Module(lightning.TokenMixupModule):
        def __init__(self) -> None:
            L.LightningModule.__init__(self)
            self.save_hyperparameters({"lr": 1e-3, "weight_decay": 0.0})
            encoder = case.build()
            self.model = attach(
                nn.Sequential(nn.BatchNorm2d(3), encoder),
                layers=encoder.get_submodule("encoder.layers").children(),
                num_prefix_tokens=case.num_prefix_tokens,
                class_token=case.class_token,
                num_classes=7,
                horizontal=HorizontalConfig(layers=(1,), tau=9.0, rho=0.0),
                vertical=VerticalConfig(layers=(2,), kappa=3),
            )

    torch.manual_seed(3)
    loader = DataLoader(
        [(torch.randn(3, IMAGE, IMAGE) + 1, i % 7) for i in range(16)], batch_size=8
    )
    module, weights = Module(), Weights()
    averaging = StochasticWeightAveraging(swa_lrs=1e-2, swa_epoch_start=2)
    trainer = a_trainer(max_epochs=EPOCHS, callbacks=[weights, averaging])
    trainer.fit(module, loader, loader)
    assert trainer.callback_metrics["htm/layer1/tokens_mixed"] > 0
    kept = zip(*weights.kept[1:EPOCHS], strict=True)
    for found, values in zip(module.parameters(), kept, strict=True):
        torch.testing.assert_close(found.data, torch.stack(values).mean(0), atol=1e-6, rtol=1e-5)

    norm = module.model.backbone[0]
    statistics = [norm.running_mean.clone(), norm.running_var.clone()]
    flat = [images.transpose(0, 1).flatten(1) for images, _ in loader]
    expected = [sum(one.mean(1) for one in flat) / 2, sum(one.var(1) for one in flat) / 2]
    torch.testing.assert_close(statistics, expected)
    module.model.enabled = False
    update_bn(loader, module.model)
    torch.testing.assert_close([norm.running_mean, norm.running_var], expected)


IN_PARALLEL = """
import copy

class Exact(TokenMixupModule):
    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

torch.manual_seed(1)
mixing = {"layers": (3,), "tau": 9.0, "rho": 0.0, "scorenet_lambda": 1.0}
module = Exact(mixing, {"layers": (4,), "kappa": 3})
before = copy.deepcopy(module.model)
trainer = L.Trainer(
    accelerator="cpu", strategy="ddp", devices=2, max_epochs=2, accumulate_grad_batches=2,
    gradient_clip_val=1.0, logger=False, enable_progress_bar=False, enable_checkpointing=False,
    use_distributed_sampler=False,  # Lightning's shuffles
)
own = torch.utils.data.DataLoader(pairs[trainer.global_rank :: 2], batch_size=4)
trainer.fit(module, own)
torch.save(
    (pairs, before.state_dict(), module.model.state_dict()), f"rank_{trainer.global_rank}.pt"
)
"""


@pytest.mark.slow
def test_two_processes(lightning: ModuleType, tmp_path: Path) -> None:
    """Lightning starts the second one itself."""
    code = page(devices='strategy="ddp", devices=2,') + IN_PARALLEL
    run_in_two_processes(tmp_path, code, launcher=())
    plain = torch.load(tmp_path / "plain.pt", weights_only=True)
    last = tmp_path / "checkpoints" / f"epoch={EPOCHS - 1}.ckpt"
    saved = torch.load(last, weights_only=True)["state_dict"]
    for name, value in plain.items():
        assert torch.equal(saved[f"model.backbone.{name}"], value), name

    (pairs, start, first), (_, _, second) = (
        torch.load(tmp_path / f"rank_{rank}.pt", weights_only=True) for rank in range(2)
    )
    mixing = {"layers": (3,), "tau": 9.0, "rho": 0.0, "scorenet_lambda": 1.0}
    model = lightning.TokenMixupModule(mixing, {"layers": (4,), "kappa": 3}).model
    model.load_state_dict(start)
    places = [2 * batch + 2 * i + rank for batch in (0, 4) for rank in range(2) for i in range(4)]
    loader = DataLoader([pairs[place] for place in places], batch_size=4)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(2):
        for _ in steps_by_hand(model.train(), optimiser, loader, 4):
            pass
    moved = {"backbone": 0.0, "scorenets": 0.0}
    for name, expected in model.state_dict().items():
        one, other = first[name], second[name]
        assert torch.equal(one, other)
        torch.testing.assert_close(one, expected, atol=1e-5, rtol=0)
        part = name.partition(".")[0]
        moved[part] = max(moved[part], (one - start[name]).abs().max().item())
    assert min(moved.values()) > 5e-4, moved  # far more than the tolerance
