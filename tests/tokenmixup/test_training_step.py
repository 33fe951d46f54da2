"""A whole training step against a naive one: loss, targets and the gradient of every parameter.

The naive step keeps every attention map, loops over layers by the equations, and takes its
decisions from the oracle (plain Python). Of several best assignments it takes the model's. Dropout
is off. float64 throughout.
"""

import pytest
import timm
import torch
import torch.nn.functional as F

import tokenmixup
from tests.helpers import oracle
from tokenmixup import HorizontalConfig, VerticalConfig
from tokenmixup.models import CCT
from tokenmixup.rules import Rules


def cct():
    return timm.create_model("cct_4_3x2_32", num_classes=5)


def vit(**kwargs):
    settings = {"embed_dim": 24, "depth": 4, "num_heads": 3, "mlp_ratio": 2, "num_classes": 5}
    return timm.create_model("vit_base_patch16_224", img_size=64, **settings, **kwargs)


def registers():
    return vit(reg_tokens=4, class_token=False, global_pool="avg")


def projections(block, x):
    """Queries, keys and values (B, H, N, d) of normalised tokens."""
    heads = block.attn.num_heads
    parts = F.linear(x, block.attn.qkv.weight, block.attn.qkv.bias).chunk(3, dim=-1)
    return [part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in parts]


def attention(block, tokens, memory=None):
    """Output and map of the block's attention on raw tokens, with raw remembered tokens."""
    query, key, value = projections(block, block.norm1(tokens))
    if memory is not None:
        _, more_key, more_value = projections(block, block.norm1(memory))
        key, value = torch.cat((key, more_key), 2), torch.cat((value, more_value), 2)
    probabilities = (query @ key.transpose(-2, -1) * query.shape[-1] ** -0.5).softmax(-1)
    out = (probabilities @ value).transpose(1, 2).flatten(2)
    return F.linear(out, block.attn.proj.weight, block.attn.proj.bias), probabilities


class Noting(Rules):
    """Keeps the partners of each layer."""

    def __init__(self):
        self.partners_of = {}

    def decide(self, layer, *args):
        decision = super().decide(layer, *args)
        self.partners_of[layer] = decision.partner
        return decision


def naive_step(model, images, targets):
    """Logits, mixed targets, ScoreNet loss of a TokenMixupModel that has made this step."""
    host, horizontal, vertical = model.backbone, model.horizontal, model.vertical
    is_cct = isinstance(host, CCT)
    prefix = 0 if is_cct else host.num_prefix_tokens
    if is_cct:
        x = host.tokenizer(images) + host.pos_embed
    else:
        x = host._pos_embed(host.patch_embed(images))
    loss, memory = 0, {}
    last_vertical = max(vertical.layers) if vertical else 0
    for layer, block in enumerate(host.blocks):

        def saliency(tokens, block=block):
            _, probabilities = attention(block, tokens)
            if prefix and not model.layout.class_token:  # registers alone: mean over the queries
                return oracle.attention_saliency(probabilities.detach())[:, prefix:]
            return oracle.attention_saliency(probabilities.detach(), prefix)

        if horizontal and layer in horizontal.layers:
            net = model.scorenets[str(layer)] if horizontal.scorenet else None
            easy = [True] * len(x)
            if net is not None:
                logits = net(x.detach() if horizontal.scorenet_stop_gradient else x)
                sample_loss = -(targets * logits.log_softmax(-1)).sum(-1)
                loss = loss + horizontal.scorenet_lambda * sample_loss.mean()
                difficulty = oracle.sample_difficulty(logits.detach(), targets)
                easy = difficulty <= horizontal.tau
            partner = model.rules.partners_of[layer]
            mixed = oracle.horizontal_mixup(
                x.detach(),
                targets,
                saliency(x),
                easy,
                horizontal.rho,
                prefix,
                partner,
                horizontal.labels,
            )
            mask = F.pad(torch.from_numpy(mixed.mask), (prefix, 0)).unsqueeze(-1)
            assert mask.any(), "a case in which nothing is mixed proves nothing"
            x = torch.where(mask, x[torch.from_numpy(mixed.partner)], x)
            targets = torch.from_numpy(mixed.targets)
        if layer < last_vertical:
            chosen = [oracle.salient_positions(row, vertical.kappa) for row in saliency(x)]
            rows = [x[i, [prefix + t for t in chosen[i]]] for i in range(len(x))]
            memory[layer] = torch.stack(rows)
            if vertical.stop_gradient:
                memory[layer] = memory[layer].detach()
        earlier = None
        if vertical and layer in vertical.layers:
            earlier = torch.cat([memory[index] for index in range(layer)], dim=1)
        x = x + attention(block, x, earlier)[0]
        if is_cct:
            x = block.norm2(x)
            x = x + block.mlp(x)
        else:
            x = x + block.mlp(block.norm2(x))
    logits = host.forward_head(host.norm(x))
    return logits, targets, loss


