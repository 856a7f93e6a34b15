"""Intervals and verdicts: hand-worked values, published values, scipy and statsmodels, coverage by simulation."""

import itertools
from math import comb, isclose

import numpy
import pytest
import scipy.stats
from statsmodels.stats.contingency_tables import mcnemar
from statsmodels.stats.proportion import confint_proportions_2indep, proportion_confint

from posttrain.evaluate.stats import MIN_ITEMS_FOR_A_MEAN, Interval, mean, paired_shares, student, verdict, wilson


def paired(both: int, lost: int, won: int, neither: int) -> tuple[list[float], list[float]]:
    """Scores before and after of a 2 x 2 table."""
    before = [1.0] * (both + lost) + [0.0] * (won + neither)
    return before, [1.0] * both + [0.0] * lost + [1.0] * won + [0.0] * neither


def test_wilson_hand_worked():
    # 8 of 10: centre (0.8 + 3.8415/20) / 1.38415 = 0.71674; half 1.95996/1.38415 * sqrt(0.016 + 0.0096037) = 0.22658
    found = wilson(8, 10)
    assert isclose(found.low, 0.490162, abs_tol=1e-6)
    assert isclose(found.high, 0.943318, abs_tol=1e-6)
    assert found.value == 0.8


def test_wilson_at_the_ends_stays_inside_and_is_not_a_point():
    none, all_of_them = wilson(0, 10), wilson(10, 10)
    assert (none.low, all_of_them.high) == (0.0, 1.0)
    assert isclose(none.high, 3.841459 / 13.841459, abs_tol=1e-6)  # z^2 / (n + z^2)
    assert isclose(all_of_them.low, 1 - none.high)


@pytest.mark.parametrize("n", [1, 7, 78, 400])
def test_wilson_is_that_of_scipy_and_statsmodels(n: int):
    for hits in range(n + 1):
        ours, theirs = wilson(hits, n), scipy.stats.binomtest(hits, n).proportion_ci(0.95, method="wilson")
        assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=1e-12)
        assert (ours.low, ours.high) == pytest.approx(proportion_confint(hits, n, method="wilson"), abs=1e-12)


def test_wilson_covers_the_true_share():
    """Exact coverage of n = 78 at shares from 5 % to 95 %, by summing the binomial distribution."""
    n = 78
    intervals = [wilson(k, n) for k in range(n + 1)]
    for share in numpy.linspace(0.05, 0.95, 19):
        inside = [
            comb(n, k) * share**k * (1 - share) ** (n - k)
            for k in range(n + 1)
            if intervals[k].low <= share <= intervals[k].high
        ]
        assert 0.92 < sum(inside) < 0.98


def test_paired_shares_hand_worked_without_correlation():
    # Both 1, lost 7, won 1, neither 12 of 21 (airway reactions before and after transplantation, Bentur et al. 2009).
    # 1*12 - 7*1 = 5 < 21/2, so phi = 0. Wilson: 2/21 in (0.0265188, 0.2891414), 8/21 in (0.2075101, 0.5912135).
    # low  = -6/21 - sqrt((2/21 - 0.0265188)^2 + (0.5912135 - 8/21)^2)
    # high = -6/21 + sqrt((0.2891414 - 2/21)^2 + (8/21 - 0.2075101)^2)
    before = [1] * 1 + [0] * 1 + [1] * 7 + [0] * 12
    after = [1] * 1 + [1] * 1 + [0] * 7 + [0] * 12
    found = paired_shares(before, after)
    assert isclose(found.value, -6 / 21)
    assert isclose(found.low, -0.506920, abs_tol=1e-6)
    assert isclose(found.high, -0.025559, abs_tol=1e-6)


def test_paired_shares_hand_worked_with_correlation():
    # Both 20, lost 2, won 8, neither 20 of 50: phi = (20*20 - 2*8 - 25) / sqrt(22*28*28*22) = 359/616 = 0.582792
    before = [1] * 20 + [1] * 2 + [0] * 8 + [0] * 20
    after = [1] * 20 + [0] * 2 + [1] * 8 + [0] * 20
    found = paired_shares(before, after)
    assert isclose(found.value, 0.12)
    assert isclose(found.low, -0.005089, abs_tol=1e-6)
    assert isclose(found.high, 0.237269, abs_tol=1e-6)


def test_paired_shares_without_correlation_are_newcombe_s_independent_shares_of_statsmodels():
    """Where phi is 0, method 10 for paired shares is method 10 for independent ones: 126 tables."""
    tables = itertools.product(range(0, 21, 5), range(0, 21, 4), range(0, 21, 4), range(0, 30, 7))
    compared = 0
    for both, lost, won, neither in tables:
        items, numerator = both + lost + won + neither, both * neither - lost * won
        if items and 0 <= numerator <= items / 2:
            ours = paired_shares(*paired(both, lost, won, neither))
            low, high = confint_proportions_2indep(both + won, items, both + lost, items, method="newcomb", compare="diff")
            assert (ours.low, ours.high) == pytest.approx((max(-1.0, low), min(1.0, high)), abs=1e-12)
            compared += 1
    assert compared == 126


