"""The controlled sentiment experiment: what is known in it, by hand; and the whole of it, quickly."""

import json
import random
import subprocess
import sys
from math import exp
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
sys.path.insert(0, str(ROOT / "benchmarks"))

import sentiment  # noqa: E402
import sentiment_gold as known  # noqa: E402

needs_data = pytest.mark.skipif(not sentiment.SENTENCES.is_file(), reason=f"real data is not there: {sentiment.SENTENCES}")


def test_gold_learns_which_words_praise():
    """Two words that tell the labels, one that does not: their coefficients have the right signs, the third's is near 0."""
    rows = [("good film", True), ("bad film", False)] * 20
    gold = known.fit_gold(rows)
    assert gold.coefficients["good"] == pytest.approx(-gold.coefficients["bad"], rel=1e-6) and gold.coefficients["good"] > 1  # noqa: PT018
    assert gold.coefficients["film"] == pytest.approx(0, abs=1e-9)
    assert gold("a good good plot") == pytest.approx(gold.bias + gold.coefficients["good"]), (
        "a word counts once, an unknown one never"
    )
    assert all(known.accuracy(gold, rows))


def test_preferences_are_drawn_by_bradley_and_terry():
    chance = random.Random(0)
    share = sum(known.prefer(0.5, 0.0, chance) for _ in range(20_000)) / 20_000
    assert share == pytest.approx(1 / (1 + exp(-known.SHARPNESS * 0.5)), abs=0.01)


def test_a_sentence_is_cut_into_prompt_and_rest():
    assert known.split_sentence("a b c d e") == ("a b c", "d e")
    assert known.split_sentence("a b c d") is None
    assert known.split_sentence("a x b c d e", {"a", "b", "c", "d", "e"}) == ("a b c", "d e")
    prompt, rest = known.split_sentence(" ".join("abcdefghijklmnop")) or ("", "")
    assert len(f"{prompt} {rest}".split()) == known.MOST_WORDS


def test_methods_are_compared_at_equal_distance():
    """Gold 1 at KL 1 and 3 at KL 9, from 0: 2 at KL 4, 1/2 at KL 1/4. Of two seeds one reaches 4 nats and counts there."""
    line = [{"kl": 1.0, "gold": 1.0}, {"kl": 9.0, "gold": 3.0}]
    assert sentiment.at_distance(line, 0.0, 4.0) == pytest.approx(2)
    assert sentiment.at_distance(line, 0.0, 0.25) == pytest.approx(0.5)
    assert sentiment.at_distance(line, 0.0, 9.5) is None
    assert sentiment.at_distance([], 0.0, 1.0) is None
    near = {"ppo": [{"kl": 2.0, "gold": 1.0}], "dpo": [{"kl": 2.0, "gold": 0.5}], "best-of-n": []}
    far = {"ppo": line, "dpo": [{"kl": 9.0, "gold": 1.5}], "best-of-n": []}
    found = {row["kl"]: row["gold_difference"] for row in sentiment.compare([near, far], [0.0, 0.0])}
    assert found[4.0] == pytest.approx({"value": 1.0, "low": 1.0, "high": 1.0, "n": 1})
    assert found[2.0]["n"] == 2


@needs_data
@pytest.mark.slow
def test_the_whole_experiment_quickly_and_again_from_what_is_there(tmp_path: Path):
    command = [sys.executable, str(ROOT / "benchmarks/sentiment.py"), "--quick", "--out", str(tmp_path / "out")]
    first, again = (json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout) for _ in range(2))
    assert {method: len(rows) for method, rows in first["frontier"].items()} == {"dpo": 1, "ppo": 1, "best-of-n": 3}
    assert first["gold_accuracy"]["low"] > 0.7
    assert {k: v for k, v in again.items() if k != "minutes"} == {k: v for k, v in first.items() if k != "minutes"}
    assert (tmp_path / "out/frontier.svg").read_text().startswith("<svg xmlns=")