HTM = {"tau": 0.9, "rho": 1e-5, "scorenet_lambda": 0.5}
CASES = {
    "HTM": (HorizontalConfig(layers=(1,), **HTM), None),
    "HTM at the first layer": (HorizontalConfig(layers=(0,), **HTM), None),
    "HTM twice": (HorizontalConfig(layers=(1, 3), **HTM), None),
    "HTM of every sample": (HorizontalConfig(layers=(2,), rho=1e-5, scorenet=None), None),
    "HTM twice, labels by tokens": (
        HorizontalConfig(layers=(1, 3), **HTM, labels="tokens"),
        None,
    ),
    "HTM, average, stop": (
        HorizontalConfig(layers=(1,), **HTM, scorenet="average", scorenet_stop_gradient=True),
        None,
    ),
    "VTM": (None, VerticalConfig(layers=(2,), kappa=3)),
    "VTM twice": (None, VerticalConfig(layers=(1, 3), kappa=2)),
    "VTM, stop": (None, VerticalConfig(layers=(3,), kappa=3, stop_gradient=True)),
    "VTM below HTM": (
        HorizontalConfig(layers=(3,), **HTM),
        VerticalConfig(layers=(2,), kappa=3),
    ),
    "HTM below VTM": (
        HorizontalConfig(layers=(1,), **HTM),
        VerticalConfig(layers=(3,), kappa=3),
    ),
    "HTM and VTM at one layer": (
        HorizontalConfig(layers=(2,), **HTM),
        VerticalConfig(layers=(2,), kappa=3),
    ),
}


@pytest.mark.parametrize("host", [cct, vit, registers])
@pytest.mark.parametrize("case", CASES)
def test_training_step(host, case):
    compare_step(host, *CASES[case])


@pytest.mark.parametrize("host", [cct, vit, registers])
def test_training_step_in_which_some_samples_are_easy(host):
    vertical = VerticalConfig(layers=(2,), kappa=3)
    mean = compare_step(host, *CASES["HTM"]).stats["htm/layer1/difficulty_mean"].item()
    torch.manual_seed(0)  # the same model and batch once more, with tau amid the difficulties
    horizontal = HorizontalConfig(layers=(1,), **HTM | {"tau": mean})
    stats = compare_step(host, horizontal, vertical).stats
    assert 0 < stats["htm/layer1/easy_share"] < 1


def compare_step(host, horizontal, vertical):
    model = tokenmixup.attach(host(), horizontal=horizontal, vertical=vertical, rules=Noting())
    model.double().train()
    with torch.no_grad():  # larger weights: maps that differ from token to token
        for name, parameter in model.named_parameters():
            if "qkv" in name or "scorenet" in name:
                parameter.mul_(10)
    size = 32 if host is cct else 64
    images = torch.randn(6, 3, size, size, dtype=torch.float64)
    targets = torch.rand(6, 5, dtype=torch.float64).softmax(-1)

    out = model(images, targets)
    logits, mixed, scorenet_loss = naive_step(model, images, targets)
    expected = -(mixed * logits.log_softmax(-1)).sum(-1).mean() + scorenet_loss
    expected.backward()
    gradients = {name: p.grad.clone() for name, p in model.named_parameters()}
    model.zero_grad()

    loss = -(out.targets * out.logits.log_softmax(-1)).sum(-1).mean() + out.scorenet_loss
    loss.backward()
    torch.testing.assert_close(out.logits, logits, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(out.targets, mixed, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=1e-9)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-7, atol=1e-10, msg=name)
    return out
