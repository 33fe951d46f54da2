"""Means, deviations and paired intervals, beside scipy's t-test and figures worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.study.plan import Claims, read_study
from experiments.study.statistics import (
    Difference,
    best_of_arms,
    compare,
    holm,
    judge,
    outcome,
    paired_difference,
    summarise,
)
from tests.helpers.runs_helper import HTM
from tests.helpers.study_helper import record_of, write_study

VALUES = st.floats(0, 100, allow_nan=False)


def test_worked_out_by_hand():
    summary = summarise({1: 2.0, 2: 4.0, 3: 9.0})
    assert (summary.count, summary.mean) == (3, 5.0)
    assert summary.std == pytest.approx(math.sqrt((9 + 1 + 16) / 2))
    # differences 1, 2, 3: mean 2, deviation 1; t(0.975, 2) = 4.30265 as tables have it
    difference = paired_difference({1: 1.0, 2: 4.0, 3: 9.0}, {3: 6.0, 2: 2.0, 1: 0.0})
    assert difference.mean == 2.0
    assert difference.half_width == pytest.approx(4.30265 / math.sqrt(3), rel=1e-5)
    assert not difference.excludes_zero


@given(st.lists(st.tuples(VALUES, VALUES), min_size=2, max_size=12))
def test_as_scipys_paired_t_test(pairs):
    ours, theirs = np.array(pairs).T
    if np.ptp(ours - theirs) < 1e-6:
        return  # scipy warns of a loss of precision, and gives nan where there is no spread
    difference = paired_difference(dict(enumerate(ours)), dict(enumerate(theirs)))
    test = stats.ttest_rel(ours, theirs)
    interval = test.confidence_interval(0.95)
    assert difference.interval == pytest.approx((interval.low, interval.high), rel=1e-6, abs=1e-6)
    assert difference.p_value == pytest.approx(test.pvalue, rel=1e-6, abs=1e-12)
    if abs(test.pvalue - 0.05) > 1e-6:
        assert difference.excludes_zero == (test.pvalue < 0.05)


def test_only_seeds_that_both_have_count():
    difference = paired_difference({1: 5.0, 2: 7.0, 9: 100.0}, {2: 5.0, 1: 4.0, 3: 0.0})
    assert difference.mean == 1.5 and difference.half_width is not None
    assert paired_difference({1: 5.0}, {2: 5.0}) is None


def test_one_seed_has_no_interval():
    difference = paired_difference({1: 5.0}, {1: 4.0})
    assert (difference.mean, difference.interval, difference.excludes_zero) == (1.0, None, False)
    assert summarise({1: 5.0}).std is None and summarise({}) is None


def test_no_spread_at_all():
    same = paired_difference({1: 5.0, 2: 6.0}, {1: 5.0, 2: 6.0})
    assert same.interval == (0.0, 0.0) and not same.excludes_zero
    shifted = paired_difference({1: 5.0, 2: 6.0}, {1: 4.0, 2: 5.0})
    assert shifted.interval == (1.0, 1.0) and shifted.excludes_zero


# Claims


def test_holm_by_hand():
    assert holm([]) == [] and holm([0.04]) == [0.04]
    # sorted 0.01, 0.02, 0.03, 0.6 times 4, 3, 2, 1; a corrected value is never below the one before
    assert holm([0.03, 0.01, 0.6, 0.02]) == pytest.approx([0.06, 0.04, 0.6, 0.06])
    assert holm([0.5, 0.9]) == [1.0, 1.0]


@given(st.lists(st.floats(0, 1), min_size=1, max_size=6), st.floats(0.001, 0.999))
def test_holm_rejects_as_the_sequential_procedure(p_values, alpha):
    left, rejected = dict(enumerate(p_values)), set()
    while left:
        index = min(left, key=left.__getitem__)
        if left[index] * len(left) > alpha:
            break
        rejected.add(index)
        del left[index]
    assert {i for i, p in enumerate(holm(p_values)) if p <= alpha} == rejected


@pytest.mark.parametrize(
    ("mean", "half", "p_value", "verdict"),
    [
        (0.1, 0.15, 0.2, "equal"),
        (0.2, 0.05, 1e-6, "equal"),  # it differs, but by less than counts
        (0.5, 0.3, 0.01, "better"),
        (-0.5, 0.3, 0.01, "worse"),
        (0.5, 0.4, 0.06, "undecided"),  # excludes 0, but not after the correction
        (0.0, 0.31, 1.0, "undecided"),
        (0.5, None, None, "undecided"),
    ],
)
def test_verdicts(mean, half, p_value, verdict):
    assert judge(Difference(mean, half, p_value), p_value, 0.3) == verdict


def test_an_outcome_corrects_the_primary_claims_alone():
    claims = Claims(0.3, (("a", "plain"), ("b", "plain")), (("b", "plain"),), ("control", "plain"))
    # differences 1, 2, 3: t = 2 sqrt 3, two-sided p of 2 degrees of freedom 0.0742
    top1 = {
        "plain": {1: 0.0, 2: 0.0, 3: 0.0},
        "a": {1: 1.0, 2: 2.0, 3: 3.0},
        "b": {1: 1.0, 2: 1.01, 3: 0.99},
        "control": {1: -1.0, 2: -1.01, 3: -0.99},
    }
    found = outcome(claims, top1)
    a, b = found.primary
    assert a.p_value == pytest.approx(0.0742, abs=1e-4) and a.verdict == "undecided"
    assert b.p_value == pytest.approx(2 * found.beside[0].p_value) and b.verdict == "better"
    assert found.control.verdict == "worse" and not found.sensitive
    assert outcome(claims, {**top1, "control": top1["b"]}).sensitive
    missing = outcome(claims, {**top1, "a": {}})
    assert missing.primary[0].difference is None and missing.primary[0].verdict == "undecided"


def test_the_best_of_an_arm_is_taken_when_all_its_trainings_are_done(tmp_path):
    variants = {
        "plain, 1": {},
        "HTM, 1": {"set": {"horizontal": HTM}},
        "HTM, 2": {"like": "HTM, 1", "set": {"horizontal": {"tau": 0.1}}},
        "HTM, 3": {"like": "HTM, 1", "set": {"horizontal": {"tau": 0.2}}},
    }
    path = write_study(tmp_path, variants=variants, plain="plain, 1", arms=["plain", "HTM"])
    study = read_study(path)
    assert study.arm("HTM") == ["HTM, 1", "HTM, 2", "HTM, 3"]
    top1 = {"plain, 1": (50, 50), "HTM, 1": (40, 60), "HTM, 2": (70, 50), "HTM, 3": (60, 60)}
    records = [
        record_of(study, variant, seed, float(value))
        for variant, values in top1.items()
        for seed, value in enumerate(values, start=1)
    ]
    best = best_of_arms(compare(study, records))
    assert {arm: s.variant.name for arm, s in best.items()} == {
        "plain": "plain, 1",
        "HTM": "HTM, 2",
    }
    assert best_of_arms(compare(study, records[:-1]))["HTM"] is None
