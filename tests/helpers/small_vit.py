"""A host in its smallest form: timm's ViT with 4 layers, 4 patch tokens and 5 classes."""

import timm


def vit(**kwargs):
    settings = {"embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 2, "num_classes": 5}
    return timm.create_model("vit_base_patch16_224", img_size=32, **settings | kwargs)
