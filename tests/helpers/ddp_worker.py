"""What each process of the DistributedDataParallel test does; a module of its own to be spawned."""

import os
import warnings
from pathlib import Path

import torch
import torch.distributed
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from tests.helpers.host_cases import BY_NAME, IMAGE
from tokenmixup import HorizontalConfig, TokenMixupModel, VerticalConfig, attach

HOSTS = ("vit", "rope_mixed", "beit", "torchvision", "cct")
PROCESSES, STEPS, CLASSES = 2, 2, 7
HTM = HorizontalConfig(layers=(1,), tau=0.1, rho=0.005)
VTM = VerticalConfig(layers=(2,), kappa=3)


def build(name: str) -> TokenMixupModel:
    """ScoreNet is sure of class 0: its samples are easy, all others are hard."""
    torch.manual_seed(5)
    model = attach(BY_NAME[name].build(), horizontal=HTM, vertical=VTM).train()
    nn.init.constant_(model.scorenets["1"].head.bias, 0)
    nn.init.constant_(model.scorenets["1"].head.bias[:1], 6)
    return model


def step(model: nn.Module, name: str, rank: int, number: int) -> dict[str, torch.Tensor]:
    """A step on the images of a process, which all show a class of its own."""
    side = 8 if name == "cct" else IMAGE
    generator = torch.Generator().manual_seed(10 * rank + number)
    images = torch.randn(4, 3, side, side, generator=generator)
    model.zero_grad()
    out = model(images, torch.full((4,), rank))
    (out.logits.square().mean() + out.scorenet_loss).backward()
    return {key: value.detach().clone() for key, value in out.stats.items()}


def gradients(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


def run(rank: int, folder: str) -> None:
    warnings.simplefilter("error")
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=PROCESSES
    )
    found = {}
    for name in HOSTS:
        model = build(name)
        parallel = DistributedDataParallel(model)  # find_unused_parameters stays False
        for number in range(STEPS):
            stats = step(parallel, name, rank, number)
            found[name, number] = (stats, gradients(model))
    torch.save(found, Path(folder) / f"{rank}.pt")
    torch.distributed.destroy_process_group()
