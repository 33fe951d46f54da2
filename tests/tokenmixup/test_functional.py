"""The pure functions against the oracle, and their invariants over sizes, dtypes and degeneracies.

Dimensions: B batch, H heads, N tokens with prefix, P prefix tokens, T = N - P patch tokens,
D width, C classes, E easy samples.
"""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.helpers import oracle
from tests.helpers.cases import (
    DTYPES,
    TOLERANCE,
    array,
    cases,
    check_against_oracle,
    random_case,
    same_bits,
    soft_targets,
    wide,
)
from tokenmixup import functional
from tokenmixup._targets import no_distributions

SEEDS = st.integers(0, 2**32 - 1)


# Saliency, difficulty and gain


@given(
    seed=SEEDS,
    batch=st.integers(1, 4),
    heads=st.integers(1, 3),
    patches=st.sampled_from([1, 2, 7, 16]),
    prefix=st.sampled_from([0, 1, 5]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60)
def test_attention_saliency_matches_oracle(seed, batch, heads, patches, prefix, dtype):
    rng = np.random.default_rng(seed)
    tokens = prefix + patches
    attention = torch.tensor(rng.dirichlet(np.ones(tokens), (batch, heads, tokens))).to(dtype)
    saliency = functional.attention_saliency(attention, prefix)
    assert saliency.shape == (batch, patches) and saliency.dtype == wide(dtype)
    expected = oracle.attention_saliency(array(attention), prefix)
    np.testing.assert_allclose(array(saliency), expected, rtol=TOLERANCE[wide(dtype)], atol=1e-7)


@pytest.mark.parametrize("class_token", [True, False, None])
@pytest.mark.parametrize("prefix", [0, 1, 3])
def test_a_class_token_and_prefix_tokens_are_two_things(prefix, class_token):
    """Registers without a class token, or a class token that is looked at itself."""
    query, key = operands(3, 2, 6)
    bias = torch.randn(3, 2, 6, 6, generator=torch.Generator().manual_seed(1))
    attention = (query.double() @ key.double().mT * 0.3 + bias).softmax(-1)
    of_query = attention[:, :, 0] if class_token or (class_token is None and prefix) else attention
    expected = of_query.flatten(1, -2).mean(1)[:, prefix:]
    found = functional.attention_saliency(attention, prefix, class_token=class_token)
    torch.testing.assert_close(found, expected)
    found = functional.query_key_saliency(
        query, key, 0.3, prefix, class_token=class_token, bias=bias
    )
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-7)


