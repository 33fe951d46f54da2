"""Small instances of every host that `attach` takes: one table, which all host tests run over.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, C classes.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn

importlib.import_module("experiments.models")  # registers CCT with timm and with TokenMixup

CLASSES, DEPTH, HEADS, WIDTH, IMAGE, PATCH = 7, 3, 2, 32, 32, 8
PATCHES = (IMAGE // PATCH) ** 2


@dataclass(frozen=True)
class HostCase:
    """One host.

    build takes the rate of every kind of dropout that the host has, drop path included.
    model, prefix, covers: what the table of supported hosts says of it.
    """

    name: str
    family: str
    model: str
    prefix: str
    build_fresh: Callable[[float], nn.Module]
    covers: str = ""
    fixed_size: bool = True

    @property
    def class_token(self) -> bool:
        return "class" in self.prefix.split(", ")

    @property
    def num_prefix_tokens(self) -> int:
        """Of "class, 4 registers", for example, 5."""
        parts = [] if self.prefix == "none" else self.prefix.split(", ")
        return sum(int(part.split()[0]) if part[0].isdigit() else 1 for part in parts)

    def build(self, dropout: float = 0.0) -> nn.Module:
        host = self.build_fresh(dropout)
        randomise(host)
        return host.train()


@torch.no_grad()
def randomise(host: nn.Module) -> None:
    """Weights far from a fresh model's, so that attention is not uniform and no branch is off."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in host.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if "rope" in name:
            continue  # frequencies
        if parameter.dim() == 1:
            parameter.add_(0.3 * noise)
        elif any(part in name for part in ("pos_embed", "token", "position")):
            parameter.copy_(0.5 * noise)
        else:
            parameter.copy_(1.3 * noise / parameter[0].numel() ** 0.5)


def timm_host(model: str, **settings: Any) -> Callable[[float], nn.Module]:
    sizes = {
        "img_size": IMAGE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": CLASSES,
    }

    def build(dropout: float) -> nn.Module:
        names = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
        return timm.create_model(model, **dict.fromkeys(names, dropout), **sizes | settings)

    return build


def cct_host(dropout: float) -> nn.Module:
    names = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")
    return timm.create_model(
        "cct_7_3x1_32",
        img_size=8,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
        **dict.fromkeys(names, dropout),
    )


def torchvision_host(dropout: float) -> nn.Module:
    from torchvision.models import VisionTransformer

    return VisionTransformer(
        IMAGE,
        PATCH,
        DEPTH,
        HEADS,
        WIDTH,
        mlp_dim=48,
        dropout=dropout,
        attention_dropout=dropout,
        num_classes=CLASSES,
    )


def transformers_host(
    name: str, implementation: str, drop_path: bool = False, **settings: Any
) -> Callable[[float], nn.Module]:
    def build(dropout: float) -> nn.Module:
        import transformers  # takes seconds, so only where a case is built

        rates = {"hidden_dropout_prob": dropout, "attention_probs_dropout_prob": dropout}
        config = getattr(transformers, f"{name}Config")(
            image_size=IMAGE,
            patch_size=PATCH,
            hidden_size=WIDTH,
            num_hidden_layers=DEPTH,
            num_attention_heads=HEADS,
            intermediate_size=48,
            num_labels=CLASSES,
            attn_implementation=implementation,
            **rates,
            **({"drop_path_rate": dropout} if drop_path else {}),
            **settings,
        )
        return getattr(transformers, f"{name}ForImageClassification")(config)

    return build


VIT, EVA, BEIT = "timm VisionTransformer", "timm Eva", "timm Beit"
TORCHVISION = "torchvision VisionTransformer"

