"""The table of trainers, made from the tests that run them.

docs/trainers.md and README.md show it. A cell of a variant is a case of
tests/docs/test_trainers_table.py, which trains a step with it; a feature names its test.
"""

import ast
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from tempfile import TemporaryDirectory
from typing import Any

import torch

from experiments.provenance import ROOT
from tests.helpers.host_builders import CLASSES
from tests.helpers.host_cases import BY_NAME, batch
from tokenmixup import HorizontalConfig, TokenMixupModel, VerticalConfig

HTM = HorizontalConfig(layers=(1,), rho=0.005, tau=0.3)
VTM = VerticalConfig(layers=(2,), kappa=3)
VARIANTS = {
    "HTM": {"horizontal": HTM},
    "VTM": {"vertical": VTM},
    "both": {"horizontal": HTM, "vertical": VTM},
}


@dataclass(frozen=True)
class Trainer:
    """One way to train.

    Attributes:
        name: what the table calls it.
        package: whose version the table names.
        write: what a user writes.
        features: feature -> the test that shows it, FILE::FUNCTION below tests/.
        host: the case of `host_cases` that is trained.
        step: trains the attached model for at least one optimiser step.
    """

    name: str
    package: str
    write: str
    features: dict[str, str]
    host: str
    step: Callable[[TokenMixupModel], object]

    def model(self, variant: str) -> TokenMixupModel:
        case = BY_NAME[self.host]
        return case.attach(case.build(), **VARIANTS[variant])


def own_loop(model: TokenMixupModel, wrap: Callable[[Any], Any] = lambda model: model) -> None:
    wrapped, (images, targets) = wrap(model.train()), batch(BY_NAME["vit"])
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    wrapped(images, targets).loss().backward()
    optimiser.step()


def by_timm(model: TokenMixupModel) -> None:
    from tokenmixup.integrations.timm import TokenMixupTask

    task = TokenMixupTask(model.train(), torch.nn.CrossEntropyLoss(), verbose=False)
    optimiser = torch.optim.SGD(task.parameters(), lr=0.1)
    images, _ = batch(BY_NAME["vit"])
    task(images, torch.arange(6) % CLASSES)["loss"].backward()
    optimiser.step()


def by_transformers(model: TokenMixupModel) -> None:
    from transformers import TrainingArguments

    from tokenmixup.integrations.transformers import TokenMixupTrainer

    images, _ = batch(BY_NAME["vit"])
    rows = [{"pixel_values": image, "labels": i % CLASSES} for i, image in enumerate(images)]
    with TemporaryDirectory() as folder:
        arguments = TrainingArguments(
            folder, max_steps=1, per_device_train_batch_size=6, use_cpu=True, report_to=[],
            save_strategy="no", disable_tqdm=True, learning_rate=0.1,
        )  # fmt: skip
        TokenMixupTrainer(model, arguments, train_dataset=rows).train()


def by_accelerate(model: TokenMixupModel) -> None:
    from accelerate import Accelerator

    accelerator = Accelerator(cpu=True)
    prepared, optimiser = accelerator.prepare(
        model.train(), torch.optim.SGD(model.parameters(), lr=0.1)
    )
    accelerator.backward(prepared(*batch(BY_NAME["vit"])).loss())
    optimiser.step()


