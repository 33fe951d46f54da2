"""Compact Convolutional Transformer (CCT), registered with timm.

Hassani et al., "Escaping the Big Data Paradigm with Compact Transformers", arXiv 2104.05704; block
and initialisation as in the models that TokenMixup's authors trained.

Dimensions: B batch, N tokens, D width, H heads, C classes, M remembered tokens.
"""

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers.drop import DropPath
from timm.layers.mlp import Mlp
from timm.models import build_model_with_cfg, checkpoint_seq, generate_default_cfgs, register_model
from torch import Tensor, nn

from tokenmixup.hosts.base import plain_linear

TOKENIZER_WIDTH = 64
"""Channels between the convolutions of the tokenizer."""


class Tokenizer(nn.Module):
    """Convolutions with ReLU and max-pooling: images (B, 3, S, S) -> tokens (B, N, D)."""

    def __init__(self, in_chans: int, width: int, kernel_size: int, num_convolutions: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.stride = max(1, kernel_size // 2 - 1)
        self.padding = max(1, kernel_size // 2)
        self.convolutions = nn.ModuleList()
        channels = [in_chans] + [TOKENIZER_WIDTH] * (num_convolutions - 1) + [width]
        for before, after in itertools.pairwise(channels):
            convolution = nn.Conv2d(
                before, after, kernel_size, self.stride, self.padding, bias=False
            )
            nn.init.kaiming_normal_(convolution.weight)
            self.convolutions.append(convolution)
        self.pool = nn.MaxPool2d(kernel_size=3, stride=2, padding=1)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> tokens (B, N, D)."""
        for convolution in self.convolutions:
            images = self.pool(F.relu(convolution(images)))
        return images.flatten(2).transpose(1, 2)

    def num_tokens(self, image_size: int) -> int:
        """N for square images."""
        side = image_size
        for _ in self.convolutions:
            side = (side + 2 * self.padding - self.kernel_size) // self.stride + 1
            side = (side + 2 - 3) // 2 + 1  # the pooling
        return side * side


class Attention(nn.Module):
    """Multi-head self-attention, fused, that can attend to remembered tokens as well."""

    def __init__(self, width: int, heads: int, attn_drop: float, proj_drop: float) -> None:
        super().__init__()
        self.num_heads = heads
        self.scale = (width // heads) ** -0.5
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.attn_drop = nn.Dropout(attn_drop)
        self.proj = nn.Linear(width, width)
        self.proj_drop = nn.Dropout(proj_drop)

    def forward(self, x: Tensor, memory: Tensor | None = None) -> Tensor:
        """Attend from x (B, N, D) to x and memory (B, M, D), both normalised -> (B, N, D)."""
        query, key, value = self._heads(self.qkv(x)).chunk(3, dim=1)
        if memory is not None:
            if plain_linear(self.qkv):  # keys and values alone
                more = F.linear(memory, self.qkv.weight[x.shape[-1] :])
            else:
                more = self.qkv(memory)[..., x.shape[-1] :]
            more_key, more_value = self._heads(more).chunk(2, dim=1)
            key = torch.cat((key, more_key), dim=2)
            value = torch.cat((value, more_value), dim=2)
        out = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.attn_drop.p if self.training else 0.0
        )
        return self.proj_drop(self.proj(out.transpose(1, 2).flatten(2)))

    def _heads(self, projected: Tensor) -> Tensor:
        """(B, N, parts * D) -> (B, parts * H, N, D / H)."""
        head_width = self.qkv.in_features // self.num_heads
        return projected.unflatten(-1, (-1, head_width)).transpose(1, 2)


class Block(nn.Module):
    """``x <- norm2(x + attn(norm1(x)))``, then ``x <- x + mlp(x)``.

    The second residual starts from the normed x: this is CCT's, not the usual pre-norm block.
    """

    def __init__(
        self,
        width: int,
        heads: int,
        mlp_ratio: float,
        proj_drop: float,
        attn_drop: float,
        drop_path: float,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, attn_drop, proj_drop)
        self.drop_path = DropPath(drop_path)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, int(width * mlp_ratio), drop=proj_drop)

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (B, N, D) -> (B, N, D)."""
        x = self.norm2(x + self.drop_path(self.attn(self.norm1(x))))
        return x + self.drop_path(self.mlp(x))


class CCT(nn.Module):
    """Convolutional tokenizer, transformer encoder without class token, sequence pooling.

    Args:
        img_size: side of the square images, pixels.
        embed_dim: D.
        depth: encoder layers.
        num_heads: H.
        mlp_ratio: width of the MLP over D.
        kernel_size: of the tokenizer's convolutions.
        num_convolutions: of the tokenizer, each with a pooling.
        pos_embed: ``"learn"``, or ``"sine"`` for a fixed sinusoidal embedding.
        num_classes: C; 0 leaves the classifier out.
        in_chans: channels of the images.
        drop_rate: dropout of the classifier's input.
        pos_drop_rate: dropout after the position embedding.
        proj_drop_rate: dropout after the attention's projection and in the MLP.
        attn_drop_rate: dropout of the attention map.
        drop_path_rate: stochastic depth of the last layer, rising linearly from 0 at the first.

    Raises:
        ValueError: an unknown ``pos_embed``, or a width that the heads do not divide.
    """

    def __init__(
        self,
        img_size: int = 32,
        embed_dim: int = 256,
        depth: int = 7,
        num_heads: int = 4,
        mlp_ratio: float = 2.0,
        kernel_size: int = 3,
        num_convolutions: int = 1,
        pos_embed: str = "learn",
        num_classes: int = 1000,
        in_chans: int = 3,
        drop_rate: float = 0.0,
        pos_drop_rate: float = 0.0,
        proj_drop_rate: float = 0.0,
        attn_drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
    ) -> None:
        super().__init__()
        if embed_dim % num_heads:
            raise ValueError(f"embed_dim {embed_dim} is no multiple of num_heads {num_heads}")
        self.num_classes = num_classes
        self.embed_dim = self.num_features = self.head_hidden_size = embed_dim
        self.grad_checkpointing = False
        self.tokenizer = Tokenizer(in_chans, embed_dim, kernel_size, num_convolutions)
        self.num_tokens = self.tokenizer.num_tokens(img_size)
        if pos_embed == "learn":
            self.pos_embed = nn.Parameter(torch.empty(1, self.num_tokens, embed_dim))
            nn.init.trunc_normal_(self.pos_embed, std=0.2)
        elif pos_embed == "sine":
            table = sinusoidal_embedding(self.num_tokens, embed_dim)
            self.register_buffer("pos_embed", table, persistent=False)
        else:
            raise ValueError(f"pos_embed must be 'learn' or 'sine', got {pos_embed!r}")
        self.pos_drop = nn.Dropout(pos_drop_rate)
        rates = torch.linspace(0, drop_path_rate, depth).tolist()
        self.blocks = nn.Sequential(
            *(
                Block(embed_dim, num_heads, mlp_ratio, proj_drop_rate, attn_drop_rate, rate)
                for rate in rates
            )
        )
        self.norm = nn.LayerNorm(embed_dim)
        self.pool = nn.Linear(embed_dim, 1)
        self.head_drop = nn.Dropout(drop_rate)
        self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
        self.apply(_init_linear)

    def forward_features(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> normed tokens (B, N, D)."""
        tokens = self.tokenizer(images)
        if tokens.shape[1] != self.num_tokens:
            raise ValueError(
                f"CCT was built for {self.num_tokens} tokens, but images of shape "
                f"{tuple(images.shape)} give {tokens.shape[1]}: set img_size"
            )
        tokens = self.pos_drop(tokens + self.pos_embed)
        if self.grad_checkpointing:
            tokens = checkpoint_seq(self.blocks, tokens)
        else:
            tokens = self.blocks(tokens)
        return self.norm(tokens)

    def forward_head(self, tokens: Tensor, pre_logits: bool = False) -> Tensor:
        """Sequence pooling (attention over the tokens) and classifier, (B, N, D) -> (B, C)."""
        weight = self.pool(tokens).softmax(dim=1).to(tokens.dtype)  # (B, N, 1)
        pooled = self.head_drop((weight.transpose(1, 2) @ tokens).squeeze(1))
        return pooled if pre_logits else self.head(pooled)

    def forward(self, images: Tensor) -> Tensor:
        """Images (B, 3, S, S) -> logits (B, C)."""
        return self.forward_head(self.forward_features(images))

    def get_classifier(self) -> nn.Module:
        """The last linear layer."""
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the classifier by a newly initialised one for ``num_classes``; 0 removes it."""
        if global_pool is not None:
            raise ValueError(f"CCT pools by attention only, got global_pool={global_pool!r}")
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes) if num_classes else nn.Identity()
        self.head.apply(_init_linear)

    def no_weight_decay(self) -> set[str]:
        """No names: optimiser factories exclude one-dimensional parameters by themselves."""
        return set()

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Groups of layers for layer-wise learning rates, as timm asks for them."""
        return {"stem": r"^pos_embed|^tokenizer", "blocks": [(r"^blocks\.(\d+)", None)]}

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Trade time for memory: run each block again in the backward pass."""
        self.grad_checkpointing = enable


def sinusoidal_embedding(num_tokens: int, width: int) -> Tensor:
    """Fixed embedding (1, N, D): sine on even channels, cosine on odd ones, wavelengths to 10^4."""
    position = torch.arange(num_tokens).unsqueeze(1)
    frequency = torch.exp(torch.arange(0, width, 2) * (-math.log(10_000.0) / width))
    table = torch.zeros(1, num_tokens, width)
    table[0, :, 0::2] = torch.sin(position * frequency)
    table[0, :, 1::2] = torch.cos(position * frequency[: width // 2])
    return table


def _init_linear(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.trunc_normal_(module.weight, std=0.02)
        if module.bias is not None:
            nn.init.zeros_(module.bias)


_ENCODERS: dict[int, dict[str, Any]] = {
    2: {"depth": 2, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    4: {"depth": 4, "num_heads": 2, "mlp_ratio": 1.0, "embed_dim": 128},
    6: {"depth": 6, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    7: {"depth": 7, "num_heads": 4, "mlp_ratio": 2.0, "embed_dim": 256},
    14: {"depth": 14, "num_heads": 6, "mlp_ratio": 3.0, "embed_dim": 384},
}
_VARIANTS: tuple[tuple[int, int, int, int], ...] = (  # layers, kernel, convolutions, image size
    (2, 3, 2, 32),
    (4, 3, 2, 32),
    (6, 3, 1, 32),
    (6, 3, 2, 32),
    (7, 3, 1, 32),
    (7, 3, 2, 32),
    (7, 7, 2, 224),
    (14, 7, 2, 224),
    (14, 7, 2, 384),
)


def _register(layers: int, kernel: int, convolutions: int, image: int, pos_embed: str) -> str:
    suffix = "_sine" if pos_embed == "sine" else ""
    name = f"cct_{layers}_{kernel}x{convolutions}_{image}{suffix}"
    settings = {
        **_ENCODERS[layers],
        "kernel_size": kernel,
        "num_convolutions": convolutions,
        "img_size": image,
        "pos_embed": pos_embed,
    }

    def create(pretrained: bool = False, **kwargs: Any) -> nn.Module:
        return build_model_with_cfg(CCT, name, pretrained, **{**settings, **kwargs})

    create.__name__ = create.__qualname__ = name
    create.__doc__ = f"CCT-{layers}/{kernel}x{convolutions} for {image} x {image} pixels."
    default_cfgs[name] = generate_default_cfgs(
        {
            name: {
                "input_size": (3, image, image),
                "num_classes": 1000,
                "crop_pct": 1.0,
                "interpolation": "bicubic",
                "first_conv": "tokenizer.convolutions.0",
                "classifier": "head",
            }
        }
    )[name]
    globals()[name] = create
    register_model(create)
    return name


default_cfgs: dict[str, Any] = {}
"""timm looks up each model's configuration here."""

CCT_NAMES: tuple[str, ...] = tuple(
    _register(*variant, pos_embed) for variant in _VARIANTS for pos_embed in ("learn", "sine")
)
"""Every registered name, for `timm.create_model`."""

__all__ = ["CCT", "CCT_NAMES", "Attention", "Block", "Tokenizer", "sinusoidal_embedding"]
