"""How much a judge prefers its own answers beyond what their quality explains.

    logit P(the judge picks the answer shown first) = b_pos + b_gold D + b_len L + b_self S

    D    1 if the answer shown first is the gold one, else -1
    L    its length in characters minus that of the other, in standard deviations of this difference
    S    1 if the judge wrote it and not the other, -1 the other way round, 0 otherwise

Every single order is an observation. Both orders of a pair are judged about the same texts, so the standard errors allow for
their dependence (the sandwich estimator, clustered by pair). Coefficients are found by Newton's method.

The equal-opportunity gap is P(picks its own | its own is gold) - P(picks the other | the other is gold), over the orders with
exactly one own answer. A judge without self-preference has b_self = 0 and, with the same accuracy for both, a gap of 0.
Left out: authors of the same family, and whether the judge recognises its own answers.
"""

from collections.abc import Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from posttrain.evaluate.stats import wilson

Array = NDArray[numpy.float64]
NAMES = ("b_pos", "b_gold", "b_len", "b_self")
STEPS, TOLERANCE = 50, 1e-10
# A larger coefficient means that a combination of the causes predicts every verdict, so there is no finite estimate.
LARGEST = 30.0


class JudgedOrder(NamedTuple):
    """One order of one pair. `picked` is 1 if the answer shown first is preferred, 1/2 for a tie, else 0.

    `gold` and `own` are 1 for the answer shown first, -1 for the other, 0 for neither or both; `longer` is the difference of
    the lengths in characters.
    """

    pair: int
    picked: float
    gold: int
    longer: int
    own: int


class Logit(NamedTuple):
    """Coefficients [K] and their standard errors [K], clustered."""

    coefficients: Array
    errors: Array


def fit_logit(x_NK: Array, y_N: Array, clusters_N: NDArray[numpy.int64]) -> Logit | None:
    """The logit regression of y on x by Newton's method, or None if it has no finite or no unique solution.

    The errors are the sandwich estimator over clusters, without a correction for their number.
    """
    b_K = numpy.zeros(x_NK.shape[1])
    for _ in range(STEPS):
        p_N = _probabilities(x_NK, b_K)
        information_KK = x_NK.T @ (x_NK * (p_N * (1 - p_N))[:, None])
        if not numpy.linalg.cond(information_KK) < 1e12:
            return None
        step_K = numpy.linalg.solve(information_KK, x_NK.T @ (y_N - p_N))
        b_K = b_K + step_K
        if numpy.abs(b_K).max() > LARGEST:
            return None
        if numpy.abs(step_K).max() < TOLERANCE:
            break
    else:
        return None
    p_N = _probabilities(x_NK, b_K)
    inverse_KK = numpy.linalg.inv(x_NK.T @ (x_NK * (p_N * (1 - p_N))[:, None]))
    scores_NK = x_NK * (y_N - p_N)[:, None]
    sums_CK = numpy.array([scores_NK[clusters_N == cluster].sum(0) for cluster in numpy.unique(clusters_N)])
    covariance_KK = inverse_KK @ (sums_CK.T @ sums_CK) @ inverse_KK
    return Logit(b_K, numpy.sqrt(numpy.diag(covariance_KK)))


def _probabilities(x_NK: Array, b_K: Array) -> Array:
    probabilities: Array = 1 / (1 + numpy.exp(-x_NK @ b_K))
    return probabilities


def self_preference(choices: Sequence[JudgedOrder]) -> dict[str, Any]:
    """The regression and the gap. `coefficients` is None if there is no finite estimate."""
    lengths = numpy.array([choice.longer for choice in choices], float)
    deviation = float(lengths.std()) or 1.0
    x_NK = numpy.array([[1.0, c.gold, c.longer / deviation, c.own] for c in choices]).reshape(-1, len(NAMES))
    # A cause that never differs has no coefficient.
    used = [k for k in range(len(NAMES)) if x_NK[:, k].any()]
    y_N, pairs_N = numpy.array([c.picked for c in choices]), numpy.array([c.pair for c in choices], numpy.int64)
    fit = fit_logit(x_NK[:, used], y_N, pairs_N) if len(choices) > len(used) else None
    coefficients = None
    if fit is not None:
        coefficients = {
            NAMES[k]: {"value": round(float(fit.coefficients[n]), 4), "error": round(float(fit.errors[n]), 4)}
            for n, k in enumerate(used)
        }
    return {"orders": len(choices), "own": sum(c.own != 0 for c in choices), "coefficients": coefficients, **_gap(choices)}


def _gap(choices: Sequence[JudgedOrder]) -> dict[str, Any]:
    """The equal-opportunity gap with Newcombe's interval of a difference of independent shares (1998, method 10)."""
    own_gold = [_picked_gold(c) for c in choices if c.own and c.own == c.gold]
    other_gold = [_picked_gold(c) for c in choices if c.own and c.own == -c.gold]
    if not own_gold or not other_gold:
        return {"gap": None}
    own, other = wilson(sum(own_gold), len(own_gold)), wilson(sum(other_gold), len(other_gold))
    value = own.value - other.value
    low = value - sqrt((own.value - own.low) ** 2 + (other.high - other.value) ** 2)
    high = value + sqrt((own.high - own.value) ** 2 + (other.value - other.low) ** 2)
    return {
        "gap": {
            "value": round(value, 4), "low": round(low, 4), "high": round(high, 4),
            "own": round(own.value, 4), "n_own": own.n, "other": round(other.value, 4), "n_other": other.n,
        }
    }  # fmt: skip


def _picked_gold(choice: JudgedOrder) -> float:
    return choice.picked if choice.gold == 1 else 1 - choice.picked
