"""The pure functions' gradients, errors and compilation.

Dimensions: B batch, N tokens with prefix, P prefix tokens, T = N - P patch tokens, D width,
C classes, E easy samples.
"""

import math

import pytest
import torch

from tests.helpers.cases import check_against_oracle, random_case, same_bits
from tests.helpers.others_warnings import uses_inductor
from tokenmixup import functional
from tokenmixup._targets import one_hot_targets

# Gradients


def test_no_gradient_flows_through_the_decision():
    attention = torch.rand(4, 2, 6, 6, requires_grad=True)
    logits = torch.randn(4, 3, requires_grad=True)
    for prefix in (0, 1):
        assert not functional.attention_saliency(attention, prefix).requires_grad
    assert not functional.sample_difficulty(logits, torch.eye(3)[[0, 1, 2, 0]]).requires_grad
    case = random_case()
    saliency = case.saliency.requires_grad_()
    tokens = case.tokens.requires_grad_()
    targets = case.targets.requires_grad_()
    out = functional.horizontal_mixup(*case.arguments())
    assert not out.targets.requires_grad
    gain = functional.saliency_gain(saliency, case.easy, case.rho)
    assert not gain.requires_grad
    assert not functional.query_key_saliency(tokens[None], tokens[None], 0.5).requires_grad
    partners = functional.assign_partners(gain)
    assert torch.equal(functional.assign_partners(gain.requires_grad_()), partners)
    functional.soft_cross_entropy(torch.randn(9, 5, requires_grad=True), targets).sum().backward()
    out.tokens.sum().backward()
    assert saliency.grad is None and targets.grad is None
    assert tokens.grad is not None


def test_token_gradient_is_routed_exactly():
    case = random_case(prefix=2)
    tokens = case.tokens.requires_grad_()
    out = functional.horizontal_mixup(*case.arguments())
    assert out.mask.any()
    # Whole numbers add without rounding, so the comparison is exact.
    weights = torch.randint(-8, 9, tokens.shape).double()
    (out.tokens * weights).sum().backward()
    expected = torch.zeros_like(tokens)
    batch, patches = case.saliency.shape
    for i in range(batch):
        expected[i, :2] += weights[i, :2]
        for t in range(patches):
            source = out.partner[i] if out.mask[i, t] else i
            expected[source, 2 + t] += weights[i, 2 + t]
    assert torch.equal(tokens.grad, expected)


# Errors: what came must be readable from the message


def shape_case(**changes):
    """Arguments that fit (B = 4, P = 1, T = 6, D = 3, C = 5), with some of them replaced."""
    arguments = {
        "tokens": torch.randn(4, 7, 3),
        "targets": torch.eye(5)[:4],
        "saliency": torch.rand(4, 6),
        "easy": torch.ones(4, dtype=torch.bool),
        "rho": 0.01,
        "num_prefix_tokens": 1,
    }
    return arguments | changes


@pytest.mark.parametrize(
    "changes, named",
    [
        ({"targets": torch.eye(5)[:3]}, ["3, 5", "4"]),
        ({"targets": torch.zeros(4)}, ["4,"]),
        ({"tokens": torch.randn(4, 7)}, ["4, 7"]),
        ({"tokens": torch.randn(4, 8, 3)}, ["4, 8, 3", "4, 6"]),
        ({"tokens": torch.randn(5, 7, 3)}, ["5, 7, 3", "4, 6"]),
        ({"saliency": torch.rand(4, 7)}, ["4, 7, 3", "4, 7"]),
        ({"saliency": torch.rand(3, 6)}, ["3, 6", "4, 7, 3"]),
        ({"saliency": torch.rand(4)}, ["4, 7, 3"]),
        ({"easy": torch.ones(3, dtype=torch.bool)}, ["3", "4"]),
        ({"easy": torch.ones(4, 1, dtype=torch.bool)}, ["4, 1"]),
        ({"num_prefix_tokens": 0}, ["4, 7, 3", "4, 6"]),
        ({"num_prefix_tokens": 2}, ["4, 7, 3", "4, 6"]),
    ],
)
def test_shapes_that_do_not_fit_are_named(changes, named):
    with pytest.raises(ValueError) as error:
        functional.horizontal_mixup(**shape_case(**changes))
    for shape in named:
        error.match(shape)


EASY = torch.ones(4, dtype=torch.bool)


