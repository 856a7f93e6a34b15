"""What the scores of preference pairs say of the reward model that gave them. Numbers only: no model, no torch.

    accuracy      share of pairs with r(chosen) > r(rejected), Wilson's interval; a tie is not right
    calibration   how often the model is right where it says s(|gap|): ten bins, and the expected calibration error
                  sum_bins n_bin / n |share right - mean s(|gap|)|                     (Guo et al. 2017, eq. 3)
                  It is above 0 by chance alone: `error_if_perfect` is what the same gaps would give if each pair were
                  right with exactly the chance that the model says (about 0.15 of 45 pairs)
    length        with a+ and a- the accuracies where the chosen completion is the longer and the shorter one:
                  balanced = (a+ + a-) / 2,   share of the gain from length = 1 - (balanced - 1/2) / (accuracy - 1/2)
                  (pairs of unequal length; Singhal et al. 2023 compare within lengths for the same reason)
    agreement     of two reward models on the same pairs: share alike, kappa = (share - chance) / (1 - chance)
                  (Cohen 1960) with chance from how often each is right, correlation of their gaps

Where it stands: `evaluate/reward_model.py` scores pairs and asks here; the report compares reward models here.
"""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from posttrain.evaluate.stats import wilson

BINS = 10
SIMULATIONS = 1000
# Upper ends of the differences of lengths in tokens, chosen - rejected, by which accuracy is told.
LENGTHS = (("shorter by 64 or more", -64), ("shorter by 16 to 63", -16), ("shorter by 1 to 15", -1), ("equal", 0),
           ("longer by 1 to 15", 15), ("longer by 16 to 63", 63))  # fmt: skip
LONGEST = "longer by 64 or more"
QUARTERS = ("smallest quarter", "second quarter", "third quarter", "largest quarter")


class ScoredPair(NamedTuple):
    """A pair with the scores and lengths in tokens of both completions; `category` where its file has one."""

    id: str
    chosen_score: float
    rejected_score: float
    chosen_tokens: int
    rejected_tokens: int
    category: str = ""

    @property
    def gap(self) -> float:
        """Score of the chosen completion minus that of the rejected one."""
        return self.chosen_score - self.rejected_score

    @property
    def longer(self) -> int:
        """Tokens by which the chosen completion is longer."""
        return self.chosen_tokens - self.rejected_tokens


