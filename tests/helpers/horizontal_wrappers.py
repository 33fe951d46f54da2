"""The paper's HTM wrapper around a layer of the small encoder, or around a stub.

Dimensions: B batch, H heads, Q queries, K keys.
"""

import torch
from torch import nn

from tests.helpers.toy_encoder import CLASSES, HEADS, WIDTH, own_parameters
from tokenmixup import HorizontalTokenMixupLayer

POOLS = {
    "average_pooling": "average",
    "global_average_pooling": "average",
    "attention_pooling": "attention",
    "cls_pooling": "cls",
}
RHO = 0.01


class StubLayer(nn.Module):
    """A layer with a given attention map, which doubles its tokens and records its calls."""

    def __init__(self, attention_map):
        super().__init__()
        self.attention_map = nn.Parameter(attention_map)
        self.calls = []
        self.map_calls = []

    def forward(self, x, y, *args, **kwargs):
        self.calls.append((x, y, args, kwargs))
        return x * 2, y

    def get_attention_map(self, x, y, *args, **kwargs):
        self.map_calls.append((x, y, args, kwargs))
        assert not torch.is_grad_enabled(), "the map would be kept for a backward pass"
        return self.attention_map


def random_map(batch, queries, keys=None):
    """(B, H, Q, K), rows of sum 1."""
    scores = torch.randn(batch, HEADS, queries, queries if keys is None else keys)
    return scores.double().softmax(dim=-1)


def wrap(layer, tau=0.1, rho=RHO, **arguments):
    arguments.setdefault("verbose", False)
    wrapper = HorizontalTokenMixupLayer(layer, tau, rho, WIDTH, CLASSES, **arguments).double()
    for parameter in own_parameters(wrapper):
        nn.init.normal_(parameter, std=0.5)  # far from a fresh head's uniform guess
    return wrapper