def select(kappa=2, num_prefix_tokens=1):
    tokens, saliency = torch.rand(4, 7, 3), torch.rand(4, 6)
    return functional.select_salient_tokens(tokens, saliency, kappa, num_prefix_tokens)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: functional.horizontal_mixup(**shape_case(rho=-0.01)), "rho.*-0.01"),
        (lambda: functional.horizontal_mixup(**shape_case(rho=math.nan)), "rho.*nan"),
        (lambda: functional.saliency_gain(torch.rand(4, 6), EASY, -math.inf), "rho.*-inf"),
        (lambda: functional.saliency_gain(torch.rand(4), EASY, 0.1), r"\(B, T\).*\(4,\)"),
        (lambda: functional.attention_saliency(torch.rand(2, 6, 6)), r"\(2, 6, 6\)"),
        (lambda: functional.attention_saliency(torch.rand(2, 3, 6, 6), 6), "6 tokens.*got 6"),
        (lambda: functional.attention_saliency(torch.rand(2, 3, 6, 6), -1), "got -1"),
        (lambda: functional.query_key_saliency(*torch.rand(2, 2, 3, 6, 4), 0.5, 6), "of key"),
        (lambda: functional.saliency_gain(torch.rand(4, 6), EASY.float(), 0.1), "float32"),
        (lambda: functional.assign_partners(torch.rand(4, 3)), "4, 3"),
        (lambda: functional.assign_partners(torch.rand(4)), "4"),
        (lambda: select(kappa=0), "kappa.*got 0"),
        (lambda: select(kappa=7), "kappa.*got 7"),
        (lambda: select(num_prefix_tokens=0), "4, 7, 3.*4, 6"),
        (lambda: functional.sample_difficulty(torch.rand(4, 5), torch.rand(4, 6)), "4, 5.*4, 6"),
    ],
)
def test_impossible_arguments_are_named(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize(
    "name, value", [("saliency", math.inf), ("targets", math.nan), ("targets", math.inf)]
)
def test_what_is_not_finite(name, value):
    arguments = shape_case()
    arguments[name][1, 2] = value
    with pytest.raises(ValueError, match="finite"):
        functional.horizontal_mixup(**arguments)


def test_targets_that_cannot_hold_a_mixture():
    targets = torch.eye(5, dtype=torch.long)[:4]
    with pytest.raises(ValueError, match="int64"):
        functional.horizontal_mixup(**shape_case(targets=targets))


# Compilation


def compiled_equals_eager(device, backend):
    """Compiles once without a graph break and compares two batches of one shape with eager."""
    torch.compiler.reset()
    compiled = torch.compile(functional.horizontal_mixup, fullgraph=True, backend=backend)
    for seed in (0, 1):  # the second batch meets the code compiled for the first
        case = random_case(batch=6, patches=5, dtype=torch.float32, seed=seed)
        arguments = [a.to(device) if torch.is_tensor(a) else a for a in case.arguments()]
        eager = functional.horizontal_mixup(*arguments)
        out = compiled(*arguments)
        assert eager.mask.any()
        assert same_bits(out.tokens, eager.tokens)
        assert torch.equal(out.partner, eager.partner) and torch.equal(out.mask, eager.mask)
        torch.testing.assert_close(out.targets, eager.targets)
    torch.compiler.reset()


def test_compiles_without_a_graph_break():
    # Only the generation of machine code is left out: it needs a compiler and 20 seconds.
    compiled_equals_eager("cpu", "aot_eager")


def test_class_indices_become_one_hot_in_one_graph():
    labels = torch.tensor([2, 0, 1])
    compiled = torch.compile(one_hot_targets, fullgraph=True, backend="eager")
    assert torch.equal(compiled(labels, 3, 4), torch.eye(4)[labels])
    torch.compiler.reset()


@pytest.mark.gpu
@uses_inductor
def test_compiles_to_machine_code_on_cuda():
    compiled_equals_eager("cuda", "inductor")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_cuda_agrees_with_the_oracle(dtype):
    case = random_case(batch=6, patches=16, prefix=1, dtype=torch.float32)
    # On the grid of 1/128, as in cases.py, every dtype holds the saliencies exactly.
    case.saliency = torch.randint(0, 129, case.saliency.shape) / 128
    case.rho = 1 / 256
    case.tokens, case.targets = case.tokens.to(dtype), case.targets.to(dtype)
    arguments = [a.cuda() if torch.is_tensor(a) else a for a in case.arguments()]
    out = functional.horizontal_mixup(*arguments)
    assert all(value.is_cuda for value in out)
    check_against_oracle(case, type(out)(*(value.cpu() for value in out)))
