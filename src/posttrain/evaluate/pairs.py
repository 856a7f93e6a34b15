"""Measures of a reward model from its scores of preference pairs. No model, no torch.

    accuracy      share of pairs with r(chosen) > r(rejected), Wilson's interval; a tie is wrong
    calibration   accuracy against the stated confidence s(|gap|): ten bins, and the expected calibration error
                  sum_bins n_bin / n |share right - mean s(|gap|)|                     (Guo et al. 2017, eq. 3)
                  It is above 0 by chance: `error_if_perfect` is its value for the same gaps if each pair were right with
                  exactly the stated probability (about 0.15 for 45 pairs)
    length        with the accuracies a+ and a- for a longer and a shorter chosen completion:
                  balanced = (a+ + a-) / 2,   share of the gain from length = 1 - (balanced - 1/2) / (accuracy - 1/2)
                  (pairs of unequal length; Singhal et al. 2023 compare within lengths for the same reason)
    agreement     of two reward models on the same pairs: share alike, kappa = (share - chance) / (1 - chance)
                  (Cohen 1960) with chance from how often each is right, correlation of their gaps

Called by `evaluate/reward_model.py` after scoring, and by the report to compare reward models.
"""

from collections.abc import Callable, Mapping, Sequence
from math import sqrt
from typing import Any, NamedTuple

import numpy
from numpy.typing import NDArray

from posttrain.evaluate.stats import wilson

BINS = 10
SIMULATIONS = 1000
# Classes of length differences in tokens, chosen - rejected, with their upper ends.
LENGTHS = (("shorter by 64 or more", -64), ("shorter by 16 to 63", -16), ("shorter by 1 to 15", -1), ("equal", 0),
           ("longer by 1 to 15", 15), ("longer by 16 to 63", 63))  # fmt: skip
LONGEST = "longer by 64 or more"
QUARTERS = ("smallest quarter", "second quarter", "third quarter", "largest quarter")


class ScoredPair(NamedTuple):
    """A pair with the scores and token lengths of both completions, and its category if the file has one."""

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
        """The length of the chosen completion minus that of the rejected one, in tokens."""
        return self.chosen_tokens - self.rejected_tokens


