"""The rule that stops an over-optimised run, on runs whose truth is known, and the two laws, on data made by them."""

import math

import numpy
import pytest

from posttrain.evaluate.overoptimisation import MIN_PROMPTS, bend, distance, fit_laws, law_at, overoptimised
from posttrain.evaluate.stats import student

Array = numpy.ndarray


def stopped_at(gold_E: Array, score_E: Array, *, seed: int, prompts: int = 64, patience: int = 2) -> int | None:
    """The evaluation after which the rule stops a run with these true means; every answer has standard deviation 1."""
    random = numpy.random.default_rng(seed)
    gold_EB, score_EB = (mean[:, None] + random.normal(size=(len(mean), prompts)) for mean in (gold_E, score_E))
    for count in range(1, len(gold_E) + 1):
        found = overoptimised(gold_EB[:count], score_EB[:count], patience=patience, planned=len(gold_E))
        if found is not None and found.stop:
            return count - 1
    return None


@pytest.mark.parametrize("patience", [1, 2, 4])
def test_at_most_5_of_100_runs_on_a_plateau_are_stopped(patience: int) -> None:
    """21 evaluations in which gold stands still and the score rises without end: the hardest clean run there is."""
    flat, rising = numpy.zeros(21), numpy.linspace(0, 4, 21)
    stops = sum(stopped_at(flat, rising, seed=seed, patience=patience) is not None for seed in range(200))
    assert stops <= 10, f"{stops} of 200"


def test_a_fall_is_seen_and_a_fall_of_both_is_not_stopped() -> None:
    """Gold rises to 2 and falls by 0.3 an evaluation. Where the score falls too, it is another trouble."""
    gold = numpy.concatenate([numpy.linspace(0, 2, 11), 2 - 0.3 * numpy.arange(1, 11)])
    rising = numpy.linspace(0, 4, 21)
    found = [stopped_at(gold, rising, seed=seed) for seed in range(50)]
    assert all(stop is not None and 12 <= stop <= 16 for stop in found), found
    assert [stopped_at(gold, gold, seed=seed) for seed in range(20)] == [None] * 20
    assert stopped_at(gold, rising, seed=0, patience=0) is None, "patience = 0 never stops"


def test_the_rule_by_hand() -> None:
    """Nine prompts, gold down by 1 ± 0.5 since the best: t = -1 / 0.1667 = -6 lies beyond t(0.05 / 3 / 8 degrees) = 2.51..."""
    spread = numpy.array([0.5] * 4 + [-0.5] * 4 + [0.0]) * math.sqrt(8 / 8)
    gold = numpy.stack([numpy.zeros(9), numpy.ones(9), spread])
    score = numpy.stack([numpy.zeros(9), numpy.ones(9), numpy.full(9, 2.0)])
    found = overoptimised(gold, score, patience=1, planned=3)
    assert found is not None
    assert found.best == 1
    assert found.gold == pytest.approx((-1.0, 0.5 / 3))
    assert found.score == (1.0, 0.0)
    assert found.stop
    assert not overoptimised(gold, score[::-1], patience=1, planned=3).stop  # type: ignore[union-attr]
    assert overoptimised(gold, score, patience=2, planned=3) is None, "one evaluation came after the best"
    assert overoptimised(gold[:, : MIN_PROMPTS - 1], score[:, : MIN_PROMPTS - 1], patience=1, planned=3) is None


@pytest.mark.parametrize("freedom, tail, wanted", [(8, 0.05, 1.8595), (63, 0.000238, 3.6833), (30, 0.001, 3.3852)])
def test_students_t_in_the_tails(freedom: int, tail: float, wanted: float) -> None:
    from statistics import NormalDist

    assert student(freedom, NormalDist().inv_cdf(1 - tail)) == pytest.approx(wanted, rel=2e-3)


# --- the laws ---------------------------------------------------------------------------------------------------------

KL_E = numpy.array([0.0, 0.5, 1.0, 2.0, 4.0, 7.0, 11.0, 16.0, 25.0])


def measured(name: str, alpha: float, beta: float, *, noise: float, prompts: int = 100, seed: int = 0) -> tuple[Array, Array]:
    """KL and gold of every prompt [E, B] where the law holds, gold starting at 0.7."""
    random = numpy.random.default_rng(seed)
    d_E = distance(KL_E)
    gold_E = 0.7 + alpha * d_E - beta * bend(name, d_E)
    shape = (len(KL_E), prompts)
    kl_EB = KL_E[:, None] * (1 + noise * random.normal(size=shape))
    return kl_EB, gold_E[:, None] + noise * random.normal(size=shape)


@pytest.mark.parametrize(
    "name, alpha, beta, peak, top",
    [("best of n", 1.0, 0.2, 2.5, 1.25), ("RL", 1.0, 0.5, math.e, 0.5 * math.e)],
)  # fmt: skip
def test_data_of_a_law_give_it_back(name: str, alpha: float, beta: float, peak: float, top: float) -> None:
    """Without noise exactly, with its peak; with noise inside of the intervals, and better than the other law fits."""
    laws = {law.name: law for law in fit_laws(*measured(name, alpha, beta, noise=1e-9))}
    law = laws[name]
    assert (law.start, law.alpha.value, law.beta.value) == pytest.approx((0.7, alpha, beta), abs=1e-6)
    assert law.peak is not None
    assert (law.peak.value, law.top) == pytest.approx((peak, 0.7 + top), abs=1e-5)
    assert law_at(law, numpy.array([0.0, peak])) == pytest.approx([0.7, 0.7 + top], abs=1e-5)
    inside = 0
    for seed in range(10):
        laws = {law.name: law for law in fit_laws(*measured(name, alpha, beta, noise=0.5, seed=seed))}
        law, other = laws[name], next(law for law in laws.values() if law.name != name)
        inside += law.alpha.low < alpha < law.alpha.high and law.beta.low < beta < law.beta.high
        assert law.residual < other.residual
        assert law.peak is not None
        assert law.peak.low < law.peak.value < law.peak.high
    assert inside >= 8, f"{inside} of 10 hold both"


def test_what_has_no_peak_and_what_cannot_be_fitted() -> None:
    kl_EB, gold_EB = measured("best of n", 1.0, -0.05, noise=0.1)
    assert all(law.peak is None for law in fit_laws(kl_EB, gold_EB) if law.name == "best of n"), "it only rises"
    assert fit_laws(kl_EB[:3], gold_EB[:3]) == ()
    assert fit_laws(kl_EB[:, :4], gold_EB[:, :4]) == ()
    assert fit_laws(0 * kl_EB, gold_EB) == (), "it never moved"