@pytest.mark.parametrize(("n", "limit"), [(72, 0.08), (139, 0.08)])
def test_the_verdict_on_paired_shares_is_close_to_the_exact_test_of_mcnemar(n: int, limit: float):
    """No change with p above 0.08 is called better, and every one with p below 0.05 is."""
    for lost in range(n // 4):
        for won in range(lost + 1, n // 4):
            both = (n - lost - won) // 2
            neither = n - lost - won - both
            p = mcnemar([[both, lost], [won, neither]], exact=True).pvalue
            better = verdict(paired_shares(*paired(both, lost, won, neither)), "higher", "share") == "better"
            assert p < limit if better else p > 0.05, (lost, won, p)


def test_paired_shares_is_antisymmetric():
    before, after = [1, 0, 0, 1, 0, 0, 0, 1], [1, 1, 1, 0, 0, 1, 0, 1]
    forth, back = paired_shares(before, after), paired_shares(after, before)
    assert isclose(forth.value, -back.value)
    assert isclose(forth.low, -back.high)


def test_four_changed_items_of_seventy_show_nothing_and_seven_do():
    """The exact test gives p = 0.125 for four against none, where a percentile bootstrap would already say better."""
    assert verdict(paired_shares([0] * 72, [1] * 4 + [0] * 68), "higher", "share") == "not shown"
    assert verdict(paired_shares([0] * 72, [1] * 7 + [0] * 65), "higher", "share") == "better"


@pytest.mark.parametrize(("n", "share", "agree"), [(72, 0.1, 0.5), (72, 0.5, 0.0), (139, 0.4, 0.6), (24, 0.3, 0.3)])
def test_paired_shares_covers_no_change(n: int, share: float, agree: float):
    """Two policies of one share, alike in `agree` of the cases: at most 6.5 % of 2,000 trials call a change."""
    random = numpy.random.default_rng(1)
    called = 0
    for _ in range(2000):
        before = random.random(n) < share
        after = numpy.where(random.random(n) < agree, before, random.random(n) < share)
        found = paired_shares(before.astype(float).tolist(), after.astype(float).tolist())
        called += not found.low <= 0 <= found.high
    assert called / 2000 <= 0.065


@pytest.mark.parametrize(("n", "draw"), [(24, "normal"), (24, "exponential"), (100, "exponential")])
def test_bootstrap_covers_the_true_mean(n: int, draw: str):
    """400 samples: the interval holds the true mean about 95 % of the time (from 90 % where the values are skewed)."""
    random = numpy.random.default_rng(2)
    held = 0
    for _ in range(400):
        values = random.normal(1.0, 1.0, n) if draw == "normal" else random.exponential(1.0, n)
        found = mean(values.tolist())
        held += found.low <= 1.0 <= found.high
    assert (0.92 if draw == "normal" else 0.90) <= held / 400 <= 0.985


def test_bootstrap_width_is_that_of_student():
    """Mean of 24 normal values: within 6 % of the textbook interval."""
    values = numpy.random.default_rng(3).normal(0, 1, 24)
    found = mean(values.tolist())
    textbook = 2 * 2.0687 * values.std(ddof=1) / 24**0.5
    assert abs((found.high - found.low) / textbook - 1) < 0.06


@pytest.mark.parametrize("n", [6, 24, 100])
def test_the_bootstrap_is_that_of_scipy_at_the_expanded_percentiles(n: int):
    """Two seeds of 10,000 and 50,000 resamples: the ends differ by less than 4 % of the width."""
    values = numpy.random.default_rng(n).exponential(1.0, n)
    tail = scipy.stats.norm.cdf(-((n / (n - 1)) ** 0.5) * scipy.stats.t.ppf(0.975, n - 1))
    theirs = scipy.stats.bootstrap(
        (values,), numpy.mean, confidence_level=1 - 2 * tail, method="percentile", n_resamples=50_000,
        rng=numpy.random.default_rng(5),
    ).confidence_interval  # fmt: skip
    ours, width = mean(values.tolist()), theirs.high - theirs.low
    assert (ours.low, ours.high) == pytest.approx((theirs.low, theirs.high), abs=0.04 * width)


def test_student_s_quantiles_are_those_of_scipy():
    """At 97.5 % within 0.004; at z = 3.5 within 0.2 % from seven degrees of freedom on."""
    for freedom in range(1, 400):
        assert student(freedom) == pytest.approx(scipy.stats.t.ppf(0.975, freedom), abs=0.004)
        if freedom >= 7:
            assert student(freedom, 3.5) == pytest.approx(scipy.stats.t.ppf(scipy.stats.norm.cdf(3.5), freedom), rel=0.002)


def test_bootstrap_is_deterministic_and_seeded():
    values = [1.0, 2.0, 4.0, 8.0, 16.0, 32.0]
    assert mean(values) == mean(values)
    assert mean(values, seed=1) != mean(values, seed=2)


def test_values_that_are_all_equal_have_no_width():
    assert mean([2.5] * 7) == Interval(2.5, 2.5, 2.5, 7)


def test_verdict_follows_the_interval_and_the_direction():
    up, down, across = Interval(0.2, 0.1, 0.3, 50), Interval(-0.2, -0.3, -0.1, 50), Interval(0.1, -0.1, 0.3, 50)
    assert (verdict(up, "higher", "share"), verdict(up, "lower", "share")) == ("better", "worse")
    assert (verdict(down, "higher", "share"), verdict(down, "lower", "share")) == ("worse", "better")
    assert verdict(across, "higher", "share") == "not shown"


def test_too_few_values_show_nothing():
    few = mean([1.0, 1.1, 1.2, 1.3, 1.4])
    assert few.n < MIN_ITEMS_FOR_A_MEAN
    assert few.low > 0
    assert verdict(few, "higher", "nats") == "not shown"
    assert verdict(mean([1.0, 1.1, 1.2, 1.3, 1.4, 1.5]), "higher", "nats") == "better"