def measure(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """What the scores say of the reward model; see the module's equations. Needs at least one pair."""
    unequal = [pair for pair in pairs if pair.longer]
    bins = calibration([pair.gap for pair in pairs])
    scores = [s for p in pairs for s in (p.chosen_score, p.rejected_score)]
    return {
        "pairs": len(pairs),
        "accuracy": share([p.gap > 0 for p in pairs]),
        "chosen_longer": share([p.gap > 0 for p in unequal if p.longer > 0]),
        "chosen_shorter": share([p.gap > 0 for p in unequal if p.longer < 0]),
        "longer_preferred": share([(p.gap > 0) == (p.longer > 0) for p in unequal]),
        "longer_wins": share([p.longer > 0 for p in unequal]),
        **length_balanced(unequal),
        "by_length": _by(pairs, [name for name, _ in LENGTHS] + [LONGEST], _length_class),
        "by_margin": _by_margin(pairs),
        "by_category": _by_category(pairs),
        "calibration": bins,
        "calibration_error": sum(b["n"] / len(pairs) * abs(b["right"] - b["said"]) for b in bins),
        "calibration_error_if_perfect": error_if_perfect([pair.gap for pair in pairs]),
        "mean_gap": float(numpy.mean([pair.gap for pair in pairs])),
        "score_spread": float(numpy.std(scores)),
        "explained_by_length": explained_by_length(pairs),
    }  # fmt: skip


def calibration(gaps: Sequence[float]) -> list[dict[str, float]]:
    """Bins of equal width over s(|gap|) from 0.5 to 1 that hold any pair: what was said, share right, n."""
    said, place = _said(gaps)
    right = numpy.asarray(gaps) > 0
    found = []
    for index in range(BINS):
        inside = place == index
        if inside.any():
            hits = wilson(int(right[inside].sum()), int(inside.sum()))
            found.append(
                {"said": float(said[inside].mean()), "right": hits.value, "low": hits.low, "high": hits.high, "n": hits.n}
            )
    return found


def _said(gaps: Sequence[float]) -> tuple[NDArray[numpy.float64], NDArray[numpy.int64]]:
    """The chance of being right that every gap says, and its bin."""
    said = 1 / (1 + numpy.exp(-numpy.abs(numpy.asarray(gaps, dtype=float))))
    return said, numpy.minimum(((said - 0.5) * 2 * BINS).astype(int), BINS - 1)


def error_if_perfect(gaps: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """The calibration error of a perfectly calibrated model with these gaps: its mean, and what 95 % of such models stay under.

    By simulation: every pair is right with the chance that its gap says, SIMULATIONS times.
    """
    said, place = _said(gaps)
    random = numpy.random.default_rng(seed)
    errors = []
    for _ in range(SIMULATIONS):
        off = (random.random(len(said)) < said) - said
        errors.append(float(numpy.abs(numpy.bincount(place, weights=off, minlength=BINS)).sum()) / len(said))
    return {"mean": float(numpy.mean(errors)), "high": float(numpy.quantile(errors, 0.95))}


def calibration_words(error: float, perfect: Mapping[str, float]) -> str:
    """`0.108; perfect calibration would give 0.148 with so many pairs (95 % under 0.214), so no error is shown`."""
    shown = "an error is shown" if error > perfect["high"] else "no error is shown"
    return f"{error:.3f}; perfect calibration would give {perfect['mean']:.3f} here (95 % under {perfect['high']:.3f}): {shown}"


def length_balanced(unequal: Sequence[ScoredPair]) -> dict[str, Any]:
    """Accuracy where the chosen completion is as often the longer as the shorter one, and what of the gain that
    takes away. The interval squares and adds Wilson's two. None where one side has no pair, or nothing was gained."""
    sides = [[p.gap > 0 for p in unequal if (p.longer > 0) == longer] for longer in (True, False)]
    if not all(sides):
        return {"length_balanced": None, "gain_from_length": None}
    longer, shorter = (wilson(sum(side), len(side)) for side in sides)
    value = (longer.value + shorter.value) / 2
    below = sqrt((longer.value - longer.low) ** 2 + (shorter.value - shorter.low) ** 2) / 2
    above = sqrt((longer.high - longer.value) ** 2 + (shorter.high - shorter.value) ** 2) / 2
    gain = sum(map(sum, sides)) / len(unequal) - 0.5
    return {
        "length_balanced": {"value": value, "low": value - below, "high": value + above, "n": len(unequal)},
        "gain_from_length": 1 - (value - 0.5) / gain if gain > 0 else None,
    }


def explained_by_length(pairs: Sequence[ScoredPair]) -> float | None:
    """Squared correlation of the gap with the difference of lengths; None where either does not vary."""
    found = correlation([pair.gap for pair in pairs], [pair.longer for pair in pairs])
    return None if found is None else found**2


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's; None of fewer than three values, or where either side does not vary."""
    a, b = numpy.asarray(first, dtype=float), numpy.asarray(second, dtype=float)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return None
    return float(numpy.corrcoef(a, b)[0, 1])


def agreement(first: Sequence[ScoredPair], second: Sequence[ScoredPair]) -> dict[str, Any] | None:
    """Two reward models on the pairs that both scored, by id; None where there is no such pair."""
    others = {pair.id: pair for pair in second}
    both = [(pair, others[pair.id]) for pair in first if pair.id in others]
    if not both:
        return None
    signs = [(int(numpy.sign(a.gap)), int(numpy.sign(b.gap))) for a, b in both]
    counts = [numpy.asarray([sum(s[side] == sign for s in signs) for sign in (1, 0, -1)]) / len(both) for side in (0, 1)]
    alike, chance = sum(a == b for a, b in signs) / len(both), float(counts[0] @ counts[1])
    return {
        "pairs": len(both),
        "alike": share([a == b for a, b in signs]),
        "kappa": (alike - chance) / (1 - chance) if chance < 1 else None,
        "gap_correlation": correlation([a.gap for a, _ in both], [b.gap for _, b in both]),
        "both_right": sum(a > 0 and b > 0 for a, b in signs), "first_right": sum(a > 0 >= b for a, b in signs),
        "second_right": sum(b > 0 >= a for a, b in signs), "none_right": sum(a <= 0 and b <= 0 for a, b in signs),
    }  # fmt: skip


def describe(found: Mapping[str, Any]) -> str:
    """One line: `61.2 % of 240 pairs right (54.9 to 67.1), calibration error 0.043; perfect calibration would give …`."""
    accuracy = found["accuracy"]
    interval = f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}"
    error = f"calibration error {calibration_words(found['calibration_error'], found['calibration_error_if_perfect'])}"
    return f"{100 * accuracy['value']:.1f} % of {found['pairs']} pairs right ({interval}), {error}"


def table(found: Mapping[str, Any]) -> str:
    """The accuracies by length, margin and category below each other, for a terminal."""
    balanced = {"lengths balanced": found["length_balanced"], "rule: the longer wins": found["longer_wins"]}
    parts = [("", balanced), ("chosen is", found["by_length"]), ("gap in its", found["by_margin"]), ("", found["by_category"])]
    lines = []
    for before, shares in parts:
        for name, one in shares.items():
            if one is not None:
                label = f"{before} {name}".strip()
                lines.append(f"  {label:<32} {one['value']:6.1%} of {one['n']:<6} {one['low']:.1%} to {one['high']:.1%}")
    return "\n".join(lines)


def describe_agreement(found: Mapping[str, Any] | None, name: str) -> str:
    """One line about another reward model on the same pairs."""
    if found is None:
        return f"{name} scored none of these pairs"
    alike = found["alike"]
    kappa, correlated = ("not defined" if found[key] is None else f"{found[key]:.2f}" for key in ("kappa", "gap_correlation"))
    return (
        f"agrees with {name} on {alike['value']:.1%} of {found['pairs']} pairs ({alike['low']:.1%} to {alike['high']:.1%}), "
        f"kappa {kappa}, correlation of gaps {correlated}"
    )


def share(hits: Sequence[bool]) -> dict[str, float] | None:
    """A share with its interval; None of nothing."""
    return wilson(sum(hits), len(hits))._asdict() if hits else None


def _length_class(pair: ScoredPair) -> str:
    return next((name for name, end in LENGTHS if pair.longer <= end), LONGEST)


def _by(pairs: Sequence[ScoredPair], names: Sequence[str], of: Callable[[ScoredPair], str]) -> dict[str, Any]:
    """Accuracy by a property of the pairs, in the order of its names, without those that no pair has."""
    found = {name: share([p.gap > 0 for p in pairs if of(p) == name]) for name in names}
    return {name: one for name, one in found.items() if one is not None}


def _by_margin(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Accuracy by quarters of |gap|: a model that knows when it knows is right most often in the largest."""
    if len(pairs) < len(QUARTERS):
        return {}
    order = sorted(pairs, key=lambda pair: abs(pair.gap))
    ends = [round(len(order) * k / len(QUARTERS)) for k in range(len(QUARTERS) + 1)]
    return {name: share([p.gap > 0 for p in order[ends[k] : ends[k + 1]]]) for k, name in enumerate(QUARTERS)}


def _by_category(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Accuracy by category where the pairs have several."""
    names = sorted({pair.category for pair in pairs})
    return _by(pairs, names, lambda pair: pair.category) if len(names) > 1 else {}
