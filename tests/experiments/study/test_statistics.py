"""Means, deviations and paired intervals, beside scipy's t-test and figures worked out by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from experiments.study.statistics import paired_difference, summarise

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
