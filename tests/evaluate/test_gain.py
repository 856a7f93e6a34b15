"""What a ppo stage gained: paired over prompts, from answers that chose nothing, and told in the terminal's table."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest

from posttrain.artifacts import hash_file
from posttrain.errors import ArtifactError
from posttrain.evaluate.gain import GOLD, PUBLISHED, published_gain, published_gains
from posttrain.evaluate.scorecard import build_scorecard, format_table


def row(policy: str, iteration: int, gold_B: list[float], score_B: list[float]) -> dict[str, Any]:
    values = {"kl": [0.5] * len(gold_B), "gold": gold_B, "score": score_B}
    found: dict[str, Any] = {"policy": policy, "iteration": iteration}
    for key, value_B in values.items():
        found |= {key: float(numpy.mean(value_B)), f"{key}_se": 0.1, f"{key}_B": value_B}
    return found


FRESH = [row("sft", 0, [0.0] * 8, [1.0] * 8), row("ppo", 4, [1.0, -1.0] * 4, [3.0] * 8)]
CHOSEN = [row("ppo", i, [float(i == 4)] * 8, [1.0] * 8) for i in (0, 2, 4)] + [row("dpo", 0, [0.0] * 8, [0.0] * 8)]


def test_the_gain_is_paired_over_the_prompts():
    gain = published_gain("ppo", FRESH, CHOSEN)
    assert (gain["start"], gain["iteration"], gain["evaluations"], gain["prompts"]) == ("sft", 4, 3, 8)
    assert gain["score"]["change"] == {"value": 2.0, "low": 2.0, "high": 2.0, "verdict": "better"}
    assert gain["gold"]["change"]["value"] == 0.0
    assert gain["gold"]["change"]["low"] < 0 < gain["gold"]["change"]["high"]
    assert gain["gold"]["change"]["verdict"] == "not shown"


def test_a_policy_that_was_picked_by_luck_has_no_gain_on_fresh_answers():
    """Eight policies that are all worth what the start is: the best of them seems better, 0.39 on average over 200 trials of 16
    prompts; fresh answers put it back to 0."""
    random = numpy.random.default_rng(0)
    picked, fresh = [], []
    for _ in range(200):
        chosen = [row("ppo", i, random.normal(size=16).tolist(), [0.0] * 16) for i in range(8)]
        best = max(chosen, key=lambda one: float(one["gold"]))
        again = [row(name, best["iteration"], random.normal(size=16).tolist(), [0.0] * 16) for name in ("sft", "ppo")]
        picked.append(best["gold"])
        fresh.append(published_gain("ppo", again, chosen)["gold"]["change"]["value"])
    assert numpy.mean(picked) > 0.3
    assert abs(numpy.mean(fresh)) < 0.07


def test_the_terminal_and_the_json_tell_it():
    card = build_scorecard("run", [], [], [published_gain("ppo", FRESH, CHOSEN)]) | {
        "stages": [{"name": "base", "parent": None, "measures": {}}]
    }
    text = " ".join(format_table(card, width=120).split())
    assert (
        "ppo against sft, its start, on fresh answers to 8 held-out prompts: score ▲ better +2.000 (+2.000 to +2.000), gold"
        in text
    )
    assert "· not shown 0.00 (" in text
    assert "the published policy is iteration 4, the best of 3 evaluations by gold" in text
    assert card["gains"][0]["score"]["published"] == 3.0


def test_evaluations_that_were_changed_are_refused(tmp_path: Path):
    folder = tmp_path / "ppo"
    folder.mkdir()
    assert published_gains([folder]) == []
    for name, rows in ((PUBLISHED, FRESH), (GOLD, CHOSEN)):
        (folder / name).write_text("".join(json.dumps(one) + "\n" for one in rows))
    files = {name: hash_file(folder / name) for name in (PUBLISHED, GOLD)}
    (folder / "manifest.json").write_text(json.dumps({"fingerprint": "f", "files": files}))
    assert published_gains([folder]) == [published_gain("ppo", FRESH, CHOSEN)]
    (folder / PUBLISHED).write_text("")
    with pytest.raises(ArtifactError, match="was changed after it was made"):
        published_gains([folder])
