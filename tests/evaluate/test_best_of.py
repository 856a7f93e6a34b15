"""Best-of-n: the estimator against every subset, KL against drawn policies, and the command."""

import itertools
import json
from math import log
from pathlib import Path

import numpy
import pytest

from posttrain.cli import main
from posttrain.evaluate.best_of import best_of, displayed_n, kl_bound, kl_of_ties, measure_best_of, order_weights, table
from tiny_runs import finished_run


def by_subsets(scores: list[float], values: list[float], n: int) -> float:
    """The mean over all subsets of n of the value of the best; between equal scores the mean of theirs."""
    found = []
    for subset in itertools.combinations(range(len(scores)), n):
        best = max(scores[i] for i in subset)
        found.append(numpy.mean([values[i] for i in subset if scores[i] == best]))
    return float(numpy.mean(found))


@pytest.mark.parametrize("scores", [[0.3, -1.0, 2.0, 0.1, 5.0], [1.0, 1.0, 1.0, 0.0, 2.0], [4.0, 4.0, 4.0, 4.0, 4.0]])
def test_the_estimator_is_the_mean_over_all_subsets(scores: list[float]):
    values = [3.0, -2.0, 0.5, 7.0, 1.0]
    score_PN, value_PN = numpy.asarray([scores]), numpy.asarray([values])
    for n in range(1, 6):
        assert best_of(score_PN, value_PN, n)[0] == pytest.approx(by_subsets(scores, values, n), abs=1e-12)
        assert best_of(score_PN, score_PN, n)[0] == pytest.approx(by_subsets(scores, scores, n), abs=1e-12)


def test_hand_worked_values():
    """Of four, the best of two is the third in C(2,1) = 2 of 6 cases and the fourth in 3 of 6."""
    assert order_weights(4, 2).tolist() == pytest.approx([0, 1 / 6, 2 / 6, 3 / 6])
    assert order_weights(5, 1).tolist() == pytest.approx([0.2] * 5)
    assert order_weights(3, 3).tolist() == [0, 0, 1]
    assert order_weights(60_000, 1000).sum() == pytest.approx(1, abs=1e-9)


def test_the_estimator_is_unbiased_for_uniform_scores():
    """The largest of n uniform numbers has mean n / (n + 1)."""
    score_PN = numpy.random.default_rng(0).random((20_000, 8))
    for n in (1, 3, 8):
        assert best_of(score_PN, score_PN, n).mean() == pytest.approx(n / (n + 1), abs=0.004)


def test_kl_bound_is_the_literature_s():
    assert [round(kl_bound(n), 3) for n in (1, 2, 4, 16, 128, 1000)] == [0, 0.193, 0.636, 1.835, 3.86, 5.909]


def exact_kl(masses: list[float], n: int) -> float:
    """KL of best-of-n from a policy over outcomes of rising score, by enumeration."""
    end = numpy.cumsum(masses)
    chosen = end**n - (end - masses) ** n
    return float((chosen * numpy.log(chosen / masses)).sum())


@pytest.mark.parametrize("n", [2, 4, 32])
def test_kl_with_every_score_shared_is_that_of_the_outcomes(n: int):
    """Six, three and three of twelve samples alike: the distribution of three outcomes, for which KL can be added up."""
    scores = numpy.asarray([[0.0] * 6 + [1.0] * 3 + [2.0] * 3])
    assert kl_of_ties(scores, n)[0] == pytest.approx(exact_kl([0.5, 0.25, 0.25], n), abs=1e-12)
    assert kl_of_ties(scores, n)[0] < kl_bound(n)


def test_kl_without_ties_is_the_bound_and_of_one_outcome_nothing():
    scores = numpy.asarray([[3.0, 1.0, 2.0, 0.0], [5.0] * 4])
    assert kl_of_ties(scores, 4).tolist() == pytest.approx([kl_bound(4), 0], abs=1e-12)


def test_kl_of_two_outcomes_by_hand():
    """Halves, n = 2: the better one is chosen with 3/4; 3/4 log 3/2 + 1/4 log 1/2."""
    assert kl_of_ties(numpy.asarray([[0.0, 1.0, 0.0, 1.0]]), 2)[0] == pytest.approx(0.75 * log(1.5) + 0.25 * log(0.5))


def test_gold_that_contradicts_the_score_falls():
    score_PN = numpy.random.default_rng(1).normal(size=(30, 8))
    found = measure_best_of(score_PN, -score_PN)
    last = found["best_of"][-1]
    assert last["n"] == found["samples"] == 8
    assert last["score_gain"]["low"] > 0 > last["gold_gain"]["high"]
    assert found["best_of"][0]["score_gain"]["value"] == pytest.approx(0, abs=1e-12)
    assert displayed_n(12) == [1, 2, 4, 8, 12]
    assert len(table(found).splitlines()) == 1 + 4 + 1


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run, out = finished_run(), tmp_path / "out"
    command = ["evaluate", str(run / "sft"), "--best-of", str(run / "rm"), "--prompts", "starter/preferences.jsonl", "--json"]
    command += ["--samples", "4", "--limit", "3", "--max-new-tokens", "4", "--gold", str(run / "rm"), "--out", str(out)]
    capsys.readouterr()
    assert main(command) == 0
    found = json.loads(capsys.readouterr().out)
    assert found == json.loads((out / "best_of.json").read_text())
    rows = [json.loads(line) for line in (out / "candidates.jsonl").read_text().splitlines()]
    assert len(rows) == 12
    scores = numpy.asarray([row["score"] for row in rows]).reshape(3, 4)
    assert found["best_of"][3]["score"]["value"] == pytest.approx(scores.max(1).mean(), abs=1e-9)
    assert found["best_of"][3]["gold"] == found["best_of"][3]["score"], "the same model as its own judge"
    assert found["best_of"][0]["score"]["value"] == pytest.approx(scores.mean(), abs=1e-9)


@pytest.mark.parametrize(
    "more, message",
    [
        (["--best-of", "RUN/rm"], "--best-of · no --prompts · add --prompts"),
        (["--gold", "RUN/rm"], "--gold · no --best-of"),
        (["--against", "RUN/rm"], "--against · no --pairs"),
        (["--best-of", "RUN/sft", "--prompts", "starter/preferences.jsonl"], "not a finished reward stage · there is: rm"),
        (
            ["--best-of", "RUN/rm", "--prompts", "starter/preferences.jsonl", "--temperature", "0"],
            "--temperature · 0 samples the same completion every time",
        ),
    ],
)
def test_mistakes_are_told(more: list[str], message: str, capsys: pytest.CaptureFixture[str]):
    run = str(finished_run())
    assert main(["evaluate", f"{run}/sft", *(part.replace("RUN", run) for part in more)]) == 2
    assert message in capsys.readouterr().err
