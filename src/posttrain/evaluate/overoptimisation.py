"""Over-optimisation of a reward model: the rule that stops a run, and the two laws of gold over KL.

    d = sqrt(KL(policy || init))                                              (Gao, Schulman, Hilton 2023)
    best of n   R(d) = d (alpha - beta d)         peak at d = alpha / (2 beta),          R = alpha^2 / (4 beta)
    RL          R(d) = d (alpha - beta log d)     peak at d = exp(alpha / beta - 1),     R = beta d

R is gold minus gold of the start, which is fitted too. Both laws are linear in alpha and beta. They are fitted by weighted
least squares; 95 % intervals come from resampling the prompts, over which all evaluations are paired.

The rule (`overoptimised`). Let b be the evaluation with the highest gold so far, and w the mean of the last `patience`
evaluations, all after b. A run is over-optimised if, over the same prompts,

    gold_w - gold_b < 0   at 95 %, one-sided, with a Bonferroni correction for all pairs of planned evaluations
    score_w - score_b > 0   at 95 %, one-sided

b is a maximum, so without the correction a run on a plateau would often be stopped by chance. With it at most one such run of
twenty is stopped, for any number of evaluations. The price is power: with K evaluations of n prompts, gold must fall by about
z(0.05 / (K (K - 1) / 2)) sqrt((1 + 1 / patience) / n) standard deviations of a prompt's gold.

`train/gold.py` applies the rule; `report/overoptimisation.py` draws the laws. No torch.

E: evaluations in their order, B: prompts, S: resamples.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from posttrain.evaluate.stats import student

Array = NDArray[numpy.float64]
LEVEL = 0.05
# With fewer prompts nothing is significant: their mean does not follow Student's t.
MIN_PROMPTS = 8
MIN_EVALUATIONS = 4
RESAMPLES = 1000


class Fallen(NamedTuple):
    """The result of the rule: the best evaluation, and the changes of gold and score since then (mean, standard error)."""

    best: int
    gold: tuple[float, float]
    score: tuple[float, float]
    stop: bool


def overoptimised(gold_EB: Array, score_EB: Array, *, patience: int, planned: int) -> Fallen | None:
    """Apply the rule to the evaluations so far, out of `planned`. None if too few follow the best one."""
    count, prompts = gold_EB.shape
    best = int(gold_EB.mean(1).argmax())
    if not patience or count - 1 - best < patience or prompts < MIN_PROMPTS:
        return None
    gold = _change(gold_EB, best, patience)
    score = _change(score_EB, best, patience)
    pairs = planned * (planned - 1) / 2
    fallen = gold[0] + _quantile(LEVEL / pairs, prompts) * gold[1] < 0
    risen = score[0] - _quantile(LEVEL, prompts) * score[1] > 0
    return Fallen(best, gold, score, fallen and risen)


def _change(value_EB: Array, best: int, window: int) -> tuple[float, float]:
    """The mean of the last evaluations minus the best one, paired by prompt: mean and standard error."""
    change_B = value_EB[-window:].mean(0) - value_EB[best]
    return float(change_B.mean()), float(change_B.std(ddof=1) / math.sqrt(len(change_B)))


def _quantile(tail: float, n: int) -> float:
    """The upper `tail` quantile of Student's t for n values."""
    return student(n - 1, NormalDist().inv_cdf(1 - tail))


# --- the laws ---------------------------------------------------------------------------------------------------------


class FittedValue(NamedTuple):
    """A value and its 95 % interval."""

    value: float
    low: float
    high: float


class Law(NamedTuple):
    """A fitted law. `peak` and `top` (d, and gold there) are None unless beta is significantly positive."""

    name: str
    start: float
    alpha: FittedValue
    beta: FittedValue
    peak: FittedValue | None
    top: float | None
    residual: float

    @property
    def unsure(self) -> tuple[str, ...]:
        """The parameters whose interval includes 0. If there are any, the law is not significant."""
        parameters = (("α", self.alpha), ("β", self.beta))
        return tuple(name for name, estimate in parameters if estimate.low <= 0 <= estimate.high)


def bend(name: str, d: Array) -> Array:
    """The factor of beta: d^2, or d log d, which is 0 at 0."""
    return d * d if name == "best of n" else d * numpy.log(numpy.maximum(d, 1e-12))


def law_at(law: Law, d: Array) -> Array:
    """Gold predicted by the law at distances d."""
    return law.start + law.alpha.value * d - law.beta.value * bend(law.name, d)


