"""95 % intervals of measures and of differences between two policies on the same items.

    share of n items            Wilson's score interval (Wilson 1927)
    difference of paired shares Newcombe's square-and-add interval, method 10 (Newcombe 1998, Stat. Med. 17:2635)
    mean, mean of differences   expanded percentile bootstrap (Hesterberg 2015, The American Statistician 69:371)

`scorecard.py` calls this for every measure and every change. Both policies answered the same items, so differences are paired
by item. The bootstrap is seeded and therefore deterministic.

Shares do not use the bootstrap: with four changed items of seventy, all improvements, fewer than 2 % of the resamples contain
none of them, so the percentile interval excludes 0, while the exact test gives p = 0.125. Not included: correction for multiple
comparisons, and the variation between training seeds, which is larger than these intervals.
"""

from collections.abc import Iterable, Sequence
from math import sqrt
from statistics import NormalDist
from typing import Literal, NamedTuple

import numpy
from numpy.typing import NDArray

Unit = Literal["share", "nats", "tokens"]
Verdict = Literal["better", "worse", "not shown"]
Z = NormalDist().inv_cdf(0.975)
RESAMPLES = 10_000
# With fewer values all resamples may have the same sign: two values of one sign would be "significant" half of the time.
MIN_ITEMS_FOR_A_MEAN = 6
_CHUNK = 2_000_000


class Interval(NamedTuple):
    """A value and its 95 % interval, from n items."""

    value: float
    low: float
    high: float
    n: int


def wilson(hits: float, n: int) -> Interval:
    """The interval of a share by Wilson's score method. n must be positive."""
    assert n > 0, "a share needs at least one item"
    share = hits / n
    centre = (share + Z * Z / (2 * n)) / (1 + Z * Z / n)
    half = Z / (1 + Z * Z / n) * sqrt(share * (1 - share) / n + Z * Z / (4 * n * n))
    low = 0.0 if hits == 0 else max(0.0, centre - half)
    return Interval(share, low, 1.0 if hits == n else min(1.0, centre + half), n)


def paired_shares(before: Sequence[float], after: Sequence[float]) -> Interval:
    """Share after − share before, over the same items (values 0 or 1), by Newcombe's method 10."""
    n = len(before)
    assert n == len(after) != 0, "both sides need the same items"
    both = sum(b == 1 and a == 1 for b, a in zip(before, after))
    lost = sum(b == 1 and a == 0 for b, a in zip(before, after))
    won = sum(b == 0 and a == 1 for b, a in zip(before, after))
    share_before, share_after = wilson(both + lost, n), wilson(both + won, n)
    phi = _correlation(both, lost, won, n - both - lost - won)
    value = (won - lost) / n
    low = value - _square_and_add(share_after.value - share_after.low, share_before.high - share_before.value, phi)
    high = value + _square_and_add(share_after.high - share_after.value, share_before.value - share_before.low, phi)
    return Interval(value, max(-1.0, low), min(1.0, high), n)


def _correlation(both: int, lost: int, won: int, neither: int) -> float:
    """Phi of the 2 x 2 table, with a continuity correction of a positive numerator (Newcombe 1998)."""
    product = (both + lost) * (won + neither) * (both + won) * (lost + neither)
    if product == 0:
        return 0.0
    numerator = float(both * neither - lost * won)
    if numerator > 0:
        numerator = max(0.0, numerator - (both + lost + won + neither) / 2)
    return numerator / sqrt(product)


def _square_and_add(first: float, second: float, phi: float) -> float:
    return sqrt(max(0.0, first * first - 2 * phi * first * second + second * second))


def mean(values: Sequence[float], *, seed: int = 0) -> Interval:
    """The interval of a mean by the expanded percentile bootstrap: its percentiles are slightly beyond 2.5 %, which gives the
    width of Student's t interval. A single value has an interval of width 0."""
    n = len(values)
    assert n > 0, "a mean needs at least one value"
    value = float(numpy.mean(values))
    if n == 1 or min(values) == max(values):
        return Interval(value, value, value, n)
    means = _resampled_means(numpy.asarray(values, dtype=float), seed)
    tail = NormalDist().cdf(-sqrt(n / (n - 1)) * student(n - 1))
    low, high = numpy.quantile(means, [tail, 1 - tail])
    return Interval(value, float(low), float(high), n)


def _resampled_means(values: NDArray[numpy.float64], seed: int) -> NDArray[numpy.float64]:
    random = numpy.random.default_rng(seed)
    rows = max(1, _CHUNK // len(values))
    parts = [
        values[random.integers(0, len(values), (min(rows, RESAMPLES - start), len(values)))].mean(axis=1)
        for start in range(0, RESAMPLES, rows)
    ]
    return numpy.concatenate(parts)


def weighted_mean(weighted: Iterable[tuple[float, float | None]]) -> float | None:
    """Σ w x / Σ w over pairs (w, x) that have a value x; None without one."""
    known = [(weight, value) for weight, value in weighted if value is not None]
    total = sum(weight for weight, _ in known)
    return sum(weight * value for weight, value in known) / total if total else None


def student(freedom: int, z: float = Z) -> float:
    """The quantile of Student's t at the level of the normal quantile z, by default 97.5 %. There it is exact for one and two
    degrees of freedom; else by Hill's expansion (error below 0.004 at 97.5 %, below 0.2 % at z = 3.5 from seven degrees on)."""
    if z == Z and freedom <= 2:
        return (12.7062, 4.3027)[freedom - 1]
    v = freedom
    first = (z**3 + z) / 4
    second = (5 * z**5 + 16 * z**3 + 3 * z) / 96
    third = (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384
    fourth = (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160
    return z + first / v + second / v**2 + third / v**3 + fourth / v**4


def interval(values: Sequence[float], unit: Unit) -> Interval:
    """The interval of a measure: Wilson for shares, bootstrap for other units."""
    return wilson(sum(values), len(values)) if unit == "share" else mean(values)


def difference(before: Sequence[float], after: Sequence[float], unit: Unit) -> Interval:
    """The interval of after − before over the same items in the same order."""
    if unit == "share":
        return paired_shares(before, after)
    return mean([a - b for b, a in zip(before, after, strict=True)])


def verdict(change: Interval, better: Literal["higher", "lower"], unit: Unit) -> Verdict:
    """Better or worse if the interval of the change excludes 0. A mean of too few items is never significant."""
    if change.low <= 0 <= change.high or (unit != "share" and change.n < MIN_ITEMS_FOR_A_MEAN):
        return "not shown"
    return "better" if (change.low > 0) == (better == "higher") else "worse"
