"""What only a CUDA device can show; skipped without one."""

import copy

import pytest
import timm
import torch

from benchmarks.gpu.models import MODELS
from benchmarks.gpu.parts import make_row, parts
from benchmarks.gpu.profile import profiled
from benchmarks.gpu.steps import COPIES, peak_bytes
from benchmarks.pairing import KINDS, RHO, easy_samples, saliency
from benchmarks.row import Settings
from benchmarks.steps import Steps, Workload
from experiments.training.distributed import World
from tests.helpers.others_warnings import forks, uses_inductor
from tokenmixup import HorizontalConfig, VerticalConfig, attach, functional

pytestmark = [pytest.mark.gpu, uses_inductor]

HTM = HorizontalConfig(layers=(1,), tau=100.0, rho=0.001)
VTM = VerticalConfig(layers=(2,), kappa=3)


def build():
    torch.manual_seed(5)
    settings = {"embed_dim": 64, "depth": 4, "num_heads": 4, "num_classes": 7}
    host = timm.create_model("vit_base_patch16_224", img_size=64, **settings)
    model = attach(host, horizontal=HTM, vertical=VTM).train().cuda()
    with torch.no_grad():  # maps that differ from token to token
        for name, parameter in model.named_parameters():
            if "qkv" in name:
                parameter.mul_(10)
    return model


def batch():
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(8, 3, 64, 64, generator=generator)
    return images.cuda(), torch.rand(8, 7, generator=generator).softmax(1).cuda()


def step(run, model):
    model.zero_grad()
    out = run(*batch())
    loss = functional.soft_cross_entropy(out.logits, out.targets).mean() + out.scorenet_loss
    loss.backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters()}


@pytest.mark.parametrize("share", [1, 0.5])
@pytest.mark.parametrize("kind", KINDS)
def test_decisions_and_mixing_are_those_of_the_cpu(kind, share):
    values, easy = saliency(kind, 128, 256), easy_samples(128, share)
    tokens, targets = torch.randn(128, 257, 32), torch.rand(128, 10).softmax(1)
    arguments = (tokens, targets, values, easy)
    gain = functional.saliency_gain(values, easy, RHO)
    on_gpu = functional.saliency_gain(values.cuda(), easy.cuda(), RHO)
    torch.testing.assert_close(on_gpu.cpu(), gain)
    # sums are taken in another order, so gains differ in their last bits, and equally good partners
    # may be exchanged: the optimum is the same, and all else follows from the partners
    found = functional.assign_partners(on_gpu).cpu()
    rows = torch.arange(len(gain))
    best = gain[rows, functional.assign_partners(gain)].double().sum()
    torch.testing.assert_close(gain[rows, found].double().sum(), best, rtol=1e-6, atol=0)
    mixed = functional.horizontal_mixup(*(a.cuda() for a in arguments), RHO, 1)
    partner, mask = mixed.partner.cpu(), mixed.mask.cpu()
    assert mask.any() and not mask[~easy].any()
    assert torch.equal(mask, (values[partner] - values > RHO) & easy.unsqueeze(1))
    decision = functional.MixingDecision(partner, mask)
    assert torch.equal(mixed.tokens.cpu(), functional.mix_tokens(tokens, decision, 1))
    expected = functional.mix_targets(targets, values, decision)
    torch.testing.assert_close(mixed.targets.cpu(), expected)


def test_a_model_computes_on_the_gpu_what_it_computes_on_the_cpu():
    model = build().double()
    on_cpu = copy.deepcopy(model).cpu()
    images, targets = (tensor.double() for tensor in batch())
    out, expected = model(images, targets), on_cpu(images.cpu(), targets.cpu())
    assert out.stats["htm/layer1/mixed_share"] > 0
    torch.testing.assert_close(out.logits.cpu(), expected.logits)
    torch.testing.assert_close(out.targets.cpu(), expected.targets)
    torch.testing.assert_close(out.scorenet_loss.cpu(), expected.scorenet_loss)
    for name, value in expected.stats.items():
        torch.testing.assert_close(out.stats[name].cpu(), value, msg=name)


@pytest.mark.parametrize("model", ["CCT-7/3×1", "ViT-B/16"])
@pytest.mark.parametrize("variant", COPIES)
def test_copies_to_the_host(model, variant):
    """At most the gain matrix, in whole training steps, statistics included."""
    workload = Workload(model, 8, "bf16", quick=True)
    device = torch.device("cuda", torch.cuda.current_device())
    one = Steps(workload, variant, World(0, 1, device))
    for _ in range(2):
        one()
    found = profiled(one, device, steps=3)
    assert found["kernels"] > 100, "the profiler saw nothing of the device"
    assert found["copies_to_host"] <= COPIES[variant]


# inductor's advice on the speed of float32, which these tests want as exact as it is
@pytest.mark.filterwarnings("ignore:TensorFloat32 tensor cores for float32:UserWarning")
def test_compiled_it_computes_the_same(fresh_compiler):
    model = build()
    expected, expected_gradients = step(model, model)
    out, gradients = step(torch.compile(model, fullgraph=True), model)
    assert torch.equal(out.targets, expected.targets) or torch.allclose(
        out.targets, expected.targets, rtol=1e-4
    )
    torch.testing.assert_close(out.logits, expected.logits, rtol=1e-3, atol=1e-3)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-2, atol=1e-3, msg=name)


def test_bfloat16():
    model = build()
    expected = model(*batch())
    with torch.autocast("cuda", torch.bfloat16):
        out = model(*batch())
    loss = functional.soft_cross_entropy(out.logits, out.targets).mean() + out.scorenet_loss
    loss.backward()
    assert out.stats["htm/layer1/mixed_share"] > 0
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all(), name
    difference = (out.scorenet_loss - expected.scorenet_loss).abs()
    assert difference <= 0.02 * expected.scorenet_loss


def test_activation_checkpointing():
    model = build()
    expected, expected_gradients = step(model, model)
    model.backbone.set_grad_checkpointing()
    out, gradients = step(model, model)
    torch.testing.assert_close(out.logits, expected.logits)
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_smoke_run_of_the_benchmark(tmp_path):
    settings = Settings(quick=True, device=torch.device("cuda"))
    for key, model in MODELS.items():
        part = make_row(f"{key}-off", parts(tmp_path)[f"{key}-off"])
        variants = part.measure(settings)["variants"]
        parameters = Steps(model.workload("off", True), "plain").learner.model.parameters()
        weights = sum(p.numel() * p.element_size() for p in parameters)
        for variant, found in variants.items():
            assert "error" not in found
            assert found["profile"]["copies_to_host"] <= COPIES[variant]
            assert found["peak_bytes"] > weights
        assert variants["HVTM"]["profile"]["gap_seconds"] > 0


@forks
@pytest.mark.parametrize("part", ["cct-loading", "epoch", "ceilings"])
def test_smoke_run_of_its_other_parts(part, tmp_path):
    one = make_row(part, parts(tmp_path)[part])
    values = one.measure(Settings(quick=True, device=torch.device("cuda")))
    assert one.tables(values)


def test_activation_checkpointing_needs_less_memory():
    workload, peaks = MODELS["vit"].workload("off", True), []
    for checkpointing in (False, True):
        one = Steps(workload, "HVTM", World(0, 1, torch.device("cuda")))
        one.learner.model.backbone.set_grad_checkpointing(checkpointing)
        one()
        peaks.append(peak_bytes(one))
    assert peaks[1] < peaks[0]
