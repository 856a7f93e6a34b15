"""The rules of recipes/rules, worked by hand: where they hold, where they do not, and that each has its constitution."""

from pathlib import Path

import pytest

from posttrain.constitution.principles import load_constitution, warnings
from posttrain.constitution.prompts import NOTHING_FOUND
from posttrain.evaluate import rule_scores
from posttrain.judge.functions import FunctionWorker

RULES = Path(__file__).parents[2] / "recipes" / "rules"
SCORES = {
    "no-digits": rule_scores.no_digits,
    "polite-opening": rule_scores.polite_opening,
    "two-sentences": rule_scores.two_sentences,
}
EMPTY = ["", " ", "\n\t"]


def test_a_digit_of_any_script_breaks_the_rule():
    follows = ["Seven days.", "x² and ½ are no decimal digits, Ⅷ and ⑨ neither.", "?"]
    breaks = ["7 days.", "Seven days, not 8", "٣ days", "Route ６６", "१", "x\n1. y"]
    assert rule_scores.no_digits([""] * 3, follows) == [1.0, 1.0, 1.0]
    assert rule_scores.no_digits([""] * 6, breaks) == [0.0] * 6


def test_a_greeting_or_thanks_must_come_first():
    follows = [
        "Hello! It is Oslo.", "hi", " HI there, it is Oslo", "Good evening. Yes.", "Thank you for asking. No.", "Thanks, no.",
        "\nGreetings, traveller.", "Thanks a lot.",
    ]  # fmt: skip
    breaks = [
        "Yes. Thank you.", "It is Oslo, hello.", "History is long.", "Hi-fi is sound.", "Thanks to rain, it grows.",
        "thanks to them", "Goodbye.", "Good grief!", "Hellos are words.", '"Hello" is a word.',
    ]  # fmt: skip
    assert rule_scores.polite_opening([""] * len(follows), follows) == [1.0] * len(follows)
    assert rule_scores.polite_opening([""] * len(breaks), breaks) == [0.0] * len(breaks)


@pytest.mark.parametrize(
    ("answer", "count"),
    [
        ("One", 1),
        ("One.", 1),
        ("One. Two", 2),
        ("One. Two! Three?", 3),
        ("Really?! Yes...", 2),
        ("One.\nTwo.\n\nThree.\n", 3),
        ("It costs 3.50 at example.org today.", 1),  # no space after these marks
        ("Dr. Lee came.", 2),  # left out: abbreviations
        ("1. Wash it.", 2),  # left out: numbers of a list
        ('He said "Stop." Then he left.', 1),  # left out: closing quotation marks
        ("- milk\n- bread\n- eggs", 1),  # left out: lists without full stops
        ("One. ...", 1),
        ("...", 0),
    ],
)
def test_sentences_are_counted_by_their_end_marks(answer: str, count: int):
    assert rule_scores.count_sentences(answer) == count
    assert rule_scores.two_sentences([""], [answer]) == [float(count <= 2)]


@pytest.mark.parametrize("rule", SCORES)
def test_an_empty_answer_follows_no_rule(rule: str):
    assert SCORES[rule](["a", "b", "c"], EMPTY) == [0.0, 0.0, 0.0]
    assert SCORES[rule]([], []) == []


@pytest.mark.parametrize("rule", SCORES)
def test_the_worked_examples_of_a_constitution_agree_with_its_function(rule: str):
    constitution = load_constitution(str(RULES / f"{rule}.toml"))
    (principle,) = constitution.principle
    assert (constitution.name, principle.id, warnings(constitution)) == (rule, rule, [])
    assert None not in (principle.critique, principle.revision, principle.comparison)
    answers = [(example.answer, float(example.critique == NOTHING_FOUND)) for example in principle.example]
    answers += [(example.revision, 1.0) for example in principle.example if example.revision is not None]
    assert SCORES[rule]([""] * len(answers), [answer for answer, _ in answers]) == [score for _, score in answers]
    assert [score for _, score in answers] == [0.0, 0.0, 1.0, 1.0, 1.0]


def test_a_recipe_can_call_them_in_a_process():
    worker = FunctionWorker("posttrain.evaluate.rule_scores:two_sentences", timeout=60, where="here")
    try:
        assert worker.score(["p", "p"], ["One. Two.", "One. Two. Three."], where="here") == [1.0, 0.0]
    finally:
        worker.close()


def test_every_rule_file_has_its_function():
    assert sorted(path.stem for path in RULES.glob("*.toml")) == sorted(SCORES)