def fit_laws(kl_EB: Array, gold_EB: Array, *, seed: int = 0) -> tuple[Law, ...]:
    """Fit both laws; none if too few evaluations are usable. The first evaluation is the start, at d = 0."""
    evaluations = usable(kl_EB)
    if len(evaluations) < MIN_EVALUATIONS or gold_EB.shape[1] < MIN_PROMPTS:
        return ()
    kl_EB, gold_EB = kl_EB[evaluations], gold_EB[evaluations]
    n = gold_EB.shape[1]
    rows_SB = numpy.random.default_rng(seed).integers(0, n, (RESAMPLES, n))
    kl_SE, gold_SE = (numpy.stack([row_B[rows_SB].mean(1) for row_B in table_EB], axis=1) for table_EB in (kl_EB, gold_EB))
    weight_E = 1 / numpy.maximum(gold_EB.std(1, ddof=1), 1e-9)
    means = numpy.stack([kl_EB.mean(1)]), numpy.stack([gold_EB.mean(1)])
    return tuple(_fit(name, means, (kl_SE, gold_SE), weight_E) for name in ("best of n", "RL"))


def usable(kl_EB: Array) -> list[int]:
    """The start, and the evaluations whose KL exceeds its standard error. Closer ones say nothing about the slopes."""
    mean_E = kl_EB.mean(1)
    error_E = kl_EB.std(1, ddof=1) / math.sqrt(kl_EB.shape[1])
    return [e for e in range(len(kl_EB)) if e == 0 or mean_E[e] > error_E[e]]


def _fit(name: str, means: tuple[Array, Array], samples: tuple[Array, Array], weight_E: Array) -> Law:
    start, alpha, beta = map(float, _solve(name, *means, weight_E)[0])
    _, alpha_S, beta_S = _solve(name, *samples, weight_E).T
    law = Law(name, start, FittedValue(alpha, *_interval(alpha_S)), FittedValue(beta, *_interval(beta_S)), None, None, 0.0)
    residual_E = means[1][0] - law_at(law, distance(means[0][0]))
    law = law._replace(residual=float(numpy.sqrt((residual_E**2).mean())))
    if law.beta.low <= 0:
        return law
    peak_S = _peak(name, alpha_S[beta_S > 0], beta_S[beta_S > 0])
    peak = float(_peak(name, numpy.array([alpha]), numpy.array([beta]))[0])
    top = float(law_at(law, numpy.array([peak]))[0])
    return law._replace(peak=FittedValue(peak, *_interval(peak_S)), top=top)


def at_distance(kl_EB: Array, value_EB: Array, kl: float) -> Array | None:
    """The value of every prompt [B] at this KL, interpolated linearly in d. None outside the range of the evaluations."""
    d_E, d = distance(kl_EB.mean(1)), math.sqrt(max(kl, 0.0))
    for first, (low, high) in enumerate(itertools.pairwise(d_E)):
        if min(low, high) <= d <= max(low, high):
            share = (d - low) / (high - low) if high != low else 0.0
            value_B: Array = value_EB[first] * (1 - share) + value_EB[first + 1] * share
            return value_B
    return None


def distance(kl_E: Array) -> Array:
    """sqrt(KL); an estimate below 0 counts as 0."""
    return numpy.sqrt(numpy.maximum(kl_E, 0.0))


def _solve(name: str, kl_SE: Array, gold_SE: Array, weight_E: Array) -> Array:
    """Start, alpha and beta of every resample [S, 3] by weighted least squares."""
    d_SE = distance(kl_SE)
    columns = numpy.stack([numpy.ones_like(d_SE), d_SE, -bend(name, d_SE)], axis=2) * weight_E[:, None]
    coefficients: Array = numpy.einsum("sce,se->sc", numpy.linalg.pinv(columns), gold_SE * weight_E)
    return coefficients


def _peak(name: str, alpha: Array, beta: Array) -> Array:
    if name == "best of n":
        return alpha / (2 * beta)
    return numpy.exp(numpy.clip(alpha / beta - 1, -50, 50))


def _interval(values: Array) -> tuple[float, float]:
    low, high = numpy.quantile(values, [0.025, 0.975])
    return float(low), float(high)


def table(rows: Sequence[Mapping[str, Any]], key: str) -> Array:
    """One value per evaluation and prompt [E, B], from rows of gold.jsonl."""
    return numpy.array([row[key] for row in rows], dtype=float)