def by_lightning(model: TokenMixupModel) -> None:
    import pytorch_lightning

    class Module(pytorch_lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def training_step(self, batch: list[torch.Tensor]) -> torch.Tensor:
            return self.model(*batch).loss()

        def configure_optimizers(self) -> torch.optim.Optimizer:
            return torch.optim.SGD(self.parameters(), lr=0.1)

    off = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    settings: dict[str, Any] = dict.fromkeys(off, False)
    trainer = pytorch_lightning.Trainer(max_steps=1, accelerator="cpu", **settings)
    data = torch.utils.data.TensorDataset(*batch(BY_NAME["vit"]))
    trainer.fit(Module(), torch.utils.data.DataLoader(data, batch_size=6))


def in_parallel(model: TokenMixupModel) -> None:
    from torch.nn.parallel import DistributedDataParallel

    store = torch.distributed.HashStore()
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        own_loop(model, DistributedDataParallel)
    finally:
        torch.distributed.destroy_process_group()


TIMM, HF = "tokenmixup/test_timm_task.py::", "tokenmixup/test_transformers_trainer.py::"
LIGHTNING, PARALLEL = "docs/test_lightning.py::", "tokenmixup/test_ddp.py::"
TRAINERS = (
    Trainer(
        "your own loop",
        "torch",
        "`model(images, targets).loss()`",
        {
            "mixed precision": "tokenmixup/test_amp.py::test_autocast",
            "activation checkpointing": "tokenmixup/test_checkpointing.py::"
            "test_gradients_are_those_without_checkpointing",
            "torch.compile": "tokenmixup/test_compile.py::test_every_host_compiles_to_one_graph",
        },
        "vit",
        own_loop,
    ),
    Trainer(
        "timm's train.py",
        "timm",
        "`attach`, and `TokenMixupTask` for `ClassificationTask`",
        {
            "Mixup, AMP, averaged weights, resume, validate.py": TIMM + "test_timms_scripts",
            "checkpoints of the plain model": TIMM
            + "test_checkpoints_are_the_hosts_own_and_resume_exactly",
            "compile": TIMM + "test_compiled",
            "DDP": TIMM + "test_distributed",
        },
        "vit",
        by_timm,
    ),
    Trainer(
        "Trainer of transformers",
        "transformers",
        "`attach`, and `TokenMixupTrainer` for `Trainer`",
        {
            "from_pretrained": HF + "test_from_pretrained_reads_every_checkpoint",
            "resume, bf16": HF + "test_a_resumed_training_is_an_uninterrupted_one",
            "accumulation": HF + "test_every_image_of_a_step_weighs_the_same",
            "compile": HF + "test_compiled",
            "DDP": HF + "test_two_processes",
        },
        "hf_vit",
        by_transformers,
    ),
    Trainer(
        "accelerate",
        "accelerate",
        "`accelerator.backward(out.loss())`",
        {
            "bf16, accumulation, clipping, saving": "docs/test_trainers.py::test_accelerate",
            "DDP": "docs/test_trainers.py::test_accelerate_in_two_processes",
        },
        "vit",
        by_accelerate,
    ),
    Trainer(
        "Lightning",
        "pytorch-lightning",
        "`self.model(images, labels).loss()` in `training_step`",
        {
            "bf16, EMA, accumulation, clipping": LIGHTNING + "test_training_is_that_of_a_loop",
            "statistics": LIGHTNING + "test_what_is_logged",
            "saving": LIGHTNING + "test_a_checkpoint_loads",
            "resume": LIGHTNING + "test_training_resumes",
            "SWA": LIGHTNING + "test_stochastic_weight_averaging_of_an_own_encoder",
            "DDP": LIGHTNING + "test_two_processes",
        },
        "vit",
        by_lightning,
    ),
    Trainer(
        "DDP, FSDP2, FSDP1",
        "torch",
        "`attach`, then wrap or shard what it returns",
        {
            "gradients of one process": PARALLEL
            + "test_gradients_are_the_average_of_the_processes",
            "bf16, checkpointing, compile": PARALLEL
            + "test_gradients_of_compiled_steps_and_of_more_hosts",
            "whole and sharded state dicts": PARALLEL
            + "test_whole_and_sharded_weights_are_saved_and_loaded",
        },
        "vit",
        in_parallel,
    ),
    Trainer(
        "adapters of peft",
        "peft",
        "`get_peft_model`, before `attach` or after it",
        {
            "LoRA and DoRA": "tokenmixup/test_projections.py::"
            "test_adapters_decide_as_their_merged_weights",
            "saving": "tokenmixup/test_projections.py::"
            "test_adapters_and_scorenets_are_saved_and_loaded",
        },
        "vit",
        partial(own_loop, wrap=lambda model: adapted(model)),
    ),
)


def adapted(model: TokenMixupModel) -> Any:
    import peft

    names = [f"scorenets.{layer}" for layer in model.scorenets]
    config = peft.LoraConfig(target_modules=["qkv"], modules_to_save=["backbone.head", *names])
    return peft.get_peft_model(model, config).train()


def functions(file: str) -> set[str]:
    """The tests of a file below tests/."""
    tree = ast.parse((ROOT / "tests" / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def table(name: str) -> str:
    """One row per trainer; the features only in the one of that name."""
    full = name == "features"
    head = ["trainer", *VARIANTS, "what to write", *(["tested with it"] if full else [])]
    lines = [head, ["---"] * len(head)]
    for trainer in TRAINERS:
        version = importlib.metadata.version(trainer.package)
        title = f"{trainer.name} ({trainer.package} {version})"
        row = [title, *("yes" for _ in VARIANTS), trainer.write]
        lines.append([*row, *([", ".join(trainer.features)] if full else [])])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)
