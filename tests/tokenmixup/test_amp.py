"""Mixed precision by autocast, and models in float64 and bfloat16 throughout."""

import pytest
import torch

from tests.helpers.host_cases import batch, every_host
from tokenmixup import HorizontalConfig, VerticalConfig, attach
from tokenmixup.rules import Rules

HTM = HorizontalConfig(layers=(1,), tau=0.25, rho=0.005)
VTM = VerticalConfig(layers=(2,), kappa=3)
LOW = [torch.bfloat16, torch.float16]


def build(case, dtype=torch.float32, rules=None):
    torch.manual_seed(5)  # ScoreNet's weights
    return attach(case.build().to(dtype), horizontal=HTM, vertical=VTM, rules=rules).train()


def step(model, images, targets):
    torch.manual_seed(7)  # some rotary embeddings jitter
    out = model(images, targets)
    loss = out.logits.float().square().mean() + out.scorenet_loss
    return out, loss


def assert_finite(model, out):
    assert out.logits.isfinite().all() and out.scorenet_loss.isfinite()
    assert all(value.isfinite() for value in out.stats.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.dtype == parameter.dtype


# torch's word on a host with an RMS norm under autocast, with or without TokenMixup
@pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")
@every_host
@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_autocast(case, dtype):
    """Low-precision layers, and decisions in float32, those of the float32 model for the most."""
    measured = {}

    class Noting(Rules):
        def saliency(self, layer, saliency):
            measured[torch.is_autocast_enabled("cpu")] = saliency
            return saliency

    model = build(case, rules=Noting())
    images, targets = batch(case)
    full, _ = step(model, images, targets)
    with torch.autocast("cpu", dtype):
        out, loss = step(model, images, targets)
    loss.backward()

    assert_finite(model, out)
    assert out.logits.dtype in (dtype, torch.float32)
    assert measured[True].dtype == torch.float32
    assert out.targets.dtype == out.scorenet_loss.dtype == torch.float32
    assert out.stats["htm/layer1/difficulty_mean"].dtype == torch.float32
    torch.testing.assert_close(measured[True], measured[False], rtol=0, atol=0.05)
    torch.testing.assert_close(out.targets.sum(1), targets.sum(1))
    torch.testing.assert_close(
        out.stats["htm/layer1/difficulty_mean"],
        full.stats["htm/layer1/difficulty_mean"],
        rtol=0.1,
        atol=0,
    )


@every_host
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_whole_model_in_one_type(case, dtype):
    model = build(case, dtype)
    assert {p.dtype for p in model.scorenets.parameters()} == {dtype}
    images, targets = batch(case, dtype=dtype)
    out, loss = step(model, images, targets)
    loss.backward()
    assert_finite(model, out)
    assert out.logits.dtype == dtype
    assert out.targets.dtype == dtype
    wide = torch.promote_types(dtype, torch.float32)
    assert out.scorenet_loss.dtype == out.stats["htm/layer1/saliency_difference_max"].dtype == wide
