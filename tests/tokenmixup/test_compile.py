"""torch.compile with fullgraph=True: one graph, and the numbers of the eager model.

The fast tests take a few hosts whose attention is reached in different ways; the slow ones every
host.
"""

import shutil
import sys
from functools import partial

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from tests.helpers.host_cases import BY_NAME, batch, every_host, some_hosts
from tests.helpers.others_warnings import breaks_the_graph, uses_inductor
from tokenmixup import HorizontalConfig, TokenMixupOutput, VerticalConfig
from tokenmixup._targets import one_hot_targets

pytestmark = [uses_inductor, pytest.mark.usefixtures("fresh_compiler")]
needs_cpp = pytest.mark.skipif(
    not any(map(shutil.which, ("g++", "clang++"))) or " " in sys.prefix,
    reason="inductor needs a C++ compiler, and torch in a folder without a space in its path",
)

HTM = HorizontalConfig(layers=(1,), tau=0.25, rho=0.005)
VTM = VerticalConfig(layers=(2,), kappa=3)


NOT_CARRIED_OUT = r"was not carried out at layer.*fullgraph=True"


def build(case, horizontal=HTM, vertical=VTM):
    torch.manual_seed(5)  # ScoreNet's weights
    return case.attach(case.build(), horizontal=horizontal, vertical=vertical).train()


def step(model, run, images, targets):
    """Run a training step of the model through ``run``: the model itself, or it compiled."""
    model.zero_grad()
    torch.manual_seed(7)  # some rotary embeddings jitter
    out = run(images, targets)
    (out.logits.square().mean() + out.scorenet_loss).backward()
    return out, {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_close(first, second):
    (out, gradients), (expected, expected_gradients) = first, second
    assert isinstance(out, TokenMixupOutput) and out.stats.keys() == expected.stats.keys()
    tolerance = {"rtol": 1e-5, "atol": 1e-5}
    torch.testing.assert_close(out.logits, expected.logits, **tolerance)
    torch.testing.assert_close(out.targets, expected.targets, **tolerance)
    torch.testing.assert_close(out.scorenet_loss, expected.scorenet_loss, **tolerance)
    for name, value in expected.stats.items():
        torch.testing.assert_close(out.stats[name], value, **tolerance)
    assert gradients.keys() == expected_gradients.keys()
    for name, gradient in expected_gradients.items():
        torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
@breaks_the_graph
def test_a_compiled_step_that_fails_leaves_nothing_behind():
    """A graph break runs what was traced before as it stands; the failure comes behind it."""
    case = BY_NAME["vit"]
    model = build(case)
    images, targets = batch(case)
    mlp = model.backbone.blocks[2].mlp
    forward = mlp.forward

    @torch._dynamo.disable
    def fail(*args):
        raise RuntimeError("out of memory")

    mlp.forward = fail
    compiled = torch.compile(model, backend="eager")
    with pytest.raises(RuntimeError, match="out of memory"):
        compiled(images, targets)
    mlp.forward = forward
    model.eval()
    expected = model.backbone(images)
    for run in (compiled, torch.compile(model.backbone, backend="eager")):
        assert torch.equal(run(images), expected)
        with torch.no_grad():
            assert torch.equal(run(images), expected)


def check(case, backend):
    # Jitter draws its random numbers in a compiled graph otherwise than in eager code.
    model = build(case)
    if case.name in ("dinov3", "sapiens2"):
        model.backbone.rope.eval()
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled = torch.compile(model, fullgraph=True, backend=backend)
        for _ in range(2):  # other images, other samples easy: the same graph
            images, targets = batch(case)
            first = step(model, compiled, images, targets)
            assert_close(first, step(model, model, images, targets))
    assert first[0].stats["htm/layer1/tokens_mixed"] > 0


def check_evaluation(case, backend):
    images, targets = batch(case)
    model = build(case)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    compiled(images, targets)  # what a step leaves behind would mix in evaluation
    model.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(images), model(images), rtol=1e-5, atol=1e-5)


@some_hosts("vit", "cct")
def test_batches_of_any_size_run_one_more_graph(case):
    """The second size makes a graph of any size, as it does for the host alone."""
    compiled_graphs = CompileCounterWithBackend("eager")
    model = build(case)
    compiled = torch.compile(model, fullgraph=True, backend=compiled_graphs)
    for size in (6, 5, 3, 4):
        images, targets = (part[:size] for part in batch(case))
        assert_close(step(model, compiled, images, targets), step(model, model, images, targets))
    assert compiled_graphs.frame_count == 2


