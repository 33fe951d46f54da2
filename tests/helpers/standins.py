"""Stand-ins for what the tests cannot have: released checkpoints, CIFAR, ImageNet.

Formats, names and shapes are the real ones; weights and pixels are random.

Dimensions: D width, C classes, L layers.
"""

import argparse
import hashlib
import pickle
from pathlib import Path

import numpy as np
import torch
import yaml
from PIL import Image

NAMES = {"HTM": (2, None), "VTM": (None, 1), "HVTM": (2, 3)}  # layers of CIFAR-10's HTM and VTM


class Random:
    """Random parameters of layers, by the names in a state dict."""

    def __init__(self, seed, width, scale):
        self.generator = torch.Generator().manual_seed(seed)
        self.width, self.scale = width, scale

    def __call__(self, *shape, scale=0.02):
        return torch.randn(*shape, generator=self.generator) * scale

    def norm(self, name):
        return {f"{name}.weight": 1 + self(self.width), f"{name}.bias": self(self.width)}

    def linear(self, name, out, into):
        return {f"{name}.weight": self(out, into, scale=self.scale), f"{name}.bias": self(out)}


def cct_state(classes, htm=None, vtm=None, width=256, layers=7, tokens=256, seed=0):
    """A CCT's state dict: one 3x3 convolution, MLP ratio 2, ScoreNet at layer `htm`."""
    random = Random(seed, width, scale=0.1)
    norm, linear = random.norm, random.linear
    state = {"tokenizer.conv_layers.0.0.weight": random(width, 3, 3, 3, scale=0.2)}
    state["classifier.positional_emb"] = random(1, tokens, width, scale=0.2)
    state |= linear("classifier.attention_pool", 1, width)
    for layer in range(layers):
        block = f"classifier.blocks.{layer}"
        state |= norm(f"{block}.pre_norm") | norm(f"{block}.norm1")
        if layer == vtm:
            for part in ("query", "key", "value"):
                state[f"{block}.self_attn.{part}.weight"] = random(width, width, scale=0.1)
        else:
            state[f"{block}.self_attn.qkv.weight"] = random(3 * width, width, scale=0.1)
        state |= linear(f"{block}.self_attn.proj", width, width)
        state |= linear(f"{block}.linear1", 2 * width, width)
        state |= linear(f"{block}.linear2", width, 2 * width)
        if layer == htm:
            state |= linear(f"{block}.small_h_attention_pool", 1, width)
            state |= linear(f"{block}.small_h_fc", classes, width)
    return state | norm("classifier.norm") | linear("classifier.fc", classes, width)


def vit_state(classes, htm=None, width=768, layers=12, mlp=3072, patch=16, tokens=197, seed=0):
    """A ViT's state dict under the released names; VTM changes none of them."""
    random = Random(seed, width, scale=0.05)
    norm, linear = random.norm, random.linear
    embeddings = "transformer.embeddings"
    state = {
        f"{embeddings}.position_embeddings": random(1, tokens, width),
        f"{embeddings}.cls_token": random(1, 1, width),
        f"{embeddings}.patch_embeddings.weight": random(width, 3, patch, patch, scale=0.05),
        f"{embeddings}.patch_embeddings.bias": random(width),
    }
    for layer in range(layers):
        block = f"transformer.encoder.layer.{layer}"
        state |= norm(f"{block}.attention_norm") | norm(f"{block}.ffn_norm")
        state |= linear(f"{block}.ffn.fc1", mlp, width) | linear(f"{block}.ffn.fc2", width, mlp)
        for part in ("query", "key", "value", "out"):
            state |= linear(f"{block}.attn.{part}", width, width)
        if layer == htm:
            state |= linear(f"{block}.scorenet", classes, width)
    return state | norm("transformer.encoder.encoder_norm") | linear("head", classes, width)


def save_cct(path: Path, state) -> Path:
    """As timm's CheckpointSaver writes it: with a Namespace of arguments, and an optimiser."""
    content = {
        "epoch": 1509,
        "arch": "cct_7_3x1_32",
        "state_dict": state,
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 1e-5, "params": [0]}]},
        "version": 2,
        "args": argparse.Namespace(model="cct_7_3x1_32", lr=5e-4, mean=(0.5, 0.5, 0.5), crop=None),
        "metric": 97.57,
    }
    torch.save(content, path)
    return path


def save_vit(path: Path, state) -> Path:
    """As the released ViT checkpoints are: a bare state dict."""
    torch.save(state, path)
    return path


