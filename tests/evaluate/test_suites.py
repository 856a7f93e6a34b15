"""Suites: the starter suite is whole and sound, and a suite file that is wrong is refused in the error formula."""

import json
from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.evaluate import checks
from posttrain.evaluate.suites import (
    Task,
    all_measures,
    evaluation_prompts,
    load_suites,
    sample_prompts,
    suite_fingerprint,
)

STARTER = load_suites(("starter",), limit=0)
TASKS = {task.name.removeprefix("starter/"): task for task in STARTER}
SUITE = """
name = "mine"
samples = ["Say hello."]
[[task]]
name = "words"
answer = "generate"
scorer = "checks"
items = "words.jsonl"
[[task]]
name = "sums"
answer = "choices"
items = "sums.jsonl"
"""
WORDS = '{"id": "w1", "prompt": "One word?", "checks": [{"kind": "word_count", "n": 1}]}\n'
SUMS = '{"id": "s1", "question": "1 + 1 =", "choices": [" 2", " 3"], "answer": 0}\n'


def write_suite(folder: Path, suite: str = SUITE, words: str = WORDS, sums: str = SUMS) -> Path:
    (folder / "words.jsonl").write_text(words, encoding="utf-8")
    (folder / "sums.jsonl").write_text(sums, encoding="utf-8")
    path = folder / "mine.toml"
    path.write_text(suite, encoding="utf-8")
    return path


def refused(folder: Path, **changes: str) -> str:
    with pytest.raises(RecipeError) as error:
        load_suites((str(write_suite(folder, **changes)),), limit=0)
    return str(error.value)


def test_starter_has_enough_items():
    assert len(TASKS["instruction_following"].items) >= 100
    assert len(TASKS["refusal"].items) >= 60
    assert len(TASKS["over_refusal"].items) >= 60
    assert sum(len(TASKS[name].items) for name in ("facts", "arithmetic", "grammar")) >= 200


def test_starter_ids_are_unique_across_tasks():
    ids = [item["id"] for task in STARTER for item in task.items]
    assert len(set(ids)) == len(ids)


def test_starter_prompts_are_asked_once():
    prompts = [item["prompt"].casefold() for task in STARTER for item in task.items if "prompt" in item]
    assert len(set(prompts)) == len(prompts)


def test_every_check_of_the_starter_suite_exists_and_can_be_used():
    used = [check for item in TASKS["instruction_following"].items for check in item["checks"]]
    assert {str(item.get("kind")) for item in used} <= checks.KINDS.keys()
    assert {isinstance(checks.check(one, "an answer"), bool) for one in used} == {True}


def test_no_choice_begins_another_one():
    """A choice that begins another is at least as likely, whatever the model knows."""
    for name in ("facts", "arithmetic", "grammar"):
        for item in TASKS[name].items:
            pairs = [(a, b) for a in item["choices"] for b in item["choices"] if a != b and b.startswith(a)]
            assert pairs == [], item["id"]


def test_right_answers_stand_everywhere():
    """No position holds more than half of the right answers of questions with four choices."""
    for name in ("facts", "arithmetic"):
        answers = [item["answer"] for item in TASKS[name].items]
        assert max(map(answers.count, range(4))) < len(answers) / 2


def test_measures_are_those_of_the_scorecard_in_order():
    names = [measure.name for measure in all_measures(STARTER)]
    assert names == [
        f"starter/{name}"
        for name in (
            "instruction_following", "stops", "refusal", "over_refusal", "capability", "facts", "arithmetic", "grammar",
            "prose", "length",
        )
    ]  # fmt: skip
    lower = {measure.name for measure in all_measures(STARTER) if measure.better == "lower"}
    assert lower == {"starter/over_refusal", "starter/prose", "starter/length"}
    assert TASKS["over_refusal"].better == "lower"


def test_samples_are_six_and_belong_to_the_prompts_that_training_must_not_hold():
    samples = sample_prompts(STARTER)
    assert len(samples) == 6
    prompts = evaluation_prompts(STARTER)
    assert set(samples) <= prompts
    assert "" not in prompts
    assert TASKS["refusal"].items[0]["prompt"] in prompts


def test_limit_takes_the_first_items():
    limited = load_suites(("starter",), limit=3)
    assert {len(task.items) for task in limited} == {3}
    assert limited[0].items == STARTER[0].items[:3]


def test_fingerprint_changes_with_an_item(tmp_path: Path):
    first = load_suites((str(write_suite(tmp_path)),), limit=0)
    same = load_suites((str(write_suite(tmp_path)),), limit=0)
    other = load_suites((str(write_suite(tmp_path, sums=SUMS.replace('" 3"', '" 4"'))),), limit=0)
    assert suite_fingerprint(first) == suite_fingerprint(same) != suite_fingerprint(other)


