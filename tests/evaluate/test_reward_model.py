"""What is said of a reward model, against hand-worked values."""

from math import exp

import pytest

from posttrain.evaluate.pairs import (
    ScoredPair,
    agreement,
    calibration,
    calibration_words,
    describe,
    error_if_perfect,
    explained_by_length,
    measure,
    table,
)


def pair(gap: float, chosen: int = 5, rejected: int = 5, category: str = "", name: str = "p") -> ScoredPair:
    return ScoredPair(name, gap, 0.0, chosen, rejected, category)


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
    (only,) = found["calibration"]
    assert only == pytest.approx({"said": 0.75, "right": 0.75, "low": 0.3006, "high": 0.9544, "n": 4}, abs=1e-4)
    assert found["calibration_error"] == pytest.approx(0, abs=1e-9)
    sure = measure([pair(5.0), pair(-5.0)])
    assert sure["calibration_error"] == pytest.approx(1 / (1 + exp(-5)) - 0.5)


def test_the_last_bin_holds_certainty() -> None:
    (only,) = calibration([1000.0, -1000.0])
    assert (only["said"], only["right"], only["n"]) == (1.0, 0.5, 2)


def test_length_explains_what_lies_on_a_line() -> None:
    assert explained_by_length([pair(k, 10 + k, 10) for k in (1, 2, 3, 4)]) == pytest.approx(1)
    assert explained_by_length([pair(k, 12, 10) for k in (1, 2, 3, 4)]) is None
    assert explained_by_length([pair(1)]) is None


def test_one_line() -> None:
    assert describe(measure([pair(1), pair(1), pair(-1), pair(1)])).startswith("75.0 % of 4 pairs right (30.1 to 95.4)")


def test_a_model_that_only_counts_words_gains_nothing_once_lengths_are_balanced() -> None:
    """Right on the eight whose chosen side is longer, wrong on two: 80 %, balanced 50 %, so all of the gain is length."""
    found = measure([pair(1, 9, 3)] * 8 + [pair(-1, 3, 9)] * 2)
    assert found["accuracy"]["value"] == 0.8 == found["longer_wins"]["value"]
    assert found["length_balanced"]["value"] == 0.5
    assert found["gain_from_length"] == pytest.approx(1)


def test_a_model_that_never_looks_at_length_owes_it_nothing() -> None:
    """Three quarters right whichever side is longer: balanced 3/4, and none of the gain is length."""
    found = measure([pair(g, 9, 3) for g in (1, 1, 1, -1) * 3] + [pair(g, 3, 9) for g in (1, 1, 1, -1)])
    assert found["length_balanced"]["value"] == 0.75
    assert found["gain_from_length"] == pytest.approx(0)
    assert found["length_balanced"]["low"] < 0.75 < found["length_balanced"]["high"]
    assert measure([pair(1, 9, 3)])["length_balanced"] is None, "one side alone balances nothing"


def test_accuracy_by_length_margin_and_category() -> None:
    pairs = [pair(0.1, 5, 100, "a"), pair(-0.2, 5, 21, "a"), pair(3, 5, 6, "a"), pair(4, 5, 5, "b")]
    pairs += [pair(-0.3, 6, 5, "b"), pair(5, 21, 5, "b"), pair(6, 69, 5, "b"), pair(-0.1, 68, 5, "b")]
    found = measure(pairs)
    told = {name: (one["value"], one["n"]) for name, one in found["by_length"].items()}
    assert told == {
        "shorter by 64 or more": (1, 1), "shorter by 16 to 63": (0, 1), "shorter by 1 to 15": (1, 1), "equal": (1, 1),
        "longer by 1 to 15": (0, 1), "longer by 16 to 63": (0.5, 2), "longer by 64 or more": (1, 1),
    }  # fmt: skip
    assert [one["value"] for one in found["by_margin"].values()] == [0.5, 0, 1, 1]
    assert {name: one["value"] for name, one in found["by_category"].items()} == {"a": pytest.approx(2 / 3), "b": 0.6}
    assert len(table(found).splitlines()) == 2 + 7 + 4 + 2
    assert measure(pairs[:3])["by_category"] == {}, "one category is no slice"


def test_two_reward_models_on_the_same_pairs() -> None:
    """Ten pairs: both right 6, first alone 2, second alone 1, none 1. Alike 0.7; chance 0.8 * 0.7 + 0.2 * 0.3 = 0.62."""
    gaps = [(1, 1)] * 6 + [(1, -1)] * 2 + [(-1, 1), (-1, -1)]
    first = [pair(a, name=str(i)) for i, (a, _) in enumerate(gaps)]
    second = [pair(b, name=str(i)) for i, (_, b) in reversed(list(enumerate(gaps)))]
    found = agreement(first, [*second, pair(3, name="another")])
    assert found is not None
    assert found["alike"]["value"] == 0.7
    assert found["kappa"] == pytest.approx((0.7 - 0.62) / 0.38)
    assert [found[k] for k in ("both_right", "first_right", "second_right", "none_right")] == [6, 2, 1, 1]
    assert found["gap_correlation"] == pytest.approx(0.04 / (0.4 * 0.21**0.5))
    same = agreement(first, first)
    assert same is not None
    assert (same["alike"]["value"], same["kappa"], same["gap_correlation"]) == pytest.approx((1, 1, 1))
    assert agreement(first, [pair(1, name="another")]) is None


def test_an_error_of_few_pairs_stands_beside_what_perfect_calibration_would_give() -> None:
    """45 gaps spread over all bins: a model that is right as often as it says has an error of about 0.15 all the same."""
    gaps = [0.05 + 4.4 * k / 44 for k in range(45)]
    perfect = error_if_perfect(gaps)
    assert 0.1 < perfect["mean"] < 0.17
    assert perfect["mean"] < perfect["high"] < 0.25
    assert error_if_perfect(gaps) == perfect, "seeded"
    assert error_if_perfect(gaps * 100)["mean"] < 0.02
    told = calibration_words(0.108, perfect)
    assert told.startswith(f"0.108; perfect calibration gives {perfect['mean']:.3f} (95 % below ")
    assert told.endswith(": no significant error")
    assert calibration_words(0.4, perfect).endswith(": significant error")
    assert "perfect calibration gives" in describe(measure([pair(gap) for gap in gaps]))


def test_a_sure_model_has_no_error_by_chance() -> None:
    """Where it says that it is always right, a perfect model is."""
    assert error_if_perfect([50.0] * 8)["high"] == pytest.approx(0, abs=1e-9)