CASES = (
    HostCase(
        "vit",
        VIT,
        "vit_base_patch16_224",
        "class",
        timm_host("vit_base_patch16_224"),
    ),
    HostCase("deit", VIT, "deit_tiny_patch16_224", "class", timm_host("deit_tiny_patch16_224")),
    HostCase(
        "deit_distilled",
        VIT,
        "deit_tiny_distilled_patch16_224",
        "class, distillation",
        timm_host("deit_tiny_distilled_patch16_224"),
        "mean of both heads; training with a teacher is refused",
    ),
    HostCase(
        "deit3",
        VIT,
        "deit3_small_patch16_224",
        "class",
        timm_host("deit3_small_patch16_224"),
        "LayerScale, class token without position",
    ),
    HostCase(
        "registers",
        VIT,
        "vit_base_patch16_reg4_gap_256",
        "4 registers",
        timm_host("vit_base_patch16_reg4_gap_256"),
        "saliency from the mean over all queries",
    ),
    HostCase(
        "siglip",
        VIT,
        "vit_base_patch16_siglip_224",
        "none",
        timm_host("vit_base_patch16_siglip_224"),
        "attention pooling",
    ),
    HostCase(
        "dinov2",
        VIT,
        "vit_small_patch14_reg4_dinov2",
        "class, 4 registers",
        timm_host("vit_small_patch14_reg4_dinov2"),
        "LayerScale",
    ),
    HostCase(
        "qk_norm",
        VIT,
        "vit_base_patch16_224, qk_norm=True",
        "class",
        timm_host("vit_base_patch16_224", qk_norm=True, scale_attn_norm=True),
        "query, key and attention norms",
    ),
    HostCase(
        "post_norm",
        VIT,
        "vit_base_patch16_rpn_224",
        "none",
        timm_host("vit_base_patch16_rpn_224"),
        "norm after the attention",
    ),
    HostCase(
        "dynamic_size",
        VIT,
        "vit_base_patch16_224, dynamic_img_size=True",
        "class",
        timm_host("vit_base_patch16_224", dynamic_img_size=True),
        "images of any size, kappa checked at the first step",
        fixed_size=False,
    ),
    HostCase(
        "eva",
        EVA,
        "eva_giant_patch14_224",
        "class",
        timm_host("eva_giant_patch14_224", mlp_ratio=2),
        "no rotary embedding",
    ),
    HostCase(
        "eva02",
        EVA,
        "eva02_small_patch14_224",
        "class",
        timm_host("eva02_small_patch14_224"),
        "joint projection",
    ),
    HostCase(
        "eva02_separate",
        EVA,
        "eva02_base_patch14_224",
        "class",
        timm_host("eva02_base_patch14_224"),
        "separate projections",
    ),
    HostCase(
        "eva02_clip",
        EVA,
        "eva02_base_patch16_clip_224",
        "class",
        timm_host("eva02_base_patch16_clip_224"),
        "attention norm",
    ),
    HostCase(
        "eva02_post_norm",
        EVA,
        "eva02_enormous_patch14_clip_224",
        "class",
        timm_host("eva02_enormous_patch14_clip_224", mlp_ratio=2),
        "norm after the attention",
    ),
    HostCase(
        "rope_register",
        EVA,
        "vit_medium_patch16_rope_reg1_gap_256",
        "1 register",
        timm_host("vit_medium_patch16_rope_reg1_gap_256"),
        "rotary embedding",
    ),
    HostCase(
        "rope_mixed",
        EVA,
        "vit_small_patch16_rope_mixed_224",
        "class",
        timm_host("vit_small_patch16_rope_mixed_224"),
        "learnt rotary embedding of each layer and head",
    ),
    HostCase(
        "perception_encoder",
        EVA,
        "vit_pe_core_gigantic_patch14_448",
        "none",
        timm_host("vit_pe_core_gigantic_patch14_448"),
        "rotary embedding, attention pooling",
    ),
    HostCase(
        "dinov3",
        EVA,
        "vit_small_patch16_dinov3",
        "class, 4 registers",
        timm_host("vit_small_patch16_dinov3"),
        "rotary embedding with jitter, images of any size",
        fixed_size=False,
    ),
    HostCase(
        "sapiens2",
        EVA,
        "vit_base_patch16_sapiens2",
        "class, 8 registers",
        timm_host("vit_base_patch16_sapiens2", num_kv_heads=1),
        "heads that share keys (grouped queries)",
        fixed_size=False,
    ),
    HostCase(
        "beit",
        BEIT,
        "beitv2_base_patch16_224",
        "class",
        timm_host("beitv2_base_patch16_224"),
        "relative-position bias of each layer",
    ),
    HostCase(
        "beit_shared",
        BEIT,
        "beit_base_patch16_224, use_shared_rel_pos_bias=True",
        "class",
        timm_host("beit_base_patch16_224", use_shared_rel_pos_bias=True),
        "shared bias on top",
    ),
    HostCase(
        "beit_plain",
        BEIT,
        "beit_base_patch16_224, use_rel_pos_bias=False",
        "class",
        timm_host(
            "beit_base_patch16_224", use_rel_pos_bias=False, use_abs_pos_emb=True, qkv_bias=False
        ),
        "no bias",
    ),
    HostCase("torchvision", TORCHVISION, "vit_b_16", "class", torchvision_host),
    HostCase(
        "hf_vit",
        "transformers ViTForImageClassification",
        "attn_implementation sdpa",
        "class",
        transformers_host("ViT", "sdpa"),
        "in training and evaluation the `logits` of the output",
    ),
    HostCase(
        "hf_vit_eager",
        "transformers ViTForImageClassification",
        "attn_implementation eager",
        "class",
        transformers_host("ViT", "eager"),
    ),
    HostCase(
        "hf_deit",
        "transformers DeiTForImageClassification",
        "attn_implementation sdpa",
        "class, distillation",
        transformers_host("DeiT", "sdpa"),
    ),
    HostCase(
        "hf_dinov2",
        "transformers Dinov2ForImageClassification",
        "attn_implementation sdpa",
        "class",
        transformers_host("Dinov2", "sdpa", drop_path=True, mlp_ratio=2, layerscale_value=0.5),
        "images of any size",
        fixed_size=False,
    ),
    HostCase("cct", "CCT", "cct_7_3x1_32", "none", cct_host, "sequence pooling"),
)
BY_NAME = {case.name: case for case in CASES}

every_host = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def some_hosts(*names: str) -> Any:
    return pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=names)


# Hosts that differ in how layers, attention and output are reached; for tests of what does not
# depend on the arithmetic of a variant.
one_of_each = some_hosts("vit", "eva02", "rope_mixed", "beit", "torchvision", "hf_vit", "cct")


def batch(case: HostCase, size: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Images (B, 3, S, S) and soft targets (B, C)."""
    side = 8 if case.name == "cct" else IMAGE
    images = torch.randn(size, 3, side, side)
    targets = torch.randn(size, CLASSES).mul(2).softmax(-1)
    return images.to(dtype), targets.to(dtype)


def logits_of(output: Any) -> Tensor:
    """The logits in what a plain host returns."""
    return output if torch.is_tensor(output) else output.logits
