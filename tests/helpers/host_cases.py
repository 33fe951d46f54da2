"""Small instances of every host that `attach` takes: one table, which all host tests run over.

Dimensions: B batch, C classes.
"""

import importlib.metadata
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor

from tests.helpers.host_builders import (
    CLASSES,
    DEPTH,
    HEADS,
    IMAGE,
    PATCH,
    STAGE_PATCHES,
    WIDTH,
    HostCase,
    encoder_case,
    mvit_case,
    timm_case,
    torchvision_host,
    torchvision_swin,
    transformers_case,
)

SIZES = {"img_size": IMAGE, "embed_dim": WIDTH, "depth": DEPTH, "num_heads": HEADS}
vit = partial(timm_case, family="timm VisionTransformer", patch_size=PATCH, **SIZES)
eva = partial(timm_case, family="timm Eva", patch_size=PATCH, **SIZES)
beit = partial(timm_case, family="timm Beit", patch_size=PATCH, **SIZES)

# layers 0 and 1 in the first stage, 2 in the second; where VTM is possible, all in one
stages = partial(
    timm_case,
    patches=STAGE_PATCHES,
    vtm=False,
    rates=("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
)
swin = partial(
    stages,
    family="timm SwinTransformer",
    img_size=IMAGE,
    embed_dim=WIDTH,
    depths=(2, 1),
    num_heads=(HEADS, 2 * HEADS),
    window_size=4,
)
swin_v2 = partial(swin, family="timm SwinTransformerV2")
pvt = partial(
    stages,
    family="timm PyramidVisionTransformerV2",
    fixed_size=False,
    embed_dims=(WIDTH, 2 * WIDTH),
    depths=(2, 1),
    num_heads=(HEADS, 2 * HEADS),
    sr_ratios=(2, 1),
    mlp_ratios=(2, 2),
)
hiera = partial(
    stages,
    family="timm Hiera",
    rates=("drop_rate", "drop_path_rate"),  # it has no others
    img_size=(IMAGE, IMAGE),
    embed_dim=WIDTH,
    num_heads=HEADS,
    mlp_ratio=2,
    mask_unit_size=(4, 4),
    q_pool=1,
)
hf = partial(
    transformers_case,
    patch_size=PATCH,
    hidden_size=WIDTH,
    num_hidden_layers=DEPTH,
    num_attention_heads=HEADS,
    intermediate_size=48,
)
HF_RATES = ("hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate")
hf_swin = transformers_case(
    "hf_swin",
    "Swin",
    "none",
    "transformers from 5.17 on; images of any size, windows that pad the grid",
    rates=HF_RATES,
    fixed_size=False,
    patches=STAGE_PATCHES,
    vtm=False,
    patch_size=4,
    embed_dim=WIDTH,
    depths=[2, 1],
    num_heads=[HEADS, 2 * HEADS],
    window_size=3,
    mlp_ratio=2,
)

CASES = (
    vit("vit", "vit_base_patch16_224", "class"),
    vit("deit", "deit_tiny_patch16_224", "class"),
    vit(
        "deit_distilled",
        "deit_tiny_distilled_patch16_224",
        "class, distillation",
        "mean of both heads; training with a teacher is refused",
    ),
    vit("deit3", "deit3_small_patch16_224", "class", "LayerScale, class token without position"),
    vit(
        "registers",
        "vit_base_patch16_reg4_gap_256",
        "4 registers",
        "saliency from the mean over all queries",
    ),
    vit("siglip", "vit_base_patch16_siglip_224", "none", "attention pooling"),
    vit("dinov2", "vit_small_patch14_reg4_dinov2", "class, 4 registers", "LayerScale"),
    vit(
        "qk_norm",
        "vit_base_patch16_224, qk_norm=True",
        "class",
        "query, key and attention norms",
        qk_norm=True,
        scale_attn_norm=True,
    ),
    vit("post_norm", "vit_base_patch16_rpn_224", "none", "norm after the attention"),
    vit(
        "dynamic_size",
        "vit_base_patch16_224, dynamic_img_size=True",
        "class",
        "images of any size, kappa checked at the first step",
        fixed_size=False,
        dynamic_img_size=True,
    ),
    eva("eva", "eva_giant_patch14_224", "class", "no rotary embedding", mlp_ratio=2),
    eva("eva02", "eva02_small_patch14_224", "class", "joint projection"),
    eva("eva02_separate", "eva02_base_patch14_224", "class", "separate projections"),
    eva("eva02_clip", "eva02_base_patch16_clip_224", "class", "attention norm"),
    eva(
        "eva02_post_norm",
        "eva02_enormous_patch14_clip_224",
        "class",
        "norm after the attention",
        mlp_ratio=2,
    ),
    eva("rope_register", "vit_medium_patch16_rope_reg1_gap_256", "1 register", "rotary embedding"),
    eva(
        "rope_mixed",
        "vit_small_patch16_rope_mixed_224",
        "class",
        "learnt rotary embedding of each layer and head",
    ),
    eva(
        "perception_encoder",
        "vit_pe_core_gigantic_patch14_448",
        "none",
        "rotary embedding, attention pooling",
    ),
    eva(
        "dinov3",
        "vit_small_patch16_dinov3",
        "class, 4 registers",
        "rotary embedding with jitter, images of any size",
        fixed_size=False,
    ),
    eva(
        "sapiens2",
        "vit_base_patch16_sapiens2",
        "class, 8 registers",
        "heads that share keys (grouped queries)",
        fixed_size=False,
        num_kv_heads=1,
    ),
    beit("beit", "beitv2_base_patch16_224", "class", "relative-position bias of each layer"),
    beit(
        "beit_shared",
        "beit_base_patch16_224, use_shared_rel_pos_bias=True",
        "class",
        "shared bias on top",
        use_shared_rel_pos_bias=True,
    ),
    beit(
        "beit_plain",
        "beit_base_patch16_224, use_rel_pos_bias=False",
        "class",
        "no bias",
        use_rel_pos_bias=False,
        use_abs_pos_emb=True,
        qkv_bias=False,
    ),
    swin("swin", "swin_tiny_patch4_window7_224", "none", "windows, shifted windows"),
    swin(
        "swin_padded",
        "swin_tiny_patch4_window7_224, window_size=3",
        "none",
        "windows that pad the grid",
        window_size=3,
    ),
    swin(
        "swin_dynamic",
        "swin_tiny_patch4_window7_224, dynamic_img_size=True",
        "none",
        "images of any size",
        fixed_size=False,
        dynamic_img_size=True,
    ),
    swin_v2(
        "swin_v2", "swinv2_tiny_window8_256", "none", "cosine attention, norm after the attention"
    ),
    swin_v2(
        "swin_v2_dynamic",
        "swinv2_tiny_window8_256, dynamic_img_size=True",
        "none",
        "images of any size",
        fixed_size=False,
        dynamic_img_size=True,
    ),
    pvt("pvt", "pvt_v2_b0", "none", "pooled keys"),
    pvt(
        "pvt_last_stage",
        "pvt_v2_b0, last stage",
        "none",
        "VTM within a stage whose keys are not pooled",
        vtm=True,
        embed_dims=(WIDTH,),
        depths=(3,),
        num_heads=(HEADS,),
        sr_ratios=(1,),
        mlp_ratios=(2,),
    ),
    pvt("pvt_linear", "pvt_v2_b2_li", "none", "averaged keys"),
    hiera(  # layer 1 pools its queries
        "hiera",
        "hiera_tiny_224",
        "none",
        "windows, pooled queries",
        stages=(1, 2),
        mask_unit_attn=(True, True),
    ),
    hiera(
        "hiera_global",
        "hiera_tiny_224, stages without windows",
        "none",
        "VTM within each such stage, LayerScale",
        vtm=True,
        init_values=0.5,
        stages=(3, 1),
        mask_unit_attn=(False, False),
    ),
    mvit_case("mvit", "mvitv2_tiny", "none", "pooled queries and keys, relative positions"),
    mvit_case("mvit_class", "mvitv2_small_cls", "class", use_cls_token=True),
    mvit_case(
        "mvit_wide", "mvitv2_large", "none", "the last layer of a stage widens", expand_attn=False
    ),
    HostCase("torchvision", "torchvision VisionTransformer", "vit_b_16", "class", torchvision_host),
    torchvision_swin("torchvision_swin", "swin_t", "windows that pad the grid", 3),
    torchvision_swin("torchvision_swin_v2", "swin_v2_t", "cosine attention", 4),
    hf("hf_vit", "ViT", "class", "in training and evaluation the `logits` of the output"),
    hf("hf_vit_eager", "ViT", "class", implementation="eager"),
    hf("hf_deit", "DeiT", "class, distillation"),
    hf(
        "hf_dinov2",
        "Dinov2",
        "class",
        "images of any size",
        rates=HF_RATES,
        fixed_size=False,
        mlp_ratio=2,
        layerscale_value=0.5,
    ),
    *([hf_swin] if Version(importlib.metadata.version("transformers")) >= Version("5.17") else []),
    encoder_case("encoder", "norm last, gelu", "class", activation="gelu"),
    encoder_case(
        "encoder_norm_first", "norm first, silu", "none", norm_first=True, activation=F.silu
    ),
    timm_case(
        "cct", "cct_7_3x1_32", "none", "sequence pooling", family="CCT", **SIZES | {"img_size": 8}
    ),
)
BY_NAME = {case.name: case for case in CASES}

every_host = pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])


def some_hosts(*names: str) -> Any:
    return pytest.mark.parametrize("case", [BY_NAME[name] for name in names], ids=names)


# Hosts that differ in how layers, attention and output are reached; for tests of what does not
# depend on the arithmetic of a variant.
one_of_each = some_hosts(
    "vit", "eva02", "rope_mixed", "beit", "swin", "torchvision", "hf_vit", "encoder", "cct"
)


def batch(case: HostCase, size: int = 6, dtype: torch.dtype = torch.float32) -> tuple[Tensor, ...]:
    """Images (B, 3, S, S) and soft targets (B, C)."""
    side = 8 if case.name == "cct" else IMAGE
    images = torch.randn(size, 3, side, side)
    targets = torch.randn(size, CLASSES).mul(2).softmax(-1)
    return images.to(dtype), targets.to(dtype)


def logits_of(output: Any) -> Tensor:
    """The logits in what a plain host returns."""
    return output if torch.is_tensor(output) else output.logits