@given(
    seed=SEEDS,
    batch=st.integers(1, 5),
    classes=st.integers(1, 6),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    dtype=st.sampled_from(DTYPES),
)
@settings(max_examples=60)
def test_sample_difficulty_matches_oracle(seed, batch, classes, scale, dtype):
    rng = np.random.default_rng(seed)
    logits = torch.tensor(rng.standard_normal((batch, classes)) * scale).to(dtype)
    targets = torch.tensor(soft_targets(rng, batch, classes)).to(dtype)
    difficulty = functional.sample_difficulty(logits, targets)
    assert difficulty.shape == (batch,) and difficulty.dtype == wide(dtype)
    expected = oracle.sample_difficulty(array(logits), array(targets))
    # A cross-entropy near zero is a difference of large logits: the error is relative to those.
    tolerance = TOLERANCE[wide(dtype)]
    slack = tolerance * (1 + scale / 10)
    np.testing.assert_allclose(array(difficulty), expected, rtol=tolerance, atol=slack)
    mixed = functional.sample_difficulty(logits.to(wide(dtype)), targets)  # targets' own type
    np.testing.assert_array_equal(array(mixed), array(difficulty))
    assert functional.sample_difficulty(logits, targets.double()).dtype == wide(dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_least_difficulty_is_that_of_the_best_logits(dtype):
    """Known for smoothing 0.1 and for one class; otherwise found by descent over the logits."""
    smoothed = torch.full((1000,), 0.1 / 1000, dtype=torch.float64)
    smoothed[3] += 0.9
    known = torch.stack((smoothed, torch.eye(1000, dtype=torch.float64)[7])).to(dtype)
    tolerance = TOLERANCE[dtype] / 10
    least = functional.least_difficulty(known)
    assert least.dtype == torch.promote_types(dtype, torch.float32)
    np.testing.assert_allclose(array(least), [0.1015, 0], atol=5e-5 + tolerance)

    targets = torch.tensor(soft_targets(np.random.default_rng(0), 6, 4)).clamp_min(0).to(dtype)
    logits = torch.zeros(6, 4, dtype=torch.float64, requires_grad=True)
    for _ in range(2000):
        difficulty = functional.soft_cross_entropy(logits, targets) / 10
        (gradient,) = torch.autograd.grad(difficulty.sum(), logits)
        logits.data.sub_(20 * gradient)
    least = array(functional.least_difficulty(targets))
    assert (least <= array(difficulty) + tolerance).all()
    np.testing.assert_allclose(least, array(difficulty), atol=1e-4 + tolerance)


@given(cases())
@settings(max_examples=60)
def test_saliency_gain_matches_oracle(case):
    gain = functional.saliency_gain(case.saliency, case.easy, case.rho)
    assert gain.shape == (int(case.easy.sum()), len(case.easy))
    expected = oracle.saliency_gain(array(case.saliency), array(case.easy), case.rho)
    tolerance = TOLERANCE[wide(case.saliency.dtype)]
    np.testing.assert_allclose(array(gain), expected, rtol=tolerance, atol=1e-7)
    seen = []
    arguments = case.saliency, case.targets, case.easy, case.rho
    functional.decide_mixing(
        *arguments, partners=lambda gain: seen.append(gain) or torch.arange(len(case.easy))
    )
    assert torch.equal(seen[0][case.easy], gain) and not seen[0][~case.easy].any()


# Assignment


@given(
    seed=SEEDS,
    rows=st.integers(0, 6),
    extra=st.integers(0, 6),
    levels=st.sampled_from([1, 2, 10, 2**20]),
    dtype=st.sampled_from([torch.float64, torch.float32]),
)
def test_assign_partners_reaches_the_optimum(seed, rows, extra, levels, dtype):
    rng = np.random.default_rng(seed)
    gain = torch.tensor(rng.integers(0, levels, (rows, rows + extra)) / levels).to(dtype)
    columns = functional.assign_partners(gain)
    assert columns.dtype == torch.int64 and columns.shape == (rows,)
    assert len(set(columns.tolist())) == rows
    assert all(0 <= column < rows + extra for column in columns.tolist())
    best = oracle.total_gain(array(gain), oracle.best_assignment(array(gain)))
    assert oracle.total_gain(array(gain), columns) == pytest.approx(best, rel=1e-6, abs=1e-12)


# Horizontal mixup: oracle and invariants


@given(cases() | cases(most_patches=256))
@settings(max_examples=150)
def test_horizontal_mixup_matches_oracle(case):
    check_against_oracle(case, functional.horizontal_mixup(*case.arguments()))


@given(cases())
@settings(max_examples=150)
def test_horizontal_mixup_invariants(case):
    before = [value.clone() for value in case.arguments()[:4]]
    out = functional.horizontal_mixup(*case.arguments())
    batch, prefix = len(case.easy), case.num_prefix_tokens

    assert out._fields == ("tokens", "targets", "partner", "mask")
    assert out.tokens.shape == case.tokens.shape and out.tokens.dtype == case.tokens.dtype
    assert out.targets.shape == case.targets.shape and out.targets.dtype == case.targets.dtype
    assert out.partner.shape == (batch,) and out.partner.dtype == torch.int64
    assert out.mask.shape == case.saliency.shape and out.mask.dtype == torch.bool

    mixed = out.mask.any(dim=1)
    assert torch.equal(mixed, out.partner != torch.arange(batch))
    assert not (mixed & ~case.easy).any()
    used = out.partner[mixed].tolist()
    assert len(set(used)) == len(used)

    assert same_bits(out.tokens[:, :prefix], case.tokens[:, :prefix])
    assert same_bits(out.tokens[~mixed], case.tokens[~mixed])
    assert same_bits(out.targets[~mixed], case.targets[~mixed])
    assert out.targets.isfinite().all() and out.tokens.isfinite().all()
    torch.testing.assert_close(
        out.targets.sum(dim=1).double(),
        case.targets.sum(dim=1).double(),
        rtol=0,
        atol=TOLERANCE[case.targets.dtype],
    )
    for value, old in zip(case.arguments()[:4], before, strict=True):
        assert same_bits(value, old), "an argument was written to"


@given(cases(), st.data())
def test_samples_of_nan_saliency_are_as_if_they_were_not_there(case, data):
    batch = len(case.easy)
    lost = torch.tensor(data.draw(st.lists(st.booleans(), min_size=batch, max_size=batch)))
    tokens, targets, saliency, easy, *rest = case.arguments()
    out = functional.horizontal_mixup(
        tokens, targets, saliency.masked_fill(lost.unsqueeze(1), torch.nan), easy, *rest
    )
    kept = (~lost).nonzero()[:, 0]
    alone = functional.horizontal_mixup(
        tokens[kept], targets[kept], saliency[kept], easy[kept], *rest
    )
    gains = functional.saliency_gain(saliency[kept], easy[kept], case.rho).double()
    assert not out.mask[lost].any()
    assert same_bits(out.tokens[lost], tokens[lost]) and same_bits(out.targets[lost], targets[lost])
    # of equal assignments another may come first where there are other samples
    totals = [
        (found.mask * (found_saliency[found.partner] - found_saliency - case.rho)).double().sum()
        for found, found_saliency in ((alone, saliency[kept]), (out, saliency.nan_to_num()))
    ]
    assert float(totals[0]) == pytest.approx(float(totals[1]), rel=1e-4, abs=1e-6), gains


def test_permuting_the_batch_permutes_the_result():
    case = random_case()
    order = torch.randperm(len(case.easy))
    out = functional.horizontal_mixup(*case.arguments())
    permuted = functional.horizontal_mixup(
        case.tokens[order],
        case.targets[order],
        case.saliency[order],
        case.easy[order],
        case.rho,
        case.num_prefix_tokens,
    )
    assert (out.partner != torch.arange(len(order))).any()
    assert torch.equal(permuted.tokens, out.tokens[order])
    torch.testing.assert_close(permuted.targets, out.targets[order])
    assert torch.equal(order[permuted.partner], out.partner[order])


def test_float64_saliencies_keep_their_precision():
    saliency = torch.tensor([[0.5, 0.5], [0.5 + 2.0**-40, 0.5]], dtype=torch.float64)
    easy = torch.tensor([True, False])
    out = functional.horizontal_mixup(torch.randn(2, 2, 3), torch.eye(2), saliency, easy, 0.0)
    assert out.mask.tolist() == [[True, False], [False, False]]
    assert out.partner.tolist() == [1, 1]


def test_sums_that_both_vanish_leave_the_target():
    # Raw scores may be negative: the kept part sums to zero and so does the replaced part.
    saliency = torch.tensor([[0.0, -5.0], [-1.0, 0.0]])
    tokens, targets = torch.randn(2, 2, 3), torch.eye(2)
    out = functional.horizontal_mixup(tokens, targets, saliency, torch.tensor([True, False]), 0.0)
    assert out.mask.tolist() == [[False, True], [False, False]]
    assert same_bits(out.tokens[0, 1], tokens[1, 1])
    assert same_bits(out.targets, targets)
    share = functional.label_share(saliency, functional.MixingDecision(out.partner, out.mask))
    assert share.tolist() == [0, 0]


# Token selection


@given(cases(), st.data())
@settings(max_examples=80)
def test_select_salient_tokens(case, data):
    batch, patches = case.saliency.shape
    kappa = data.draw(st.integers(1, patches), label="kappa")
    prefix = case.num_prefix_tokens
    # Each token's single feature is its position: exact in every dtype.
    positions = torch.arange(prefix + patches).to(case.tokens.dtype)
    tokens = positions[None, :, None].expand(batch, -1, 1)
    chosen = functional.select_salient_tokens(tokens, case.saliency, kappa, prefix)
    assert chosen.shape == (batch, kappa, 1) and chosen.dtype == tokens.dtype
    for i in range(batch):
        found = [int(position) - prefix for position in chosen[i, :, 0].tolist()]
        assert found == list(oracle.salient_positions(case.saliency[i], kappa))


@pytest.mark.parametrize("levels", [1, 3, 50])
def test_equal_saliencies_come_in_order_of_position(levels):
    """So many tokens that a sort which is not stable changes their order."""
    saliency = torch.randint(0, levels, (4, 577)) / 64
    found = functional.salient_positions(saliency, 400)
    for row, positions in zip(saliency.tolist(), found.tolist(), strict=True):
        assert positions == sorted(range(577), key=lambda t: -row[t])[:400]


def test_select_salient_tokens_matches_oracle_and_routes_gradient():
    tokens = torch.randn(3, 7, 2, dtype=torch.float64, requires_grad=True)
    saliency = torch.rand(3, 5, requires_grad=True)
    chosen = functional.select_salient_tokens(tokens, saliency, 2, 2)
    expected = oracle.select_salient_tokens(array(tokens), array(saliency), 2, 2)
    np.testing.assert_array_equal(array(chosen), expected)
    chosen.sum().backward()
    assert saliency.grad is None
    expected_grad = np.zeros((3, 7, 2))
    for i in range(3):
        for t in oracle.salient_positions(array(saliency)[i], 2):
            expected_grad[i, 2 + t] = 1
    np.testing.assert_array_equal(array(tokens.grad), expected_grad)


# Computed in parts


@given(st.integers(1, 9), st.integers(1, 70), st.integers(0, 99), st.integers(0, 2000))
def test_any_chunk_gives_the_reference(samples, tokens, seed, most):
    generator = torch.Generator().manual_seed(seed)
    saliency = torch.rand(samples, tokens, generator=generator).softmax(1)
    easy = torch.rand(samples, generator=generator) < 0.7
    rho = 0.1 / tokens
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_CPU_CHUNK", most)
        gain = functional.saliency_gain(saliency, easy, rho)
    assert torch.equal(gain, functional.saliency_gain(saliency, easy, rho)), (
        "bits do not depend on chunks"
    )
    expected = oracle.saliency_gain(array(saliency), easy, rho)
    np.testing.assert_allclose(gain.numpy(), expected, rtol=2e-6, atol=1e-8)


@pytest.mark.parametrize("device, most", [("cpu", 2**19), ("meta", 2**26)])
@given(elements=st.integers(0, 2**27))
def test_a_chunk_is_the_largest_that_fits(device, most, elements):
    rows = functional._rows_at_once(torch.empty(3, device=device), elements)
    assert rows >= 1 and (rows == 1 or rows * elements <= most)
    assert elements == 0 or (rows + 1) * elements > most


def test_no_gain_is_exactly_zero():
    """A solver leaves such samples alone; a rounded 1e-9 would give them partners."""
    saliency = torch.rand(40, 196).softmax(1)
    easy = torch.ones(40, dtype=torch.bool)
    gain = functional.saliency_gain(saliency, easy, rho=0.0)
    assert (gain.diagonal() == 0).all() and (gain > 0).sum() == 40 * 39
    assert (functional.saliency_gain(saliency, easy, rho=1.0) == 0).all()


def operands(samples, heads, tokens, seed=0):
    generator = torch.Generator().manual_seed(seed)
    query, key = torch.randn(2, samples, heads, tokens, 8, generator=generator)
    return query, key


def of_whole_map(query, key, bias=0.0):
    scores = query.double() @ key.double().transpose(-2, -1) * 0.3 + bias
    return functional.attention_saliency(scores.softmax(-1), class_token=False)


@given(st.integers(0, 9), st.integers(1, 3), st.integers(1, 7), st.integers(0, 300))
def test_any_part_at_once_gives_the_same(samples, heads, tokens, at_once):
    query, key = operands(samples, heads, tokens)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(functional, "_CPU_CHUNK", at_once)
        found = functional.query_key_saliency(query, key, 0.3, class_token=False)
    assert found.dtype == torch.float32 and found.shape == (samples, tokens)
    torch.testing.assert_close(found.double(), of_whole_map(query, key), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("shared", [True, False])
def test_each_part_gets_its_own_bias(monkeypatch, shared):
    query, key = operands(7, 2, 5)
    bias = torch.randn(1 if shared else 7, 2, 5, 5, generator=torch.Generator().manual_seed(1))
    monkeypatch.setattr(functional, "_CPU_CHUNK", 3 * 25)
    found = functional.query_key_saliency(query, key, 0.3, class_token=False, bias=bias)
    torch.testing.assert_close(found.double(), of_whole_map(query, key, bias), rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("at_once", [1, 5 * 2 * 12, 10**6])
def test_windows_are_maps_of_their_own(monkeypatch, at_once):
    """Of each window its map, with as many keys as queries or more; its bias, or one for all."""
    generator = torch.Generator().manual_seed(1)
    query = torch.randn(7, 5, 2, 3, 4, generator=generator)
    key = torch.randn(7, 5, 2, 4, 4, generator=generator)
    monkeypatch.setattr(functional, "_CPU_CHUNK", at_once)
    for windows in (1, 5):
        bias = torch.randn(1, windows, 2, 3, 4, generator=generator)
        found = functional.query_key_saliency(query, key, 0.3, class_token=False, bias=bias)
        assert found.shape == (7, 5, 4)
        for w in range(5):
            expected = of_whole_map(query[:, w], key[:, w], bias[:, w % windows])
            torch.testing.assert_close(found[:, w].double(), expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("class_token", [True, False])
@pytest.mark.parametrize("biased", [True, False])
@pytest.mark.parametrize("at_once", [1, 10**6])
def test_keys_that_all_heads_share_are_as_if_each_had_them(
    monkeypatch, class_token, biased, at_once
):
    query, key = operands(5, 3, 6)
    bias = torch.randn(1, 3, 6, 6, generator=torch.Generator().manual_seed(1)) if biased else None
    monkeypatch.setattr(functional, "_CPU_CHUNK", at_once)
    found, expected = (
        functional.query_key_saliency(query, keys, 0.3, 1, class_token=class_token, bias=bias)
        for keys in (key[:, :1], key[:, :1].expand_as(key))
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("class_token", [True, False])
def test_saliency_on_a_device_without_autocast(class_token):
    """Shapes alone, as tools that count operations want them."""
    query, key = torch.empty(2, 3, 2, 5, 8, dtype=torch.bfloat16, device="meta")
    found = functional.query_key_saliency(query, key, 0.3, class_token=class_token)
    assert found.shape == (3, 5) and found.dtype == torch.float32


BAD_ROWS = {
    "nan": [float("nan"), 0, 0],
    "infinite": [float("inf"), 0, 0],
    "zeros": [0, 0, 0],
    "twice": [1, 0, 1],
    "negative": [0.8, 0.4, -0.2],
}


@pytest.mark.parametrize("row", BAD_ROWS.values(), ids=BAD_ROWS)
@pytest.mark.parametrize("easy", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_targets_that_are_no_distribution_are_found_in_the_gains(row, easy, dtype):
    """What every device does: `decide_mixing` itself looks at no value, the solver does."""
    saliency = torch.rand(4, 6, dtype=torch.promote_types(dtype, torch.float32)).softmax(1)
    targets = torch.eye(3, dtype=dtype)[[0, 1, 2, 0]]
    targets[2] = torch.tensor(row, dtype=dtype)
    easy = torch.full((4,), easy)
    seen = []
    functional.decide_mixing(
        saliency, targets, easy, 0.0, partners=lambda gain: seen.append(gain) or torch.arange(4)
    )
    assert seen[0].isfinite().all(1).tolist() == [True, True, False, True]
    with pytest.raises(ValueError, match=r"gain\[2, 0\] is nan: .*targets are no distribution"):
        functional.decide_mixing(saliency, targets, easy, 0.0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("classes", [2, 100, 21_843])
def test_smoothed_and_mixed_targets_are_distributions(dtype, classes):
    """Label smoothing and Mixup carried out in the targets' type; and a softmax."""
    soft = (torch.randn(20, classes) * 3).softmax(1).to(dtype)
    labels = torch.randint(classes, (20,))
    smooth = torch.full((20, classes), 0.1 / classes, dtype=dtype)
    smooth[torch.arange(20), labels] += 0.9
    for targets in (soft, smooth, 0.3 * smooth + 0.7 * smooth.flip(0), 0.37 * soft + 0.63 * smooth):
        assert targets.dtype == dtype
        assert not no_distributions(targets).any()
