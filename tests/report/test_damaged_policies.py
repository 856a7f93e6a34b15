"""A policy that a tiny data set wrecked is warned of, in the terminal and at the top of the page; an ordinary run is not."""

from typing import Any

import pytest
from pages import Page

from posttrain.evaluate.damage import repetition, signs_of_damage
from posttrain.evaluate.scorecard import StageScores, build_scorecard, format_table
from posttrain.evaluate.suites import Measure, Task
from posttrain.records import Score
from posttrain.report.headline import headline
from posttrain.report.run import RunRecord

FOLLOWS = Measure("t/follows", ("t/follows",), "score", "share", "higher", "gain", "instructions followed", 0)
PROSE = Measure("t/prose", ("t/prose",), "score", "nats", "lower", "capability", "prose, nats a token", 1)
TASKS = (Task("t/follows", "generate", "checks", (), (FOLLOWS,)), Task("t/prose", "perplexity", "nats", (), (PROSE,)))
FINE = "Put the kettle on, warm the pot and let the leaves stand for four minutes before you pour."
LOOP = "rojo azul verde gris " * 12


def answers(policy: str, *, ended: int, loops: int, prose: float) -> list[Score]:
    """40 answers, of which the first end and the first loop, and 12 texts of prose."""
    written = [
        Score(f"f{i}", "t/follows", "t/follows", policy, 0.0, LOOP if i < loops else f"{i} {FINE}", f"do {i}",
              {"ended": i < ended, "tokens": 20.0})
        for i in range(40)
    ]  # fmt: skip
    read = [Score(f"p{i}", "t/prose", "t/prose", policy, prose + i % 3 / 100, "", f"text {i}", {}) for i in range(12)]
    return written + read


def card(**sft: Any) -> dict[str, Any]:
    parent = StageScores("chat", "sft", "base", answers("chat", ended=39, loops=1, prose=3.4))
    own = StageScores("own", "sft", "chat", answers("own", **sft))
    base = StageScores("base", "base", None, answers("base", ended=0, loops=20, prose=3.5))
    return build_scorecard("hand", [base, parent, own], TASKS)


def page_of(scorecard: dict[str, Any]) -> str:
    return Page(headline(RunRecord("hand", {}, "", scorecard, (), (), ()))).text


def test_a_wrecked_policy_is_warned_of_first_and_with_its_signs():
    wrecked = card(ended=8, loops=30, prose=4.9)
    (row,) = wrecked["warnings"]
    assert (row["stage"], row["against"]) == ("own", "chat")
    assert [sign["title"] for sign in row["signs"]] == [
        "answers that end", "repeated runs of four words", "prose, nats a token",
    ]  # fmt: skip
    assert [round(sign["value"], 2) for sign in row["signs"]][::2] == [-0.78, 1.5]
    for text in (" ".join(format_table(wrecked).split()), page_of(wrecked)):
        told = text.index("own looks damaged against chat, its parent: answers that end −77.5 points (")
        assert told < text.index("Significant losses")
        assert "Check its answers and its data." in text


@pytest.mark.parametrize(
    "sign", [{"ended": 20}, {"loops": 20}, {"prose": 3.9}],
)  # fmt: skip
def test_each_sign_alone_is_enough(sign: dict[str, Any]):
    assert len(card(**{"ended": 39, "loops": 1, "prose": 3.4, **sign})["warnings"][0]["signs"]) == 1


@pytest.mark.parametrize("cost", [{}, {"ended": 38}, {"loops": 2}, {"prose": 3.48}])
def test_an_ordinary_stage_is_not_warned_of(cost: dict[str, Any]):
    ordinary = card(**{"ended": 39, "loops": 1, "prose": 3.4, **cost})
    assert ordinary["warnings"] == []
    assert "looks damaged" not in format_table(ordinary) + page_of(ordinary)


def stored(name: str, parent: str | None, **changes: tuple[float, float, float, str]) -> dict[str, Any]:
    """A stage as a scorecard of an earlier version has it."""
    measures = {
        measure: {"value": 0.5, "low": 0.4, "high": 0.6, "n": 100, "better": better, "unit": unit, "title": measure,
                  "changes": [{"against": parent, "value": v, "low": low, "high": high, "verdict": verdict}]}
        for (measure, (v, low, high, verdict)), better, unit in zip(
            changes.items(), ("higher", "higher", "lower"), ("share", "share", "nats"))
    }  # fmt: skip
    return {"name": name, "parent": parent, "measures": measures}


def test_the_quickstarts_stored_figures_are_not_warned_of():
    """The changes of docs/experiments.md, and those of the ppo stage that cost most."""
    sft = stored("sft", "base", stops=(0.948, 0.914, 0.968, "better"), refused=(0.564, 0.444, 0.669, "better"),
                 prose=(-0.099, -0.136, -0.061, "better"))  # fmt: skip
    dpo = stored("dpo", "sft", stops=(0.045, 0.022, 0.076, "better"), refused=(-0.077, -0.162, 0.011, "not shown"),
                 prose=(0.015, 0.008, 0.021, "worse"))  # fmt: skip
    ppo = stored("ppo", "sft", stops=(0.01, -0.01, 0.03, "not shown"), refused=(-0.205, -0.3, -0.1, "worse"),
                 prose=(0.081, 0.06, 0.1, "worse"))  # fmt: skip
    assert signs_of_damage([{"name": "base", "parent": None, "measures": {}}, sft, dpo, ppo]) == []


def test_repetition_counts_runs_of_four_words():
    assert repetition("one two three four") == 0.0
    assert repetition("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition(LOOP) > 0.9
    assert repetition(FINE) == 0.0
    assert repetition("的的的的的的的的的") == pytest.approx(5 / 6), "scripts without spaces count by the character"


def test_a_scorecard_of_an_earlier_version_is_judged_by_its_prose():
    """It has no figures of answers."""
    older = card(ended=8, loops=30, prose=4.9)
    for stage in older["stages"]:
        del stage["answers"]
    (row,) = signs_of_damage(older["stages"])
    assert [sign["title"] for sign in row["signs"]] == ["prose, nats a token"]
