"""A host in its smallest form: timm's ViT with 4 layers, 4 patch tokens and 5 classes."""

import timm

SMALL = {"img_size": 32, "embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 2}


def vit(**settings):
    return timm.create_model("vit_base_patch16_224", num_classes=5, **SMALL | settings)
