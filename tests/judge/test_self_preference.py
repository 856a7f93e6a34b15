"""Self-preference: the regression against statsmodels, planted effects, the gap by hand, and pairs with their authors."""

import json
from pathlib import Path

import numpy
import pytest
import statsmodels.api

from posttrain.cli import main
from posttrain.data.formats import read_preferences
from posttrain.judge.self_preference import JudgedOrder, fit_logit, self_preference


def planted(b_self: float, pairs: int = 2000, seed: int = 0) -> list[JudgedOrder]:
    """Both orders of pairs, judged with known coefficients: position 0.3, gold 1, length 0.5, and self."""
    chance = numpy.random.default_rng(seed)
    choices = []
    for pair in range(pairs):
        longer, own = int(chance.normal() * 50), int(chance.integers(-1, 2))
        for side in (1, -1):
            logit = 0.3 + 1.0 * side + 0.5 * side * longer / 50 + b_self * side * own
            choices.append(
                JudgedOrder(pair, float(chance.random() < 1 / (1 + numpy.exp(-logit))), side, side * longer, side * own)
            )
    return choices


def test_the_regression_is_that_of_statsmodels_with_errors_clustered_by_pair() -> None:
    choices = planted(0.7, pairs=300)
    x = numpy.array([[1.0, c.gold, c.longer / 50, c.own] for c in choices])
    y, pairs = numpy.array([c.picked for c in choices]), numpy.array([c.pair for c in choices])
    fit = fit_logit(x, y, pairs)
    assert fit is not None
    other = statsmodels.api.Logit(y, x).fit(
        disp=0, tol=1e-12, cov_type="cluster", cov_kwds={"groups": pairs, "use_correction": False}
    )
    assert fit.coefficients == pytest.approx(other.params, abs=1e-8)
    assert fit.errors == pytest.approx(other.bse, abs=1e-8)


@pytest.mark.parametrize("b_self", [0.0, 0.8])
def test_a_planted_preference_is_found_and_none_is_not(b_self: float) -> None:
    found = self_preference(planted(b_self))
    value, error = found["coefficients"]["b_self"]["value"], found["coefficients"]["b_self"]["error"]
    assert value == pytest.approx(b_self, abs=3 * error)
    assert error < 0.1
    assert found["coefficients"]["b_gold"]["value"] == pytest.approx(1.0, abs=0.2)
    assert found["coefficients"]["b_pos"]["value"] == pytest.approx(0.3, abs=0.15)
    gap = found["gap"]
    assert (gap["low"] > 0) == (b_self > 0)


def test_the_gap_by_hand_and_what_has_no_finite_estimate() -> None:
    """Own and gold: picked 3 of 4. The other gold: picked 1 of 2. The rest has no own answer or two."""
    own = [JudgedOrder(n, float(n < 3), 1, 0, 1) for n in range(4)]
    other = [JudgedOrder(4, 0.0, -1, 0, 1), JudgedOrder(5, 1.0, -1, 0, 1)]
    found = self_preference([*own, *other, JudgedOrder(6, 1.0, 1, 0, 0)])
    gap = found["gap"]
    assert (gap["value"], gap["own"], gap["n_own"], gap["other"], gap["n_other"]) == (0.25, 0.75, 4, 0.5, 2)
    assert gap["low"] < 0 < gap["high"]
    assert (found["orders"], found["own"]) == (7, 6)
    perfect = self_preference([JudgedOrder(n, float(n % 2), 2 * (n % 2) - 1, 0, 1 - 2 * (n % 3 == 0)) for n in range(40)])
    assert perfect["coefficients"] is None, "gold predicts every verdict"
    assert self_preference([JudgedOrder(0, 1.0, 1, 0, 0)])["coefficients"] is None


def test_authors_of_pairs_are_read_in_both_layouts(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"prompt": "p", "chosen": "c", "rejected": "r", "chosen_author": "me", "rejected_author": "you"}) + "\n"
    )
    rows = [
        {"input": "p", "output_1": f"x{label}", "output_2": "y", "label": label, "author_1": "me", "author_2": "you"}
        for label in (1, 2)
    ]
    (tmp_path / "b.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert [pair.authors for pair in read_preferences(str(tmp_path / "a.jsonl"), seed=0).records] == [("me", "you")]
    found = [pair.authors for pair in read_preferences(str(tmp_path / "b.jsonl"), seed=0).records]
    assert found == [("me", "you"), ("you", "me")]


def test_the_command_prints_self_preference_of_stored_verdicts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    chance = numpy.random.default_rng(1)
    rows = []
    for n in range(200):
        own_gold = n % 2 == 0
        ab, ba = (("a" if chance.random() < (0.95 if own_gold else 0.6) else "b") for _ in range(2))
        authors = ("me", "you") if own_gold else ("you", "me")
        text = {"a": "x" * int(chance.integers(1, 90)), "b": "x" * int(chance.integers(1, 90))}
        rows.append({"gold": "a", "ab": ab, "ba": ba, "author_a": authors[0], "author_b": authors[1], **text})
    file = tmp_path / "v.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["judge", "audit", f"verdicts:{file}", "--self", "me"]) == 0
    text = capsys.readouterr().out
    assert "log-odds: its own answer" in text
    assert "better answers preferred: own - other" in text
    assert main(["judge", "audit", f"verdicts:{file}", "--self", "me", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)["self"]
    assert figures["coefficients"]["b_self"]["value"] > 3 * figures["coefficients"]["b_self"]["error"]
    assert figures["gap"]["value"] == pytest.approx(0.35, abs=0.1)
    assert main(["judge", "audit", f"verdicts:{file}", "--self", "nobody"]) == 2
    assert "wrote no answer of these pairs · authors: me, you" in capsys.readouterr().err