def vit_npz(classes, width=48, layers=4, heads=3, mlp=96, patch=16, tokens=17, seed=0):
    """Arrays of a ViT under Google's names, as in `ViT-B_16-224.npz`."""
    generator = np.random.default_rng(seed)

    def random(*shape, scale=0.05):
        return (scale * generator.standard_normal(shape)).astype(np.float32)

    def norm(name):
        return {f"{name}/scale": 1 + random(width), f"{name}/bias": random(width)}

    each = width // heads
    arrays = {
        "cls": random(1, 1, width),
        "embedding/kernel": random(patch, patch, 3, width),
        "embedding/bias": random(width),
        "Transformer/posembed_input/pos_embedding": random(1, tokens, width),
        "head/kernel": random(width, classes),
        "head/bias": random(classes),
        **norm("Transformer/encoder_norm"),
    }
    for layer in range(layers):
        block = f"Transformer/encoderblock_{layer}"
        arrays |= norm(f"{block}/LayerNorm_0") | norm(f"{block}/LayerNorm_2")
        for number, (into, out) in enumerate(((width, mlp), (mlp, width))):
            arrays[f"{block}/MlpBlock_3/Dense_{number}/kernel"] = random(into, out)
            arrays[f"{block}/MlpBlock_3/Dense_{number}/bias"] = random(out)
        attention = f"{block}/MultiHeadDotProductAttention_1"
        for part in ("query", "key", "value"):
            arrays[f"{attention}/{part}/kernel"] = random(width, heads, each)
            arrays[f"{attention}/{part}/bias"] = random(heads, each)
        arrays[f"{attention}/out/kernel"] = random(heads, each, width)
        arrays[f"{attention}/out/bias"] = random(width)
    return arrays


def make_cifar(root: Path, kind: str, images: int) -> dict[str, list]:
    """CIFAR-10 or CIFAR-100 with random pixels, in the format of the original archives.

    torchvision compares the files with the hashes of the originals, so these must be replaced by
    those of the files that are made here.

    Returns:
        What to replace: attribute of torchvision's class -> value.
    """
    from torchvision import datasets

    owner = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[kind]
    classes = {"cifar10": 10, "cifar100": 100}[kind]
    label_key = {"cifar10": "labels", "cifar100": "fine_labels"}[kind]
    folder = root / owner.base_folder
    folder.mkdir(parents=True)
    generator = np.random.default_rng(0)
    hashes = {}

    def write(name, content):
        path = folder / name
        path.write_bytes(pickle.dumps(content, protocol=2))
        hashes[name] = hashlib.md5(path.read_bytes()).hexdigest()

    for name, _ in (*owner.train_list, *owner.test_list):
        pixels = generator.integers(0, 256, size=(images, 3072), dtype=np.uint8)
        labels = generator.integers(0, classes, size=images).tolist()
        write(name, {"data": pixels, label_key: labels})
    key = owner.meta["key"]
    write(owner.meta["filename"], {key: [str(number) for number in range(classes)]})
    return {
        "train_list": [[name, hashes[name]] for name, _ in owner.train_list],
        "test_list": [[name, hashes[name]] for name, _ in owner.test_list],
        "meta": {**owner.meta, "md5": hashes[owner.meta["filename"]]},
    }


def make_image_folder(root: Path, classes: int, images: int, size=72, seed=0) -> None:
    """A folder of JPEG images in ImageNet's form: root/split/class/image."""
    generator = np.random.default_rng(seed)
    for split in ("train", "validation"):
        for label in range(classes):
            (root / split / f"n{label:08d}").mkdir(parents=True)
        for number in range(images):
            pixels = generator.integers(0, 256, size=(size, size, 3), dtype=np.uint8)
            folder = root / split / f"n{number % classes:08d}"
            Image.fromarray(pixels).save(folder / f"{split}_{number:08d}.JPEG")


def cct_config(dataset: str, method: str, root: Path, **model) -> dict:
    """A config for CCT-7/3x1, as the paper's are, with the layers of `NAMES`."""
    htm, vtm = NAMES.get(method, (None, None))
    config = {
        "model": {"name": "cct_7_3x1_32", **model},
        "data": {
            "dataset": f"torch/{dataset}",
            "root": str(root),
            "batch_size": 16,
            "workers": 0,
        },
        "device": "cpu",
    }
    if htm is not None:
        config["horizontal"] = {"layers": [htm], "tau": 0.1, "rho": 0.003}
    if vtm is not None:
        config["vertical"] = {"layers": [vtm], "kappa": 5}
    return config


def write_yaml(path: Path, content) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(content, sort_keys=False), encoding="utf-8")
    return path