def measure(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """All measures; see the equations of this module. Needs at least one pair."""
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
        "by_length": _share_by_class(pairs, [name for name, _ in LENGTHS] + [LONGEST], _length_class),
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
    """Non-empty bins of equal width over s(|gap|) from 0.5 to 1: mean confidence (`said`), share right, n."""
    confidence, bin_of_pair = _stated_confidence(gaps)
    right = numpy.asarray(gaps) > 0
    bins = []
    for index in range(BINS):
        in_bin = bin_of_pair == index
        if in_bin.any():
            share_right = wilson(int(right[in_bin].sum()), int(in_bin.sum()))
            bins.append(
                {
                    "said": float(confidence[in_bin].mean()),
                    "right": share_right.value,
                    "low": share_right.low,
                    "high": share_right.high,
                    "n": share_right.n,
                }
            )
    return bins


def _stated_confidence(gaps: Sequence[float]) -> tuple[NDArray[numpy.float64], NDArray[numpy.int64]]:
    """The probability of being right that each gap states, and its bin."""
    confidence = 1 / (1 + numpy.exp(-numpy.abs(numpy.asarray(gaps, dtype=float))))
    return confidence, numpy.minimum(((confidence - 0.5) * 2 * BINS).astype(int), BINS - 1)


def error_if_perfect(gaps: Sequence[float], *, seed: int = 0) -> dict[str, float]:
    """The calibration error of a perfectly calibrated model with these gaps: its mean and its 95 % quantile.

    Simulated SIMULATIONS times: each pair is right with its stated probability.
    """
    confidence, bin_of_pair = _stated_confidence(gaps)
    random = numpy.random.default_rng(seed)
    errors = []
    for _ in range(SIMULATIONS):
        difference = (random.random(len(confidence)) < confidence) - confidence
        errors.append(float(numpy.abs(numpy.bincount(bin_of_pair, weights=difference, minlength=BINS)).sum()) / len(confidence))
    return {"mean": float(numpy.mean(errors)), "high": float(numpy.quantile(errors, 0.95))}


def calibration_words(error: float, perfect: Mapping[str, float]) -> str:
    """`0.108; perfect calibration gives 0.148 (95 % below 0.214): no significant error`."""
    shown = "significant error" if error > perfect["high"] else "no significant error"
    return f"{error:.3f}; perfect calibration gives {perfect['mean']:.3f} (95 % below {perfect['high']:.3f}): {shown}"


def length_balanced(unequal: Sequence[ScoredPair]) -> dict[str, Any]:
    """Accuracy with longer and shorter chosen completions weighted equally, and the share of the gain that this removes.
    The interval combines Wilson's two by square-and-add. None if one side has no pair or there is no gain."""
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
    """Squared correlation of the gap with the length difference. None if either is constant."""
    r = correlation([pair.gap for pair in pairs], [pair.longer for pair in pairs])
    return None if r is None else r**2


def correlation(first: Sequence[float], second: Sequence[float]) -> float | None:
    """Pearson's correlation. None for fewer than three values, or if either side is constant."""
    a, b = numpy.asarray(first, dtype=float), numpy.asarray(second, dtype=float)
    if len(a) < 3 or a.std() == 0 or b.std() == 0:
        return None
    return float(numpy.corrcoef(a, b)[0, 1])


def agreement(first: Sequence[ScoredPair], second: Sequence[ScoredPair]) -> dict[str, Any] | None:
    """The agreement of two reward models on the pairs that both scored. None if there are none."""
    second_by_id = {pair.id: pair for pair in second}
    common = [(pair, second_by_id[pair.id]) for pair in first if pair.id in second_by_id]
    if not common:
        return None
    signs = [(int(numpy.sign(a.gap)), int(numpy.sign(b.gap))) for a, b in common]
    counts = [numpy.asarray([sum(s[side] == sign for s in signs) for sign in (1, 0, -1)]) / len(common) for side in (0, 1)]
    alike, chance = sum(a == b for a, b in signs) / len(common), float(counts[0] @ counts[1])
    return {
        "pairs": len(common),
        "alike": share([a == b for a, b in signs]),
        "kappa": (alike - chance) / (1 - chance) if chance < 1 else None,
        "gap_correlation": correlation([a.gap for a, _ in common], [b.gap for _, b in common]),
        "both_right": sum(a > 0 and b > 0 for a, b in signs), "first_right": sum(a > 0 >= b for a, b in signs),
        "second_right": sum(b > 0 >= a for a, b in signs), "none_right": sum(a <= 0 and b <= 0 for a, b in signs),
    }  # fmt: skip


def describe(measures: Mapping[str, Any]) -> str:
    """One line: `61.2 % of 240 pairs right (54.9 to 67.1), calibration error 0.043; perfect calibration gives …`."""
    accuracy = measures["accuracy"]
    interval = f"{100 * accuracy['low']:.1f} to {100 * accuracy['high']:.1f}"
    error = f"calibration error {calibration_words(measures['calibration_error'], measures['calibration_error_if_perfect'])}"
    return f"{100 * accuracy['value']:.1f} % of {measures['pairs']} pairs right ({interval}), {error}"


def table(measures: Mapping[str, Any]) -> str:
    """The accuracies by length, margin and category as text."""
    balanced = {"lengths balanced": measures["length_balanced"], "rule: longer wins": measures["longer_wins"]}
    parts = [
        ("", balanced),
        ("chosen is", measures["by_length"]),
        ("gap in its", measures["by_margin"]),
        ("", measures["by_category"]),
    ]
    lines = []
    for prefix, shares in parts:
        for name, entry in shares.items():
            if entry is not None:
                label = f"{prefix} {name}".strip()
                lines.append(
                    f"  {label:<32} {entry['value']:6.1%} of {entry['n']:<6} {entry['low']:.1%} to {entry['high']:.1%}"
                )
    return "\n".join(lines)


def describe_agreement(agreement: Mapping[str, Any] | None, name: str) -> str:
    """One line about another reward model on the same pairs."""
    if agreement is None:
        return f"{name} scored none of these pairs"
    alike = agreement["alike"]
    kappa, correlated = (
        "not defined" if agreement[key] is None else f"{agreement[key]:.2f}" for key in ("kappa", "gap_correlation")
    )
    return (
        f"agrees with {name} on {alike['value']:.1%} of {agreement['pairs']} pairs "
        f"({alike['low']:.1%} to {alike['high']:.1%}), "
        f"kappa {kappa}, correlation of gaps {correlated}"
    )


def share(hits: Sequence[bool]) -> dict[str, float] | None:
    """A share with its interval, or None for an empty sequence."""
    return wilson(sum(hits), len(hits))._asdict() if hits else None


def _length_class(pair: ScoredPair) -> str:
    return next((name for name, end in LENGTHS if pair.longer <= end), LONGEST)


def _share_by_class(pairs: Sequence[ScoredPair], names: Sequence[str], class_of: Callable[[ScoredPair], str]) -> dict[str, Any]:
    """Accuracy by class of the pairs, in the order of `names`. Empty classes are omitted."""
    shares = {name: share([p.gap > 0 for p in pairs if class_of(p) == name]) for name in names}
    return {name: entry for name, entry in shares.items() if entry is not None}


def _by_margin(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Accuracy by quarters of |gap|. A calibrated model is most accurate in the largest."""
    if len(pairs) < len(QUARTERS):
        return {}
    order = sorted(pairs, key=lambda pair: abs(pair.gap))
    ends = [round(len(order) * k / len(QUARTERS)) for k in range(len(QUARTERS) + 1)]
    return {name: share([p.gap > 0 for p in order[ends[k] : ends[k + 1]]]) for k, name in enumerate(QUARTERS)}


def _by_category(pairs: Sequence[ScoredPair]) -> dict[str, Any]:
    """Accuracy by category, if there are several."""
    names = sorted({pair.category for pair in pairs})
    return _share_by_class(pairs, names, lambda pair: pair.category) if len(names) > 1 else {}
