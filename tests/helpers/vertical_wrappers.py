"""The paper's VTM wrapper around attention of the small encoder."""

import torch

from tests.helpers.toy_encoder import HEADS, WIDTH, Attention, random_batch
from tokenmixup import VerticalTokenMixupLayer


def wrap(attention, layer_index, apply_layers=(2,), kappa=3, **arguments):
    arguments.setdefault("verbose", False)
    return VerticalTokenMixupLayer(
        attention, layer_index, apply_layers, kappa, WIDTH, HEADS, **arguments
    )


def plain_attentions(count=3):
    return [Attention().double() for _ in range(count)]


def wrap_all(attentions, apply_layers=(2,), kappa=3, **arguments):
    """One model's wrappers, built one after another."""
    return [
        wrap(attention, layer, apply_layers, kappa, **arguments)
        for layer, attention in enumerate(attentions)
    ]


def run(wrappers, tokens):
    """One forward pass; each layer gets tokens of its own."""
    results = [wrapper(x) for wrapper, x in zip(wrappers, tokens, strict=True)]
    wrappers[0].reset()
    return results


def random_tokens(layers=3, batch=4, tokens=7, dtype=torch.float64):
    return [random_batch(batch, tokens, dtype)[0] for _ in range(layers)]
