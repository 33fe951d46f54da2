"""Mixed precision by autocast, and models in float64 and bfloat16 throughout."""

import pytest
import torch

from tests.helpers.host_cases import BY_NAME, CASES, batch, every_host
from tokenmixup import HorizontalConfig, VerticalConfig, functional
from tokenmixup.hosts import base
from tokenmixup.rules import Rules

HTM = HorizontalConfig(layers=(1,), tau=0.25, rho=0.005)
VTM = VerticalConfig(layers=(2,), kappa=3)
LOW = [torch.bfloat16, torch.float16]


def build(case, dtype=torch.float32, rules=None):
    torch.manual_seed(5)  # ScoreNet's weights
    return case.attach(case.build().to(dtype), horizontal=HTM, vertical=VTM, rules=rules).train()


def step(model, images, targets):
    torch.manual_seed(7)  # some rotary embeddings jitter
    out = model(images, targets)
    loss = out.logits.float().square().mean() + out.scorenet_loss
    return out, loss


def with_gradient(model):
    return {name for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_finite(model, out):
    assert out.logits.isfinite().all() and out.scorenet_loss.isfinite()
    assert all(value.isfinite() for value in out.stats.values())
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            assert parameter.grad.isfinite().all(), name
            assert parameter.grad.dtype == parameter.dtype


# torch's word on a host with an RMS norm under autocast, with or without TokenMixup
rms_norm_warns = pytest.mark.filterwarnings("ignore:Mismatch dtype between input and weight")


@rms_norm_warns
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
    full, loss = step(model, images, targets)
    loss.backward()
    trained = with_gradient(model)
    model.zero_grad()
    with torch.autocast("cpu", dtype):
        out, loss = step(model, images, targets)
    loss.backward()

    assert_finite(model, out)
    # autocast keeps casts of weights: those of saliency have no gradient to hand on
    assert with_gradient(model) == trained
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


def test_a_scaler_skips_a_step_that_overflows():
    """As it does without TokenMixup: samples that have no number are mixed with none."""
    case = BY_NAME["vit"]
    model = build(case)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024)
    images, targets = batch(case)
    too_large = images.clone()
    too_large[::2] *= 3e5
    scales = []
    for given in (images, too_large, images):
        before = [parameter.detach().clone() for parameter in model.parameters()]
        with torch.autocast("cpu", torch.float16):
            out = model(given, targets)
            loss = out.loss()
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
        moved = not all(map(torch.equal, before, model.parameters()))
        assert loss.isfinite() == moved == (given is images)
    assert scales == [1024, 512, 512]


PROJECTIONS = ("qkv", "q_proj", "k_proj", "query", "key", "in_proj")


@rms_norm_warns
@every_host
@pytest.mark.parametrize("autocast", [True, False], ids=["autocast", "half-precision model"])
def test_saliency_is_not_rounded(case, autocast, monkeypatch):
    """Peaked maps: against float64, from the very queries and keys that the layer has."""
    calls = []

    def noting(query, key, scale, prefix, *, class_token, bias):
        arguments = {"class_token": class_token, "bias": bias}
        found = functional.query_key_saliency(query, key, scale, prefix, **arguments)
        calls.append((query, key, scale, prefix, class_token, bias, found))
        return found

    monkeypatch.setattr(base, "query_key_saliency", noting)
    model = build(case, torch.float32 if autocast else torch.bfloat16)
    with torch.no_grad():
        for name, parameter in model.backbone.named_parameters():
            if any(part in name for part in PROJECTIONS) and parameter.dim() > 1:
                parameter.mul_(2.5)  # six times those of a fresh ViT
    images, targets = batch(case, dtype=torch.float32 if autocast else torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        step(model, images, targets)

    assert len(calls) == (3 if case.vtm else 1)  # HTM at layer 1, VTM at 0 and 1
    for query, key, scale, prefix, class_token, bias, found in calls:
        scores = query.double() @ key.double().mT * scale + (0 if bias is None else bias.double())
        probabilities = scores.softmax(-1)
        # some hosts have norms that bound them, and padding has none
        assert scores[scores.isfinite()].abs().max() > 2
        rows = probabilities[..., 0, :] if class_token else probabilities.mean(-2)
        expected = rows.mean(-2)[..., prefix:]
        assert found.dtype == torch.float32
        torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize(
    "case, dtype",
    # in float64 the tests against the oracle run every host
    [(BY_NAME["vit"], torch.float64), *((case, torch.bfloat16) for case in CASES)],
    ids=lambda value: getattr(value, "name", str(value)),
)
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
    if case.vtm:
        assert out.stats["vtm/layer2/remembered_tokens"].dtype == torch.float32
    assert out.scorenet_loss.dtype == out.stats["htm/layer1/saliency_difference_max"].dtype == wide
