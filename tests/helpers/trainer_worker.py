"""A tiny training by `TokenMixupTrainer`; a module of its own to be spawned."""

import gc
import os
import warnings
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import TrainingArguments

from tests.helpers.host_builders import randomise
from tokenmixup import HorizontalConfig, TokenMixupModel, VerticalConfig, attach
from tokenmixup.integrations.transformers import TokenMixupTrainer

CLASSES = 5
HTM = HorizontalConfig(layers=(1,), tau=9.0, rho=0.0, scorenet_lambda=0.5)
"""With which an untrained model mixes."""
VTM = VerticalConfig(layers=(2,), kappa=2)


def build(
    seed: int = 0,
    dropout: float = 0.0,
    horizontal: HorizontalConfig | None = HTM,
    vertical: VerticalConfig | None = VTM,
    kind: str = "ViT",
) -> TokenMixupModel:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        intermediate_size=64,
        image_size=16,
        patch_size=4,
        num_labels=CLASSES,
        hidden_dropout_prob=dropout,
    )
    host = getattr(transformers, f"{kind}ForImageClassification")(config)
    randomise(host)  # else attention is nearly uniform, and its rounding decides what is mixed
    return attach(host, horizontal=horizontal, vertical=vertical)


def data(count: int = 16) -> list[dict[str, Any]]:
    generator = torch.Generator().manual_seed(7)
    images = torch.randn(16, 3, 16, 16, generator=generator)
    return [
        {"pixel_values": image, "labels": index * 3 % CLASSES}
        for index, image in enumerate(images[:count])
    ]


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    """One batch, SGD at a constant rate, nothing saved, unless options say otherwise."""
    given = {
        "per_device_train_batch_size": 16,
        "optim": "sgd",
        "learning_rate": 0.1,
        "lr_scheduler_type": "constant",
        "max_grad_norm": 0.0,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }
    return TrainingArguments(str(folder), **{**given, **options})


class InOrder(TokenMixupTrainer):
    """Does not shuffle."""

    def get_train_dataloader(self) -> DataLoader[Any]:
        loader = DataLoader(
            self.train_dataset, self._train_batch_size, collate_fn=self.data_collator
        )
        return self.accelerator.prepare(loader)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def run(rank: int, folder: str) -> None:
    """A step of two processes, without and with checkpointing of activations."""
    warnings.simplefilter("error")
    warnings.filterwarnings("ignore", "`gradient_checkpointing` is deprecated", FutureWarning)
    torch.set_num_threads(1)
    os.environ |= {"GLOO_SOCKET_IFNAME": "lo", "MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_PORT": "0", "RANK": str(rank), "LOCAL_RANK": str(rank)}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2
    )
    for checkpointed in (False, True):
        given = arguments(
            Path(folder) / str(checkpointed),
            max_steps=1,
            per_device_train_batch_size=8,
            save_strategy="steps",
            save_steps=1,
            gradient_checkpointing=checkpointed or None,
            ddp_backend="gloo",
        )
        trainer = InOrder(build(), given, train_dataset=data())
        trainer.train()
        torch.save(weights(trainer.model), Path(folder) / f"{rank}_{checkpointed}.pt")
    del trainer
    gc.collect()  # a DistributedDataParallel that lives on may hang the exit: docs/log.md
    torch.distributed.destroy_process_group()
