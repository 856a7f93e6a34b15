"""What is said of a reward model, against hand-worked values."""

from math import exp

import pytest

from posttrain.evaluate.reward_model import ScoredPair, calibration, describe, explained_by_length, measure


def pair(gap: float, chosen: int = 5, rejected: int = 5) -> ScoredPair:
    return ScoredPair("p", gap, 0.0, chosen, rejected)


def test_accuracy_by_length_and_the_pull_of_length() -> None:
    found = measure([pair(1, 9, 3), pair(-1, 9, 3), pair(2, 2, 8), pair(1, 4, 4), pair(0)])
    assert found["accuracy"]["value"] == pytest.approx(3 / 5), "a tie is not right"
    assert found["chosen_longer"] == pytest.approx({"value": 0.5, "low": 0.0945, "high": 0.9055, "n": 2}, abs=1e-3)
    assert found["chosen_shorter"]["n"] == 1
    assert found["longer_preferred"]["value"] == pytest.approx(1 / 3), "of three pairs of unequal length one went to the longer"


def test_calibration_bins_by_what_was_said() -> None:
    """Gaps of log 3 say 0.75: three right of four is perfect, and the error is 0."""
    gap = 1.0986122886681098
    found = measure([pair(gap), pair(gap), pair(gap), pair(-gap)])
    assert found["calibration"] == [{"said": pytest.approx(0.75), "right": 0.75, "n": 4}]
    assert found["calibration_error"] == pytest.approx(0, abs=1e-9)
    sure = measure([pair(5.0), pair(-5.0)])
    assert sure["calibration_error"] == pytest.approx(1 / (1 + exp(-5)) - 0.5)


def test_the_last_bin_holds_certainty() -> None:
    assert calibration([1000.0, -1000.0]) == [{"said": 1.0, "right": 0.5, "n": 2}]


def test_length_explains_what_lies_on_a_line() -> None:
    assert explained_by_length([pair(k, 10 + k, 10) for k in (1, 2, 3, 4)]) == pytest.approx(1)
    assert explained_by_length([pair(k, 12, 10) for k in (1, 2, 3, 4)]) is None
    assert explained_by_length([pair(1)]) is None


def test_one_line() -> None:
    assert describe(measure([pair(1), pair(1), pair(-1), pair(1)])).startswith("75.0 % of 4 pairs right (30.1 to 95.4)")
