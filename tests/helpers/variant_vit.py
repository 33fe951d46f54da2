"""A small ViT with the rules of a variant of a study."""

import torch

from experiments.study.variants import rules_of as rules_by_names
from tests.helpers import small_vit
from tokenmixup import HorizontalConfig, VerticalConfig, attach

HTM, VTM = HorizontalConfig(layers=(1,), tau=9.0, rho=0.001), VerticalConfig(layers=(2,), kappa=3)


def vit(*names, horizontal=HTM, vertical=VTM, rules=None):
    """A ViT with a class token, 4 x 4 patches and 4 layers, with the named rules."""
    torch.manual_seed(0)
    host = small_vit.vit(img_size=16, patch_size=4, embed_dim=32, num_heads=2, mlp_ratio=4)
    rules = rules or rules_by_names(names)
    return attach(host, horizontal=horizontal, vertical=vertical, rules=rules).train()
