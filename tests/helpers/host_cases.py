"""Small instances of every host that `attach` takes: one table, which all host tests run over.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, C classes.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from packaging.version import Version
from torch import Tensor, nn

from tokenmixup import TokenMixupModel, attach

importlib.import_module("experiments.models")  # registers CCT with timm and with TokenMixup

CLASSES, DEPTH, HEADS, WIDTH, IMAGE, PATCH = 7, 3, 2, 32, 32, 8
PATCHES = (IMAGE // PATCH) ** 2


@dataclass(frozen=True)
class HostCase:
    """One host.

    build takes the rate of every kind of dropout that the host has, drop path included.
    model, prefix, covers: what the table of supported hosts says of it.
    patches: patch tokens of the first layer.
    vtm: whether VTM is possible.
    """

    name: str
    family: str
    model: str
    prefix: str
    build_fresh: Callable[[float], nn.Module]
    covers: str = ""
    fixed_size: bool = True
    patches: int = PATCHES
    vtm: bool = True

    @property
    def rho(self) -> float:
        """For tests that mix: a third of the mean saliency of a token."""
        return 0.32 / self.patches

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

    def attach(self, host: nn.Module, **settings: Any) -> TokenMixupModel:
        """As a user of this host attaches TokenMixup; without VTM where that is not possible."""
        if not self.vtm:
            settings.pop("vertical", None)
        if self.family != ENCODER:
            return attach(host, **settings)
        return attach(
            host,
            layers=host.get_submodule("encoder.layers").children(),
            num_prefix_tokens=self.num_prefix_tokens,
            class_token=self.class_token,
            num_classes=CLASSES,
            **settings,
        )


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


TIMM_RATES = ("drop_rate", "pos_drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate")


def timm_host(model: str, **settings: Any) -> Callable[[float], nn.Module]:
    sizes = {
        "img_size": IMAGE,
        "patch_size": PATCH,
        "embed_dim": WIDTH,
        "depth": DEPTH,
        "num_heads": HEADS,
        "num_classes": CLASSES,
    }
    return lambda dropout: timm.create_model(
        model, **dict.fromkeys(TIMM_RATES, dropout), **sizes | settings
    )


def timm_case(
    name: str,
    family: str,
    model: str,
    prefix: str,
    covers: str = "",
    fixed_size: bool = True,
    **settings: Any,
) -> HostCase:
    """A host that timm builds; ``model`` may name a setting after a comma."""
    build = timm_host(model.partition(",")[0], **settings)
    return HostCase(name, family, model, prefix, build, covers, fixed_size)


def stages_case(
    name: str,
    family: str,
    model: str,
    covers: str,
    fixed_size: bool = True,
    vtm: bool = False,
    rates: tuple[str, ...] = ("drop_rate", "proj_drop_rate", "attn_drop_rate", "drop_path_rate"),
    **settings: Any,
) -> HostCase:
    """A host with stages that timm builds: layers 0 and 1 in the first, 2 in the second.

    Where VTM is possible, all in one.
    """

    def build(dropout: float) -> nn.Module:
        chances = dict.fromkeys(rates, dropout)
        return timm.create_model(
            model.partition(",")[0], num_classes=CLASSES, **settings, **chances
        )

    patches = (IMAGE // 4) ** 2
    return HostCase(name, family, model, "none", build, covers, fixed_size, patches, vtm)


def mvit_case(name: str, model: str, prefix: str, covers: str, **settings: Any) -> HostCase:
    """Layers 0 and 1 in the first stage; 2, which pools its queries, takes their tokens."""
    from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg

    config = MultiScaleVitCfg(
        depths=(2, 1),
        embed_dim=WIDTH,
        num_heads=HEADS,
        mlp_ratio=2,
        stride_q=((1, 1), (2, 2)),
        stride_kv_adaptive=(2, 2),
        **settings,
    )

    def build(dropout: float) -> nn.Module:
        rates = {"drop_rate": dropout, "drop_path_rate": dropout}
        return MultiScaleVit(config, IMAGE, num_classes=CLASSES, **rates)

    return HostCase(name, MVIT, model, prefix, build, covers, True, (IMAGE // 4) ** 2, vtm=False)


def cct_host(dropout: float) -> nn.Module:
    return timm.create_model(
        "cct_7_3x1_32",
        img_size=8,
        embed_dim=WIDTH,
        depth=DEPTH,
        num_heads=HEADS,
        num_classes=CLASSES,
        **dict.fromkeys(TIMM_RATES, dropout),
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


def torchvision_swin(name: str, model: str, covers: str, window: int) -> HostCase:
    """Blocks as the model has them; layers 0 and 1 in the first stage, 2 in the second."""

    def build(dropout: float) -> nn.Module:
        from torchvision.models import swin_transformer

        v2 = {
            "block": swin_transformer.SwinTransformerBlockV2,
            "downsample_layer": swin_transformer.PatchMergingV2,
        }
        return swin_transformer.SwinTransformer(
            [4, 4],
            WIDTH,
            [2, 1],
            [HEADS, 2 * HEADS],
            [window, window],
            mlp_ratio=2,
            dropout=dropout,
            attention_dropout=dropout,
            stochastic_depth_prob=dropout,
            num_classes=CLASSES,
            **(v2 if "v2" in model else {}),
        )

    family, patches = "torchvision SwinTransformer", (IMAGE // 4) ** 2
    return HostCase(name, family, model, "none", build, covers, False, patches, vtm=False)


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


def transformers_swin(dropout: float) -> nn.Module:
    import transformers

    config = transformers.SwinConfig(
        image_size=IMAGE,
        patch_size=4,
        embed_dim=WIDTH,
        depths=[2, 1],
        num_heads=[HEADS, 2 * HEADS],
        window_size=3,
        mlp_ratio=2,
        hidden_dropout_prob=dropout,
        attention_probs_dropout_prob=dropout,
        drop_path_rate=dropout,
        num_labels=CLASSES,
    )
    return transformers.SwinForImageClassification(config)


class OwnEncoder(nn.Module):
    """What most people write: patches, and torch's own encoder."""

    def __init__(self, dropout: float, class_token: bool, **settings: Any) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, WIDTH, PATCH, PATCH)
        self.class_token = nn.Parameter(torch.zeros(1, 1, WIDTH)) if class_token else None
        self.pos_embed = nn.Parameter(torch.zeros(1, PATCHES + class_token, WIDTH))
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout, batch_first=True, **settings)
        self.encoder = nn.TransformerEncoder(layer, DEPTH, enable_nested_tensor=False)
        self.head = nn.Linear(WIDTH, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.stem(images).flatten(2).transpose(1, 2)
        if self.class_token is not None:
            tokens = torch.cat((self.class_token.expand(len(tokens), -1, -1), tokens), dim=1)
        tokens = self.encoder(tokens + self.pos_embed)
        return self.head(tokens.mean(1) if self.class_token is None else tokens[:, 0])


def encoder_case(name: str, model: str, prefix: str, **settings: Any) -> HostCase:
    build = partial(OwnEncoder, class_token=prefix == "class", **settings)
    return HostCase(name, ENCODER, model, prefix, build, "`layers` are given", fixed_size=False)


ENCODER = "torch.nn.TransformerEncoderLayer"
SWIN_SIZES = {
    "img_size": IMAGE,
    "embed_dim": WIDTH,
    "depths": (2, 1),
    "num_heads": (HEADS, 2 * HEADS),
    "window_size": 4,
}
PVT_SIZES = {
    "embed_dims": (WIDTH, 2 * WIDTH),
    "depths": (2, 1),
    "num_heads": (HEADS, 2 * HEADS),
    "sr_ratios": (2, 1),
    "mlp_ratios": (2, 2),
}
PVT_STAGE = {name: each[:1] for name, each in PVT_SIZES.items()} | {
    "depths": (3,),
    "sr_ratios": (1,),
}
HIERA_SIZES = {
    "img_size": (IMAGE, IMAGE),
    "embed_dim": WIDTH,
    "num_heads": HEADS,
    "mlp_ratio": 2,
    "mask_unit_size": (4, 4),
}
SWIN, SWIN_V2 = "timm SwinTransformer", "timm SwinTransformerV2"
PVT, HIERA = "timm PyramidVisionTransformerV2", "timm Hiera"
MVIT = "timm MultiScaleVit"
VIT, EVA, BEIT = "timm VisionTransformer", "timm Eva", "timm Beit"
TORCHVISION = "torchvision VisionTransformer"

CASES = (
    timm_case("vit", VIT, "vit_base_patch16_224", "class"),
    timm_case("deit", VIT, "deit_tiny_patch16_224", "class"),
    timm_case(
        "deit_distilled",
        VIT,
        "deit_tiny_distilled_patch16_224",
        "class, distillation",
        "mean of both heads; training with a teacher is refused",
    ),
    timm_case(
        "deit3", VIT, "deit3_small_patch16_224", "class", "LayerScale, class token without position"
    ),
    timm_case(
        "registers",
        VIT,
        "vit_base_patch16_reg4_gap_256",
        "4 registers",
        "saliency from the mean over all queries",
    ),
    timm_case("siglip", VIT, "vit_base_patch16_siglip_224", "none", "attention pooling"),
    timm_case("dinov2", VIT, "vit_small_patch14_reg4_dinov2", "class, 4 registers", "LayerScale"),
    timm_case(
        "qk_norm",
        VIT,
        "vit_base_patch16_224, qk_norm=True",
        "class",
        "query, key and attention norms",
        qk_norm=True,
        scale_attn_norm=True,
    ),
    timm_case("post_norm", VIT, "vit_base_patch16_rpn_224", "none", "norm after the attention"),
    timm_case(
        "dynamic_size",
        VIT,
        "vit_base_patch16_224, dynamic_img_size=True",
        "class",
        "images of any size, kappa checked at the first step",
        fixed_size=False,
        dynamic_img_size=True,
    ),
    timm_case("eva", EVA, "eva_giant_patch14_224", "class", "no rotary embedding", mlp_ratio=2),
    timm_case("eva02", EVA, "eva02_small_patch14_224", "class", "joint projection"),
    timm_case("eva02_separate", EVA, "eva02_base_patch14_224", "class", "separate projections"),
    timm_case("eva02_clip", EVA, "eva02_base_patch16_clip_224", "class", "attention norm"),
    timm_case(
        "eva02_post_norm",
        EVA,
        "eva02_enormous_patch14_clip_224",
        "class",
        "norm after the attention",
        mlp_ratio=2,
    ),
    timm_case(
        "rope_register",
        EVA,
        "vit_medium_patch16_rope_reg1_gap_256",
        "1 register",
        "rotary embedding",
    ),
    timm_case(
        "rope_mixed",
        EVA,
        "vit_small_patch16_rope_mixed_224",
        "class",
        "learnt rotary embedding of each layer and head",
    ),
    timm_case(
        "perception_encoder",
        EVA,
        "vit_pe_core_gigantic_patch14_448",
        "none",
        "rotary embedding, attention pooling",
    ),
    timm_case(
        "dinov3",
        EVA,
        "vit_small_patch16_dinov3",
        "class, 4 registers",
        "rotary embedding with jitter, images of any size",
        fixed_size=False,
    ),
    timm_case(
        "sapiens2",
        EVA,
        "vit_base_patch16_sapiens2",
        "class, 8 registers",
        "heads that share keys (grouped queries)",
        fixed_size=False,
        num_kv_heads=1,
    ),
    timm_case(
        "beit", BEIT, "beitv2_base_patch16_224", "class", "relative-position bias of each layer"
    ),
    timm_case(
        "beit_shared",
        BEIT,
        "beit_base_patch16_224, use_shared_rel_pos_bias=True",
        "class",
        "shared bias on top",
        use_shared_rel_pos_bias=True,
    ),
    timm_case(
        "beit_plain",
        BEIT,
        "beit_base_patch16_224, use_rel_pos_bias=False",
        "class",
        "no bias",
        use_rel_pos_bias=False,
        use_abs_pos_emb=True,
        qkv_bias=False,
    ),
    stages_case(
        "swin", SWIN, "swin_tiny_patch4_window7_224", "windows, shifted windows", **SWIN_SIZES
    ),
    stages_case(
        "swin_padded",
        SWIN,
        "swin_tiny_patch4_window7_224, window_size=3",
        "windows that pad the grid",
        **SWIN_SIZES | {"window_size": 3},
    ),
    stages_case(
        "swin_dynamic",
        SWIN,
        "swin_tiny_patch4_window7_224, dynamic_img_size=True",
        "images of any size",
        fixed_size=False,
        dynamic_img_size=True,
        **SWIN_SIZES,
    ),
    stages_case(
        "swin_v2",
        SWIN_V2,
        "swinv2_tiny_window8_256",
        "cosine attention, norm after the attention",
        **SWIN_SIZES,
    ),
    stages_case(
        "swin_v2_dynamic",
        SWIN_V2,
        "swinv2_tiny_window8_256, dynamic_img_size=True",
        "images of any size",
        fixed_size=False,
        dynamic_img_size=True,
        **SWIN_SIZES,
    ),
    stages_case("pvt", PVT, "pvt_v2_b0", "pooled keys", fixed_size=False, **PVT_SIZES),
    stages_case(
        "pvt_last_stage",
        PVT,
        "pvt_v2_b0, last stage",
        "VTM within a stage whose keys are not pooled",
        fixed_size=False,
        vtm=True,
        **PVT_STAGE,
    ),
    stages_case("pvt_linear", PVT, "pvt_v2_b2_li", "averaged keys", fixed_size=False, **PVT_SIZES),
    # layer 1 pools its queries; the rates of other hosts are none of Hiera's
    stages_case(
        "hiera",
        HIERA,
        "hiera_tiny_224",
        "windows, pooled queries",
        rates=("drop_rate", "drop_path_rate"),
        stages=(1, 2),
        mask_unit_attn=(True, True),
        q_pool=1,
        **HIERA_SIZES,
    ),
    stages_case(
        "hiera_global",
        HIERA,
        "hiera_tiny_224, stages without windows",
        "VTM within each such stage, LayerScale",
        rates=("drop_rate", "drop_path_rate"),
        vtm=True,
        init_values=0.5,
        stages=(3, 1),
        mask_unit_attn=(False, False),
        q_pool=1,
        **HIERA_SIZES,
    ),
    mvit_case("mvit", "mvitv2_tiny", "none", "pooled queries and keys, relative positions"),
    mvit_case("mvit_class", "mvitv2_small_cls", "class", "", use_cls_token=True),
    mvit_case(
        "mvit_wide", "mvitv2_large", "none", "the last layer of a stage widens", expand_attn=False
    ),
    HostCase("torchvision", TORCHVISION, "vit_b_16", "class", torchvision_host),
    torchvision_swin("torchvision_swin", "swin_t", "windows that pad the grid", 3),
    torchvision_swin("torchvision_swin_v2", "swin_v2_t", "cosine attention", 4),
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
    *(
        HostCase(
            "hf_swin",
            "transformers SwinForImageClassification",
            "attn_implementation sdpa",
            "none",
            transformers_swin,
            "transformers from 5.17 on; images of any size, windows that pad the grid",
            fixed_size=False,
            patches=(IMAGE // 4) ** 2,
            vtm=False,
        )
        for _ in range(Version(importlib.metadata.version("transformers")) >= Version("5.17"))
    ),
    encoder_case("encoder", "norm last, gelu", "class", activation="gelu"),
    encoder_case(
        "encoder_norm_first", "norm first, silu", "none", norm_first=True, activation=F.silu
    ),
    HostCase("cct", "CCT", "cct_7_3x1_32", "none", cct_host, "sequence pooling"),
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
