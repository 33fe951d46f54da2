"""The yardstick computes the same as the library; otherwise its speed would mean nothing."""

import pytest
import timm
import torch

from benchmarks import direct
from benchmarks.pairing import KINDS, RHO, easy_samples, saliency
from tokenmixup import HorizontalConfig, attach, functional

HTM = {"rho": 1e-4, "scorenet_lambda": 0.5}


def cct():
    return timm.create_model("cct_4_3x2_32", num_classes=5)


def vit():
    settings = {"embed_dim": 24, "depth": 3, "num_heads": 3, "num_classes": 5}
    return timm.create_model("vit_base_patch16_224", img_size=64, **settings)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("share", [1, 0.5])
def test_pairing_and_mixing(kind, share):
    values, easy = saliency(kind, 24, 36).double(), easy_samples(24, share)
    assert easy.sum() == 24 * share
    gain = functional.saliency_gain(values, easy, RHO)
    torch.testing.assert_close(direct.saliency_gain(values, easy, RHO), gain)
    partner, ours = direct.assign_partners(gain), functional.assign_partners(gain)
    rows = torch.arange(len(gain))
    torch.testing.assert_close(gain[rows, partner].sum(), gain[rows, ours].sum())
    if kind in ("one-hot", "rank one"):
        return  # many assignments are best, and SciPy takes any of them
    tokens, targets = torch.randn(24, 38, 4).double(), torch.rand(24, 5).double().softmax(1)
    mixed_tokens, mixed_targets, mask = direct.horizontal_mixup(
        tokens, targets, values, easy, RHO, prefix=2
    )
    expected = functional.horizontal_mixup(tokens, targets, values, easy, RHO, 2)
    assert mask.any() and torch.equal(mask, expected.mask)
    assert torch.equal(mixed_tokens, expected.tokens)
    torch.testing.assert_close(mixed_targets, expected.targets)


def build(host, tau):
    torch.manual_seed(3)
    horizontal = HorizontalConfig(layers=(1,), tau=tau, **HTM)
    model = attach(host(), horizontal=horizontal).double().train()
    with torch.no_grad():  # larger weights: maps that differ from token to token
        for name, parameter in model.named_parameters():
            if "qkv" in name or "scorenet" in name:
                parameter.mul_(10)
    return model


def step(model, images, targets):
    out = model(images, targets)
    loss = functional.soft_cross_entropy(out.logits, out.targets).mean() + out.scorenet_loss
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return out, gradients


@pytest.mark.parametrize("host", [cct, vit])
@pytest.mark.parametrize("all_easy", [True, False])
def test_training_step(host, all_easy):
    size = 32 if host is cct else 64
    images = torch.randn(8, 3, size, size, dtype=torch.float64)
    targets = torch.rand(8, 5, dtype=torch.float64).softmax(-1)
    difficulty = build(host, 100)(images, targets).stats["htm/layer1/difficulty_mean"].item()
    tau = 100 if all_easy else difficulty
    out, gradients = step(build(host, tau), images, targets)
    assert out.stats["htm/layer1/mixed_share"] == 1 or not all_easy
    assert out.stats["htm/layer1/mixed_share"] > 0
    expected, expected_gradients = step(direct.DirectModel(build(host, tau)), images, targets)
    torch.testing.assert_close(
        expected.stats, {"htm/layer1/mixed_share": out.stats["htm/layer1/mixed_share"]}
    )
    torch.testing.assert_close(out.logits, expected.logits)
    torch.testing.assert_close(out.targets, expected.targets)
    torch.testing.assert_close(out.scorenet_loss, expected.scorenet_loss)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, expected_gradients[name], msg=name)
