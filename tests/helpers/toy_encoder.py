"""A small encoder for the wrapper layers to wrap, in torch and, independently, in NumPy loops.

Dimensions: B batch, H heads, N tokens with prefix, M keys, P prefix tokens, D width, C classes.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import nn

from tests.helpers import oracle
from tests.helpers.cases import array

WIDTH, HEADS, CLASSES = 6, 2, 5


class Attention(nn.Module):
    """Self-attention on normalised tokens; returns (output, attention map)."""

    def __init__(self):
        super().__init__()
        self.query = nn.Linear(WIDTH, WIDTH)
        self.key = nn.Linear(WIDTH, WIDTH)
        self.value = nn.Linear(WIDTH, WIDTH)

    def heads(self, x):
        return x.unflatten(-1, (HEADS, WIDTH // HEADS)).transpose(1, 2)

    def forward(self, x, scale=1.0, *, shift=0.0):
        query, key, value = (self.heads(m(x)) for m in (self.query, self.key, self.value))
        scores = query @ key.transpose(-1, -2) / math.sqrt(WIDTH // HEADS)
        attention = scores.softmax(dim=-1)
        output = (attention @ value).transpose(1, 2).flatten(2)
        return output * scale + shift, attention


class Block(nn.Module):
    """Pre-norm attention and a tanh layer, with the interface that the HTM wrapper wants."""

    def __init__(self, attention=None):
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, elementwise_affine=False)
        self.attention = Attention() if attention is None else attention
        self.mlp = nn.Linear(WIDTH, WIDTH)

    def forward(self, x, y):
        x = x + self.attention(self.norm(x))[0]
        return x + self.mlp(x).tanh(), y

    def get_attention_map(self, x, y):
        return self.attention(self.norm(x))[1]


class Encoder(nn.Module):
    """Layers one after another."""

    def __init__(self, layers):
        super().__init__()
        self.layers = nn.ModuleList(layers)

    def forward(self, x, y):
        for layer in self.layers:
            x, y = layer(x, y)
        return x, y


# The same in NumPy, one sample and one head at a time


def linear(weights, name, x):
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def layer_norm(x):
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / np.sqrt((centred**2).mean(axis=-1, keepdims=True) + 1e-5)


def attend(weights, queries, keys):
    """(B, N, D), (B, M, D) -> output (B, N, D), map (B, H, N, M)."""
    batch, tokens, _ = queries.shape
    size = WIDTH // HEADS
    output = np.zeros_like(queries)
    attention = np.zeros((batch, HEADS, tokens, keys.shape[1]))
    for i in range(batch):
        q = linear(weights, "query", queries[i])
        k = linear(weights, "key", keys[i])
        v = linear(weights, "value", keys[i])
        for h in range(HEADS):
            part = slice(h * size, (h + 1) * size)
            for n in range(tokens):
                row = oracle.softmax(k[:, part] @ q[n, part] / math.sqrt(size))
                attention[i, h, n] = row
                output[i, n, part] = row @ v[:, part]
    return output, attention


@dataclass
class Horizontal:
    """Settings of HTM at one layer."""

    tau: float
    rho: float
    scorenet: oracle.ScoreNet | None
    scorenet_lambda: float = 0.001


@dataclass
class Reference:
    """What the NumPy encoder computed."""

    tokens: np.ndarray  # (B, N, D)
    targets: np.ndarray  # (B, C)
    scorenet_loss: np.ndarray  # (B,), lambda applied, summed over HTM layers
    steps: list[oracle.HorizontalStep] = field(default_factory=list)


def encode(blocks, x, y, num_prefix_tokens, horizontal=None, apply_layers=(), kappa=0):
    """The forward pass in training.

    blocks: state dicts of plain Blocks, as arrays; horizontal: settings of HTM, by layer.
    """
    horizontal = horizontal or {}
    out = Reference(x, y, np.zeros(len(x)))
    remembered = []
    for layer, block in enumerate(blocks):
        weights = {
            name.removeprefix("attention."): value
            for name, value in block.items()
            if name.startswith("attention.")
        }
        earlier = list(remembered) if layer in apply_layers else []

        def attention_of(tokens, weights=weights, earlier=earlier):
            """Saliency is always read from the map over the layer's own tokens alone."""
            normed = layer_norm(tokens)
            output, _ = attend(weights, normed, np.concatenate([normed, *earlier], axis=1))
            return normed, output, attend(weights, normed, normed)[1]

        x = out.tokens
        if layer in horizontal:
            settings = horizontal[layer]
            attention = attention_of(x)[2]
            step = oracle.horizontal_step(
                x,
                out.targets,
                attention,
                settings.scorenet,
                settings.tau,
                settings.rho,
                num_prefix_tokens,
            )
            out.steps.append(step)
            x, out.targets = step.mixed.tokens, step.mixed.targets
            if step.scorenet_loss is not None:
                out.scorenet_loss = out.scorenet_loss + (
                    settings.scorenet_lambda * step.scorenet_loss
                )
        normed, output, attention = attention_of(x)
        if apply_layers and layer < max(apply_layers):
            saliency = oracle.attention_saliency(attention, num_prefix_tokens)
            remembered.append(
                oracle.select_salient_tokens(normed, saliency, kappa, num_prefix_tokens)
            )
        x = x + output
        out.tokens = x + np.tanh(linear(block, "mlp", x))
    return out


def arrays_of(block):
    """The state dict of a plain Block as float64 arrays."""
    return {name: array(value) for name, value in block.state_dict().items()}


def own_parameters(wrapper):
    """An HTM wrapper's parameters without those of the layer that it wraps."""
    inner = {id(parameter) for parameter in wrapper.layer.parameters()}
    return [parameter for parameter in wrapper.parameters() if id(parameter) not in inner]


def scorenet_of(wrapper, pool):
    """An HTM wrapper's ScoreNet as the oracle's, its weights told apart by their shapes."""
    own = own_parameters(wrapper)
    by_shape = {tuple(parameter.shape): array(parameter) for parameter in own}
    assert len(by_shape) == len(own) == (4 if pool == "attention" else 2)
    width = max(shape[-1] for shape in by_shape if len(shape) == 2)
    classes = max(shape[0] for shape in by_shape)
    scorenet = oracle.ScoreNet(pool, by_shape[(classes, width)], by_shape[(classes,)])
    if pool == "attention":
        scorenet.pool_weight = by_shape[(1, width)][0]
        scorenet.pool_bias = float(by_shape[(1,)][0])
    return scorenet


def random_batch(batch, tokens, dtype=torch.float64):
    """Tokens (B, N, D) and soft targets (B, C)."""
    x = torch.randn(batch, tokens, WIDTH, dtype=torch.float64)
    y = torch.rand(batch, CLASSES, dtype=torch.float64).mul(3).softmax(dim=1)
    return x.to(dtype), y.to(dtype)
