"""A small world for `reproduce`: a zoo of stand-ins, configs, and data sets, all in one folder.

Rows: CIFAR-10 baseline (nothing released), HTM, VTM, HVTM (its file is missing), CIFAR-100 HTM,
and ViTs of width 48 on a folder of images, one of them as npz.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml

from tests.helpers.standins import (
    cct_config,
    cct_state,
    make_cifar,
    make_image_folder,
    save_cct,
    save_vit,
    vit_npz,
    vit_state,
    write_yaml,
)

IMAGES = 16
VIT = {"image_size": 64, "kwargs": {"embed_dim": 48, "depth": 4, "num_heads": 3, "mlp_ratio": 2}}
CHECKPOINTS = {
    "cct_cifar10_htm": ("cct_cifar10_htm.pth.tar", "cifar10_HTM", "CIFAR-10", "HTM"),
    "cct_cifar10_vtm": ("cct_cifar10_vtm.pth.tar", "cifar10_VTM", "CIFAR-10", "VTM"),
    "cct_cifar10_hvtm": ("cct_cifar10_hvtm.pth.tar", "cifar10_HVTM", "CIFAR-10", "HTM + VTM"),
    "cct_cifar100_htm": ("cct_cifar100_htm.pth.tar", "cifar100_HTM", "CIFAR-100", "HTM"),
    "VIT_HTM": ("VIT_HTM.bin", "vit_HTM", "ImageNet-1K", "HTM"),
    "VIT_VTM": ("VIT_VTM.bin", "vit_VTM", "ImageNet-1K", "VTM"),
    "ViT": ("ViT.npz", "vit_plain", "ImageNet-1K", "before training"),
}


@dataclass(frozen=True)
class World:
    """Its folder; `replaced` is what makes torchvision accept its CIFAR (see standins)."""

    folder: Path
    replaced: dict[str, dict]

    @property
    def manifest(self) -> Path:
        return self.folder / "weights" / "zoo.yaml"

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    @property
    def results(self) -> Path:
        return self.folder / "results"

    def change(self, name: str, **fields) -> None:
        """Change fields of a checkpoint in the manifest."""
        content = yaml.safe_load(self.manifest.read_text())
        content["checkpoints"][name].update(fields)
        write_yaml(self.manifest, content)

    def words(self, *words) -> list[str]:
        """A command line of reproduce for this world."""
        places = ("--manifest", self.manifest, "--weights", self.weights, "--results", self.results)
        return [str(word) for word in (*words, *places)]


def make_world(folder: Path) -> World:
    """Build it; the file of one checkpoint is left out."""
    data, weights, configs = folder / "data", folder / "weights", folder / "configs"
    weights.mkdir(parents=True)
    replaced = {
        "CIFAR10": make_cifar(data, "cifar10", IMAGES),
        "CIFAR100": make_cifar(data, "cifar100", IMAGES),
    }
    make_image_folder(data / "imagenet", classes=5, images=10)
    for dataset, methods in {
        "cifar10": ("baseline", "HTM", "VTM", "HVTM"),
        "cifar100": ("HTM",),
    }.items():
        for method in methods:
            write_yaml(configs / f"{dataset}_{method}.yaml", cct_config(dataset, method, data))
    vit = {
        "model": {"name": "vit_base_patch16_224", **VIT},
        "data": {
            "dataset": "",
            "root": str(data / "imagenet"),
            "batch_size": 4,
            "workers": 0,
            "crop_pct": 0.875,
        },
        "device": "cpu",
    }
    horizontal = {"layers": [1], "tau": 0.1, "rho": 0.01, "scorenet": "cls"}
    write_yaml(configs / "vit_HTM.yaml", {**vit, "horizontal": horizontal})
    write_yaml(configs / "vit_VTM.yaml", {**vit, "vertical": {"layers": [2], "kappa": 3}})

    save_cct(weights / "cct_cifar10_htm.pth.tar", cct_state(10, htm=2, seed=1))
    save_cct(weights / "cct_cifar10_vtm.pth.tar", cct_state(10, vtm=1, seed=2))
    save_cct(weights / "cct_cifar100_htm.pth.tar", cct_state(100, htm=2, seed=3))
    write_yaml(configs / "vit_plain.yaml", vit)
    np.savez(weights / "ViT.npz", **vit_npz(5, seed=6))
    small = {"width": 48, "layers": 4, "mlp": 96, "tokens": 17}
    save_vit(weights / "VIT_HTM.bin", vit_state(5, htm=1, seed=4, **small))
    save_vit(weights / "VIT_VTM.bin", vit_state(5, seed=5, **small))

    checkpoints = {
        name: {
            "file": file,
            "drive": f"id-of-{name}",
            "config": config,
            "dataset": dataset,
            "method": method,
            "published_top1": 97.5,
        }
        for name, (file, config, dataset, method) in CHECKPOINTS.items()
    }
    content = {
        "tables": {
            "cifar": {"title": "CCT-7/3×1 on CIFAR"},
            "imagenet": {"title": "ViT & ImageNet"},
        },
        "datasets": {
            "CIFAR-10": {"table": "cifar", "images": IMAGES},
            "CIFAR-100": {"table": "cifar", "images": IMAGES},
            "ImageNet-1K": {"table": "imagenet", "images": 50000},
        },
        "baselines": {
            "cifar10_baseline": {
                "dataset": "CIFAR-10",
                "method": "baseline",
                "published_top1": 97.48,
                "note": "of its authors",
            }
        },
        "checkpoints": checkpoints,
    }
    write_yaml(weights / "zoo.yaml", content)
    return World(folder, replaced)


def copy_world(world: World, folder: Path) -> World:
    """The same zoo in another folder; configs and data stay where they are."""
    shutil.copytree(world.weights, folder / "weights")
    content = yaml.safe_load((folder / "weights" / "zoo.yaml").read_text())
    write_yaml(
        folder / "weights" / "zoo.yaml", {**content, "configs": str(world.folder / "configs")}
    )
    return World(folder, world.replaced)


def accept_cifar(world: World, monkeypatch) -> None:
    """Let torchvision take this world's CIFAR for the original."""
    from torchvision import datasets

    for owner, attributes in world.replaced.items():
        for attribute, value in attributes.items():
            monkeypatch.setattr(getattr(datasets, owner), attribute, value)
