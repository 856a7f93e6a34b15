"""Constitutions: what ships, what is refused, what is warned of."""

from pathlib import Path

import pytest

from posttrain.constitution.principles import load_constitution, warnings
from posttrain.constitution.prompts import NOTHING_FOUND
from posttrain.data.prepare import Contamination
from posttrain.errors import RecipeError
from posttrain.evaluate.suites import evaluation_prompts, load_suites
from posttrain.records import Message

ONE = """name = "mine"
version = "1"
[[principle]]
id = "brief"
title = "Be brief"
critique = "Is the answer longer than two sentences?"
revision = "Shorten the answer to two sentences."
comparison = "Which answer is shorter?"
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.toml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_the_starter_constitution_has_every_request_of_14_principles_and_no_warning():
    starter = load_constitution("starter")
    assert len(starter.principle) == 14
    for request in ("critique", "revision", "comparison"):
        assert starter.having(request, "here") == starter.principle
    tags = {tag for principle in starter.principle for tag in principle.tags}
    assert tags == {"honesty", "harm", "privacy", "fairness", "usefulness", "care"}
    assert warnings(starter) == []


def test_the_starter_has_a_short_example_with_a_fault_and_one_without_for_each_principle():
    contamination = Contamination(evaluation_prompts(load_suites(("starter",), limit=0)))
    prompts = []
    for principle in load_constitution("starter").principle:
        faulty, sound = principle.example
        assert faulty.revision is not None, principle.id
        assert faulty.critique != NOTHING_FOUND, principle.id
        assert (sound.critique, sound.revision) == (NOTHING_FOUND, None), principle.id
        for example in principle.example:
            texts = [text for text in example.model_dump().values() if text is not None]
            assert sum(len(text.split()) for text in texts) < 60, principle.id
            prompts.append(example.prompt)
    assert len(set(prompts)) == 28
    assert [prompt for prompt in prompts if contamination.found([Message("user", prompt)])] == []


def test_a_file_is_read_with_its_defaults_and_known_by_its_content(tmp_path: Path):
    mine = load_constitution(written(tmp_path, ONE))
    assert (mine.name, mine.version, mine.principle[0].weight, mine.principle[0].tags) == ("mine", "1", 1.0, ())
    again = load_constitution(written(tmp_path, "\ufeff" + ONE))
    assert again.fingerprint == mine.fingerprint
    assert load_constitution(written(tmp_path, ONE.replace("two", "three"))).fingerprint != mine.fingerprint
    assert load_constitution(written(tmp_path, ONE + "weight = 2.0\n")).fingerprint != mine.fingerprint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (ONE.replace('title = "Be brief"\n', ""), 'principle brief · "title" is missing · add it'),
        (ONE + 'revison = "x"\n', 'principle brief · unknown setting "revison" · there is: id, title'),
        (ONE + "weight = 0.0\n", "principle brief · weight = '0.0' · input should be greater than 0"),
        (ONE + "weight = inf\n", "principle brief · weight = 'inf' · input should be"),
        (ONE.replace('"brief"', '"Be brief!"'), "principle Be brief! · id = 'Be brief!'"),
        (ONE.replace('"Be brief"', '"  "'), "principle brief · title = '  '"),
        (ONE + ONE.partition('version = "1"\n')[2], 'a second principle with id "brief"'),
        ('name = "mine"\nversion = "1"\nprinciple = []\n', "no principle"),
        ('name = "mine"\nversion = "1"\nprinciple = "x"\n', "principle = 'x'"),
        ('name = "mine"\nversion = "1"\nprinciple = ["x"]\n', "principle 1 · principle = 'x'"),
        ('name = "mine"\n' + ONE.partition("\n")[2].partition("\n")[2], '"version" is missing'),
        (ONE + '[[principle.example]]\nprompt = "p"\nanswer = "a"\n', 'principle brief · example 1 · "critique" is missing'),
        ("name = ", "not TOML"),
        ("x = " + "[" * 5000, "not TOML"),
        ("x = " + "9" * 5000, "not TOML"),
    ],
)
def test_a_malformed_file_is_refused_by_place(tmp_path: Path, text: str, message: str):
    with pytest.raises(RecipeError) as refused:
        load_constitution(written(tmp_path, text))
    assert message in str(refused.value)
    assert str(refused.value).startswith("constitution mine.toml")


def test_files_that_are_not_there_or_no_text_are_refused(tmp_path: Path):
    with pytest.raises(RecipeError, match=r"no such file.*there is: starter.*name a constitution file"):
        load_constitution("startr")
    with pytest.raises(RecipeError, match="no such file"):
        load_constitution(str(tmp_path))
    (tmp_path / "latin.toml").write_bytes(b'name = "\xe9"')
    with pytest.raises(RecipeError, match="not UTF-8"):
        load_constitution(str(tmp_path / "latin.toml"))


def test_a_missing_request_is_named_where_it_is_needed(tmp_path: Path):
    mine = load_constitution(written(tmp_path, ONE.replace('comparison = "Which answer is shorter?"\n', "")))
    assert mine.having("critique", "stage") == mine.principle
    with pytest.raises(RecipeError, match='stage "labels" · principle "brief" has no comparison'):
        mine.having("comparison", 'stage "labels"')


def second(comparison: str) -> str:
    return ONE + f'[[principle]]\nid = "second"\ntitle = "Second"\ncomparison = "{comparison}"\n'


@pytest.mark.parametrize(
    ("comparison", "expected"),
    [
        ("Which answer is shorter?", "nearly the same"),
        ("Which answer is longer?", "opposite things (longer/shorter)"),
        ("Which answer is not shorter?", "opposite things (one says not)"),
        ("Which answer names its sources?", None),
    ],
)
def test_pairs_that_say_the_same_or_the_opposite_are_warned_of(tmp_path: Path, comparison: str, expected: str | None):
    found = warnings(load_constitution(written(tmp_path, second(comparison))))
    assert len(found) == (expected is not None)
    assert all(expected in warning and "brief and second" in warning for warning in found)
