"""A small ViT with the rules of a variant of a study."""

import timm
import torch

from experiments.study.variants import rules_of as rules_by_names
from tokenmixup import HorizontalConfig, VerticalConfig, attach

HTM, VTM = HorizontalConfig(layers=(1,), tau=9.0, rho=0.001), VerticalConfig(layers=(2,), kappa=3)


def vit(*names, horizontal=HTM, vertical=VTM, rules=None):
    """A ViT with a class token, 4 x 4 patches and 4 layers, with the named rules."""
    torch.manual_seed(0)
    host = timm.create_model(
        "vit_tiny_patch16_224",
        img_size=16,
        patch_size=4,
        embed_dim=32,
        depth=4,
        num_heads=2,
        num_classes=5,
    )
    rules = rules or rules_by_names(names)
    return attach(host, horizontal=horizontal, vertical=vertical, rules=rules).train()
