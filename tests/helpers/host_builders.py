"""How small instances of hosts are built, and what tests know of each: `HostCase`.

Dimensions: B batch, N tokens, P prefix tokens, T patch tokens, C classes.
"""

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import timm
import torch
from timm.models.mvitv2 import MultiScaleVit, MultiScaleVitCfg
from torch import Tensor, nn

from tokenmixup import TokenMixupModel, attach

importlib.import_module("experiments.models")  # registers CCT with timm and with TokenMixup

CLASSES, DEPTH, HEADS, WIDTH, IMAGE, PATCH = 7, 3, 2, 32, 32, 8
PATCHES = (IMAGE // PATCH) ** 2
STAGE_PATCHES = (IMAGE // 4) ** 2  # of the first of several stages
ENCODER = "torch.nn.TransformerEncoderLayer"


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


def timm_case(
    name: str,
    model: str,
    prefix: str,
    covers: str = "",
    *,
    family: str,
    fixed_size: bool = True,
    patches: int = PATCHES,
    vtm: bool = True,
    rates: tuple[str, ...] = TIMM_RATES,
    **settings: Any,
) -> HostCase:
    """A host that timm builds; ``model`` may name a setting after a comma."""

    def build(dropout: float) -> nn.Module:
        chances = dict.fromkeys(rates, dropout)
        return timm.create_model(
            model.partition(",")[0], num_classes=CLASSES, **chances, **settings
        )

    return HostCase(name, family, model, prefix, build, covers, fixed_size, patches, vtm)


def mvit_case(name: str, model: str, prefix: str, covers: str = "", **settings: Any) -> HostCase:
    """Layers 0 and 1 in the first stage; 2, which pools its queries, takes their tokens."""
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

    return HostCase(
        name, "timm MultiScaleVit", model, prefix, build, covers, True, STAGE_PATCHES, vtm=False
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

    family = "torchvision SwinTransformer"
    return HostCase(name, family, model, "none", build, covers, False, STAGE_PATCHES, vtm=False)


def transformers_case(
    name: str,
    model: str,
    prefix: str,
    covers: str = "",
    implementation: str = "sdpa",
    rates: tuple[str, ...] = ("hidden_dropout_prob", "attention_probs_dropout_prob"),
    fixed_size: bool = True,
    patches: int = PATCHES,
    vtm: bool = True,
    **settings: Any,
) -> HostCase:
    def build(dropout: float) -> nn.Module:
        import transformers  # takes seconds, so only where a case is built

        config = getattr(transformers, f"{model}Config")(
            image_size=IMAGE,
            num_labels=CLASSES,
            attn_implementation=implementation,
            **dict.fromkeys(rates, dropout),
            **settings,
        )
        return getattr(transformers, f"{model}ForImageClassification")(config)

    family = f"transformers {model}ForImageClassification"
    tested = f"attn_implementation {implementation}"
    return HostCase(name, family, tested, prefix, build, covers, fixed_size, patches, vtm)


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