@some_hosts("vit", "cct")
def test_training_and_evaluation_compile_to_one_graph(case):
    check(case, "aot_eager")
    check_evaluation(case, "aot_eager")


@pytest.mark.parametrize("value", [float("nan"), 0.5])
def test_compiled_code_finds_targets_that_are_no_distribution(value):
    """It checks no values itself: the solver does, as on an accelerator."""
    case = BY_NAME["vit"]
    images, targets = batch(case)
    compiled = torch.compile(build(case), fullgraph=True, backend="aot_eager")
    compiled(images, targets)
    targets[3] = value
    with pytest.raises(ValueError, match=r"gain\[3, 0\] is nan: .*targets are no distribution"):
        compiled(images, targets)


def in_bfloat16(run):
    def forward(*args):
        with torch.autocast("cpu", torch.bfloat16):
            return run(*args)

    return forward


@uses_inductor
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=[needs_cpp])])
def test_class_indices_out_of_range_do_not_pass_for_samples_without_loss(backend):
    """inductor makes a comparison of the scatter, which would leave such rows zero."""
    compiled = torch.compile(partial(one_hot_targets, batch=3, num_classes=4), backend=backend)
    assert torch.equal(compiled(torch.tensor([0, 3, 1])), torch.eye(4)[[0, 3, 1]])
    for outside in (-100, -1, 4):
        try:
            found = compiled(torch.tensor([0, outside, 1]))
        except (IndexError, RuntimeError):  # a scatter says so itself
            continue
        assert found[1].isnan().all() and not found[[0, 2]].isnan().any()


BFLOAT16_ROUNDING = 2**-9
"""Fused code may sum in another order, and then round single activations to the next number."""

BACKENDS = ["aot_eager", pytest.param("inductor", marks=[needs_cpp, pytest.mark.slow])]


@pytest.mark.parametrize("backend", BACKENDS)
@some_hosts("vit", "cct")
def test_in_bfloat16_a_compiled_step_is_the_eager_one(case, backend):
    """Compiled code switches autocast off where eager code does: decisions are the same.

    What is left of a difference is small beside that of bfloat16 to float32.
    """
    model = build(case)
    images, targets = batch(case)
    _, exact = step(model, model, images, targets)
    expected, rounded = step(model, in_bfloat16(model), images, targets)
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    with torch._inductor.config.patch(emulate_precision_casts=True):
        out, gradients = step(model, in_bfloat16(compiled), images, targets)
    assert out.stats["htm/layer1/tokens_mixed"] > 0
    close = partial(torch.testing.assert_close, rtol=BFLOAT16_ROUNDING, atol=0)
    for name, value in expected.stats.items():
        close(out.stats[name], value)
    close(out.targets, expected.targets)
    close(out.scorenet_loss, expected.scorenet_loss)
    error, rounding = (
        sum((one[name] - other[name]).square().sum() for name in exact).sqrt()
        for one, other in ((gradients, rounded), (rounded, exact))
    )
    assert error <= 0.2 * rounding


@pytest.mark.slow
@every_host
def test_every_host_compiles_to_one_graph(case):
    check(case, "aot_eager")
    check_evaluation(case, "aot_eager")


@needs_cpp
@pytest.mark.slow
@some_hosts("vit", "eva02", "beit", "cct")
def test_hosts_of_several_kinds_compile_with_inductor(case):
    check(case, "inductor")


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"),
    reason="this torch does not compile hooks under activation checkpointing",
)
@some_hosts("vit")
def test_compiling_with_activation_checkpointing(case):
    images, targets = batch(case)
    model = build(case)
    expected = step(model, model, images, targets)
    model.backbone.set_grad_checkpointing()
    with torch._dynamo.config.patch(skip_fwd_side_effects_in_bwd_under_checkpoint=True):
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert_close(step(model, compiled, images, targets), expected)


def in_part(model):
    model.backbone.compile(backend="eager")
    return model


def layer_by_layer(model):
    for block in model.backbone.blocks:
        block.compile(backend="eager")
    return model


@breaks_the_graph
@pytest.mark.parametrize("compiled", [in_part, layer_by_layer])
@some_hosts("vit")
def test_compiling_in_parts_is_an_error(case, compiled):
    """Rather than a training in which nothing is mixed and nobody notices."""
    run = compiled(build(case))
    for _ in range(2):
        with pytest.raises(RuntimeError, match=NOT_CARRIED_OUT):
            run(*batch(case))