def test_a_suite_file_without_measures_gets_one_a_task(tmp_path: Path):
    tasks = load_suites(("starter", str(write_suite(tmp_path))), limit=0)
    mine: list[Task] = [task for task in tasks if task.name.startswith("mine/")]
    assert [m.name for task in mine for m in task.measures] == ["mine/words", "mine/sums"]
    assert sample_prompts(tasks) == sample_prompts(STARTER)


def test_unknown_suite_names_what_there_is():
    with pytest.raises(RecipeError, match=r'suites · "startre" is not a suite · there is: starter'):
        load_suites(("startre",), limit=0)
    with pytest.raises(RecipeError, match=r"there is no file nowhere\.toml"):
        load_suites(("nowhere.toml",), limit=0)


def test_a_suite_twice_is_refused():
    with pytest.raises(RecipeError, match="a second suite"):
        load_suites(("starter", "starter"), limit=0)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ('answer = "choices"', 'answer = "choice"', "'choice'"),
        ('scorer = "checks"', 'scorer = "judge"', "'judge'"),
        ('scorer = "checks"', "", '"scorer" is missing with answer = "generate" · there is: checks, refusal'),
        ('scorer = "checks"', 'scorer = "nats"', 'scorer = "nats" with answer = "generate"'),
        ('scorer = "checks"', 'scorers = "checks"', 'task "words" · unknown setting "scorers"'),
        ('items = "sums.jsonl"', 'items = "sum.jsonl"', 'task "sums" · there is no file sum.jsonl'),
        ('items = "sums.jsonl"', "", '"items" is missing'),
        ('name = "sums"', 'name = "words"', 'a second task named "words"'),
        ('name = "mine"', 'name = "mine', "not TOML"),
    ],
)  # fmt: skip
def test_wrong_suite_files_are_refused(tmp_path: Path, old: str, new: str, message: str):
    assert message in refused(tmp_path, suite=SUITE.replace(old, new))


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        ('tasks = ["word"]', '"word" is not a task of this suite · there is: words, sums'),
        ("tasks = []", "tasks is empty"),
        ('tasks = ["sums"]\nof = "ended"', 'of = "ended" of the task "sums"'),
    ],
)
def test_wrong_measures_are_refused(tmp_path: Path, measure: str, message: str):
    assert message in refused(tmp_path, suite=f'{SUITE}[[measure]]\nname = "pooled"\n{measure}\n')


def test_measures_do_not_pool_different_units(tmp_path: Path):
    prose = tmp_path / "prose.jsonl"
    prose.write_text('{"id": "p1", "text": "It rained."}\n', encoding="utf-8")
    suite = f'{SUITE}[[task]]\nname = "prose"\nanswer = "perplexity"\nitems = "prose.jsonl"\n'
    assert "different units" in refused(tmp_path, suite=f'{suite}[[measure]]\nname = "all"\ntasks = ["sums", "prose"]\n')


@pytest.mark.parametrize(
    ("sums", "message"),
    [
        ("{", "sums.jsonl line 1 · not JSON"),
        ("", "has no items"),
        ("[1]\n", "a list"),
        (SUMS.replace("0}", "2}"), "invalid choices"),
        (SUMS.replace('" 3"', '" 2"'), "invalid choices"),
        (SUMS.replace("0}", '"0"}'), '"answer" is missing or not of type int'),
        (SUMS.replace("0}", "true}"), '"answer" is missing or not of type int'),
        (SUMS + SUMS, 'a second item named "s1"'),
    ],
)
def test_wrong_questions_are_refused_by_line(tmp_path: Path, sums: str, message: str):
    assert message in refused(tmp_path, sums=sums)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (WORDS.replace("word_count", "wordcount"), "wordcount"),
        (WORDS.replace('"n": 1', '"m": 1'), "allowed: n"),
        (WORDS.replace('[{"kind": "word_count", "n": 1}]', "[]"), "`checks` is not a list of tables"),
        (json.dumps({"id": "w", "prompt": "  ", "checks": [{"kind": "quoted"}]}) + "\n", "an empty text"),
    ],
)
def test_wrong_checks_are_refused_by_line(tmp_path: Path, words: str, message: str):
    assert message in refused(tmp_path, words=words)


def test_a_suite_file_that_is_not_text_is_refused(tmp_path: Path):
    path = tmp_path / "mine.toml"
    path.write_bytes(b"name = '\xff'")
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_suites((str(path),), limit=0)
