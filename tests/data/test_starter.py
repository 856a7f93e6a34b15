"""The starter data is what the quickstart learns from and is measured on: enough of it, sound, and kept apart."""
# ruff: noqa: E501 - the tables of checks are read by columns

import json
import statistics
from collections import Counter
from typing import Any

import pytest

from posttrain.constitution.principles import load_constitution
from posttrain.data.formats import read_demonstrations, read_preferences, read_prompts
from posttrain.data.prepare import Contamination
from posttrain.data.sources import STARTER
from posttrain.evaluate import checks
from posttrain.evaluate.refusal import judge
from posttrain.evaluate.suites import evaluation_prompts, load_suites


def rows(name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (STARTER / f"{name}.jsonl").read_text("utf-8").splitlines()]


DEMONSTRATIONS, PREFERENCES = rows("demonstrations"), rows("preferences")
INSTRUCTIONS, HARMFUL, HARMLESS = (rows(f"evaluation/{name}") for name in ("instructions", "harmful", "harmless"))
RED_TEAM = rows("red_team")
CAPABILITY = [row for name in ("facts", "arithmetic", "grammar") for row in rows(f"evaluation/{name}")]


def is_refusal(answer: str) -> bool:
    return judge(answer).refused


def last(row: dict[str, Any]) -> str:
    content: str = row["messages"][-1]["content"]
    return content


def first_ask(messages: list[dict[str, str]]) -> str:
    return next(m["content"] for m in messages if m["role"] == "user").strip().casefold()


# --- counts, ids, kept apart ------------------------------------------------------------------------------------------


def test_there_is_enough_of_everything():
    assert len(DEMONSTRATIONS) >= 300
    assert len(PREFERENCES) >= 200
    assert len(INSTRUCTIONS) >= 100
    assert len(HARMFUL) >= 60
    assert len(HARMLESS) >= 60
    assert len(CAPABILITY) >= 200


def test_every_row_can_be_learned_from():
    demonstrations = read_demonstrations("starter/demonstrations.jsonl", seed=0)
    preferences = read_preferences("starter/preferences.jsonl", seed=0)
    assert (demonstrations.problems, preferences.problems) == ((), ())
    assert (len(demonstrations.records), len(preferences.records)) == (len(DEMONSTRATIONS), len(PREFERENCES))


def test_ids_are_unique_everywhere():
    everything = [*DEMONSTRATIONS, *PREFERENCES, *RED_TEAM, *INSTRUCTIONS, *HARMFUL, *HARMLESS, *CAPABILITY]
    everything += rows("evaluation/prose")
    assert [name for name, count in Counter(row["id"] for row in everything).items() if count > 1] == []


def test_nothing_is_asked_twice():
    for asked in (
        [first_ask(row["messages"]) for row in DEMONSTRATIONS], [json.dumps(row["prompt"]).casefold() for row in PREFERENCES],
        [row["prompt"].strip().casefold() for row in (*INSTRUCTIONS, *HARMFUL, *HARMLESS)],
        [row["question"] + "|".join(sorted(row["choices"])) for row in CAPABILITY],
    ):  # fmt: skip
        assert len(asked) - len(set(asked)) == 0, "0 doubled"


def test_training_and_evaluation_are_disjoint():
    contamination = Contamination(evaluation_prompts(load_suites(("starter",), limit=0)))
    demonstrations = read_demonstrations("starter/demonstrations.jsonl", seed=0).records
    preferences = read_preferences("starter/preferences.jsonl", seed=0).records
    found = [r.id for r in demonstrations if contamination.found(r.messages)]
    found += [r.id for r in preferences if contamination.found(r.prompt)]
    found += [r.id for r in read_prompts("starter/red_team.jsonl", seed=0).records if contamination.found(r.messages)]
    assert found == [], "0 of all rows contaminated"


# --- demonstrations ---------------------------------------------------------------------------------------------------


def test_demonstrations_are_a_mix():
    count = Counter(row["category"] for row in DEMONSTRATIONS)
    assert 30 <= count["refusal"] <= 45
    assert 30 <= count["look-alike"] <= 45
    assert count["unknown"] >= 10
    assert len(count) >= 40
    assert max(count.values()) <= len(DEMONSTRATIONS) / 5
    assert sum(len(row["messages"]) > 2 + (row["messages"][0]["role"] == "system") for row in DEMONSTRATIONS) >= 40
    assert sum(row["messages"][0]["role"] == "system" for row in DEMONSTRATIONS) >= 5


def test_demonstrations_are_short():
    lengths = [len(m["content"].split()) for row in DEMONSTRATIONS for m in row["messages"] if m["role"] == "assistant"]
    assert statistics.median(lengths) <= 40  # about 60 tokens
    assert max(lengths) <= 200


# The form that a category of format-following demonstrations shows in its last answer.
FORMS: dict[str, list[dict[str, Any]]] = {
    "one-word": [{"kind": "word_count", "n": 1}],
    "yes-no": [{"kind": "one_of", "values": ["yes", "no"]}],
    "number-only": [{"kind": "pattern", "pattern": r"\d+"}],
    "uppercase": [{"kind": "uppercase"}],
    "lowercase": [{"kind": "lowercase"}],
    "quoted": [{"kind": "quoted"}],
    "choose": [{"kind": "word_count", "n": 1}],
    "classify": [{"kind": "word_count", "n": 1}],
}
ROW_FORMS: dict[str, dict[str, Any]] = {
    "008": {"kind": "word_count", "n": 3}, "009": {"kind": "word_count", "n": 5}, "010": {"kind": "word_count", "n": 6},
    "011": {"kind": "word_count", "n": 2}, "012": {"kind": "word_count", "n": 4}, "013": {"kind": "max_words", "n": 10},
    "014": {"kind": "max_words", "n": 11}, "015": {"kind": "max_words", "n": 7}, "016": {"kind": "max_words", "n": 9},
    "017": {"kind": "max_words", "n": 8}, "018": {"kind": "max_words", "n": 9}, "019": {"kind": "lines", "n": 3},
    "020": {"kind": "lines", "n": 4}, "021": {"kind": "lines", "n": 2}, "022": {"kind": "lines", "n": 3}, "023": {"kind": "lines", "n": 5},
    "024": {"kind": "bullets", "n": 3}, "025": {"kind": "bullets", "n": 2}, "026": {"kind": "bullets", "n": 4},
    "027": {"kind": "bullets", "n": 3}, "028": {"kind": "bullets", "n": 2}, "029": {"kind": "bullets", "n": 5},
    "030": {"kind": "numbered", "n": 4}, "031": {"kind": "numbered", "n": 3}, "032": {"kind": "numbered", "n": 2},
    "033": {"kind": "numbered", "n": 3}, "034": {"kind": "numbered", "n": 4}, "035": {"kind": "numbered", "n": 5},
    "036": {"kind": "comma_items", "n": 4}, "037": {"kind": "comma_items", "n": 3}, "038": {"kind": "comma_items", "n": 4},
    "039": {"kind": "comma_items", "n": 5}, "040": {"kind": "comma_items", "n": 4}, "041": {"kind": "sentences", "n": 1},
    "042": {"kind": "sentences", "n": 3}, "043": {"kind": "sentences", "n": 2}, "044": {"kind": "sentences", "n": 1},
    "045": {"kind": "sentences", "n": 2}, "046": {"kind": "sentences", "n": 1}, "047": {"kind": "sentences", "n": 3},
    "048": {"kind": "json_keys", "keys": ["language", "greeting"]}, "049": {"kind": "json_keys", "keys": ["product", "weight"]},
    "050": {"kind": "json_keys", "keys": ["film", "year"]}, "051": {"kind": "json_keys", "keys": ["sender", "topic"]},
    "052": {"kind": "json_keys", "keys": ["ok"]}, "053": {"kind": "json_keys", "keys": ["vowels", "consonants"]},
    "054": {"kind": "json_keys", "keys": ["name", "job", "town"]}, "055": {"kind": "starts_with", "text": "Of course!"},
    "056": {"kind": "starts_with", "text": "Once upon a time"}, "057": {"kind": "starts_with", "text": "Hi Priya,"},
    "058": {"kind": "starts_with", "text": "People yawn"}, "059": {"kind": "starts_with", "text": "Always"},
    "060": {"kind": "ends_with", "text": "Enjoy your evening."}, "061": {"kind": "ends_with", "text": "please."},
    "062": {"kind": "ends_with", "text": "?"}, "063": {"kind": "ends_with", "text": "Anything else?"},
    "064": {"kind": "ends_with", "text": "!"}, "065": {"kind": "includes", "words": ["ladder", "painter"]},
    "066": {"kind": "includes", "words": ["calm"]}, "067": {"kind": "includes", "words": ["tent", "stars"]},
    "068": {"kind": "includes", "words": ["clock", "pie", "grandmother"]}, "069": {"kind": "avoids", "words": ["hot"]},
    "070": {"kind": "avoids", "words": ["doctor", "sick"]}, "071": {"kind": "avoids", "words": ["sweet", "brown"]},
    "072": {"kind": "avoids", "words": ["boring", "film"]}, "073": {"kind": "without", "characters": "sS"},
    "074": {"kind": "without", "characters": ","}, "075": {"kind": "without", "characters": "eE"},
    "076": {"kind": "without", "characters": "!"}, "080": {"kind": "bullets", "n": 2}, "089": {"kind": "language", "code": "es"},
    "090": {"kind": "language", "code": "fr"}, "091": {"kind": "language", "code": "de"}, "092": {"kind": "language", "code": "it"},
    "093": {"kind": "language", "code": "en"}, "094": {"kind": "language", "code": "en"}, "095": {"kind": "language", "code": "es"},
    "096": {"kind": "items_start_with", "letter": "M"}, "097": {"kind": "items_start_with", "letter": "D"},
    "098": {"kind": "items_start_with", "letter": "C"}, "099": {"kind": "items_start_with", "letter": "T"},
    "100": {"kind": "table", "columns": 2, "rows": 3}, "101": {"kind": "table", "columns": 2, "rows": 2},
    "102": {"kind": "table", "columns": 3, "rows": 2}, "103": {"kind": "table", "columns": 2, "rows": 4},
    "136": {"kind": "bullets", "n": 2}, "137": {"kind": "comma_items", "n": 3}, "138": {"kind": "uppercase"},
    "139": {"kind": "numbered", "n": 4}, "141": {"kind": "max_words", "n": 6}, "142": {"kind": "json_keys", "keys": ["time", "place"]},
    "144": {"kind": "table", "columns": 2, "rows": 2}, "146": {"kind": "sentences", "n": 2}, "147": {"kind": "lines", "n": 3},
    "148": {"kind": "quoted"}, "149": {"kind": "without", "characters": ","}, "150": {"kind": "starts_with", "text": "Then"},
}  # fmt: skip


def test_format_following_demonstrations_obey_their_instruction():
    asked = [(row, one) for row in DEMONSTRATIONS for one in FORMS.get(row["category"], [])]
    by_id = {row["id"]: row for row in DEMONSTRATIONS}
    asked += [(by_id[f"demo-b-{number}"], one) for number, one in ROW_FORMS.items()]
    assert [(row["id"], one["kind"]) for row, one in asked if not checks.check(one, last(row))] == []
    assert len({row["id"] for row, _ in asked}) >= 120
    assert {one["kind"] for _, one in asked} >= set(checks.KINDS) - {"min_words", "includes_any"}


def test_refusals_refuse_and_go_on_to_help():
    for row in DEMONSTRATIONS:
        if row["category"] != "refusal":
            continue
        said = [m["content"] for m in row["messages"] if m["role"] == "assistant"]
        refusing = [text for text in said if is_refusal(text)]
        assert refusing, row["id"]
        assert all(len(checks.words(text)) >= 15 for text in refusing), row["id"]  # more than a bare no


def test_look_alikes_are_answered():
    assert [row["id"] for row in DEMONSTRATIONS if row["category"] == "look-alike" and is_refusal(last(row))] == []


# --- preferences ------------------------------------------------------------------------------------------------------


def test_every_pair_has_its_reason_and_two_answers():
    for row in PREFERENCES:
        assert len(row["reason"].split()) >= 3, row["id"]
        assert row["chosen"][0]["content"].strip() != row["rejected"][0]["content"].strip(), row["id"]
        assert len(row["chosen"]) == len(row["rejected"]) == 1, row["id"]


def test_pairs_are_a_mix():
    count = Counter(row["category"] for row in PREFERENCES)
    assert set(count) == {"form", "correctness", "directness", "helpfulness", "refusal", "honesty", "politeness"}
    assert min(count.values()) >= 15


def test_length_alone_does_not_give_the_chosen_away():
    longer = sum(len(row["chosen"][0]["content"]) > len(row["rejected"][0]["content"]) for row in PREFERENCES)
    assert 0.35 <= longer / len(PREFERENCES) <= 0.60


def test_pairs_about_refusing_refuse_in_the_right_place():
    for row in PREFERENCES:
        refused = is_refusal(row["chosen"][0]["content"]), is_refusal(row["rejected"][0]["content"])
        if row["category"] == "refusal":
            assert refused == (True, False), row["id"]
        elif row["category"] == "helpfulness":
            assert refused == (False, True), row["id"]


# --- prompts for critique and labels ----------------------------------------------------------------------------------

# Each harmful category and the principle of constitutions/starter.toml that is about it.
PRINCIPLE_OF = {
    "violence": "no-violence-help", "crime": "no-crime-help", "self-harm": "care-in-crisis", "children": "protect-children",
    "privacy": "privacy", "hate": "fairness", "manipulation": "no-manipulation", "dangerous-advice": "careful-advice",
}  # fmt: skip


def test_red_team_prompts_are_12_of_each_harm_and_64_harmless_ones():
    wanted = dict.fromkeys(PRINCIPLE_OF, 12) | {"look-alike": 32, "plain": 32}
    assert Counter(row["category"] for row in RED_TEAM) == wanted
    assert [row["id"] for row in RED_TEAM] == [f"rt-{number:03d}" for number in range(1, 161)]
    assert set(PRINCIPLE_OF.values()) <= {principle.id for principle in load_constitution("starter").principle}


def test_every_five_red_team_prompts_are_three_harmful_and_two_harmless():
    """So a first part of the file has the mix of the whole."""
    kinds = [row["category"] if row["category"] in ("look-alike", "plain") else "harmful" for row in RED_TEAM]
    assert kinds == ["harmful", "harmful", "harmful", "look-alike", "plain"] * 32


def test_red_team_prompts_are_short_and_read_whole():
    read = read_prompts("starter/red_team.jsonl", seed=0)
    assert read.problems == ()
    assert [(r.id, r.category, r.messages[0].content) for r in read.records] == [
        (row["id"], row["category"], row["prompt"]) for row in RED_TEAM
    ]
    assert max(len(row["prompt"].split()) for row in RED_TEAM) <= 20


def test_no_red_team_prompt_is_asked_elsewhere():
    asked = Counter(first_ask([{"role": "user", "content": row["prompt"]}]) for row in RED_TEAM)
    assert max(asked.values()) == 1
    elsewhere = {first_ask(row["messages"]) for row in DEMONSTRATIONS} | {first_ask(row["prompt"]) for row in PREFERENCES}
    elsewhere |= {row["prompt"].strip().casefold() for row in (*INSTRUCTIONS, *HARMFUL, *HARMLESS)}
    elsewhere |= {e.prompt.casefold() for principle in load_constitution("starter").principle for e in principle.example}
    assert asked.keys() & elsewhere == set()


# --- evaluation items -------------------------------------------------------------------------------------------------

# For each kind: parameters, an answer that passes and one that does not.
EXAMPLES: dict[str, tuple[dict[str, Any], str, str]] = {
    "max_words": ({"n": 3}, "one two three", "one two three four"),
    "min_words": ({"n": 3}, "one two three", "one two"),
    "word_count": ({"n": 2}, "well-known words", "one two three"),
    "one_of": ({"values": ["yes"]}, "Yes.", "Yes, it is"),
    "pattern": ({"pattern": r"\d+"}, "42", "42 days"),
    "lines": ({"n": 2}, "a\n\nb", "a"),
    "bullets": ({"n": 2}, "- a\n- b", "- a\nb"),
    "numbered": ({"n": 2}, "1. a\n2. b", "1. a\n3. b"),
    "comma_items": ({"n": 3}, "a, b, c", "a, b"),
    "sentences": ({"n": 2}, "Dr. Lee came. He left!", "He came. He left. He"),
    "json_keys": ({"keys": ["a"]}, '{"a": 1}', '{"a": 1, "b": 2}'),
    "starts_with": ({"text": "So"}, "So it is.", "Well, so it is."),
    "ends_with": ({"text": "Bye."}, "I go. Bye.", "Bye. I go."),
    "includes": ({"words": ["cat", "dog"]}, "A Cat and a dog.", "A category of dog."),
    "includes_any": ({"words": ["cat", "dog"]}, "A dog.", "A hotdog."),
    "avoids": ({"words": ["cat"]}, "A dog.", "A cat."),
    "without": ({"characters": "e"}, "Sand", "Stone"),
    "uppercase": ({}, "NO 5!", "No"),
    "lowercase": ({}, "yes, 5", "Yes"),
    "quoted": ({}, '"Well."', 'He said "Well."'),
    "language": ({"code": "fr"}, "Je suis dans la maison.", "I am in the house."),
    "items_start_with": ({"letter": "b"}, "bread, butter and Brie", "bread, cheese"),
    "table": ({"columns": 2, "rows": 1}, "| a | b |\n| --- | --- |\n| 1 | 2 |", "a b\n1 2"),
}


@pytest.mark.parametrize("kind", checks.KINDS)
def test_every_kind_of_check_can_be_passed_and_failed(kind: str):
    parameters, good, bad = EXAMPLES[kind]
    assert checks.check({"kind": kind, **parameters}, good)
    assert not checks.check({"kind": kind, **parameters}, bad)
    assert not checks.check({"kind": kind, **parameters}, " \n")


def test_no_item_contradicts_itself():
    for item in INSTRUCTIONS:
        found: dict[str, dict[str, Any]] = {one["kind"]: one for one in item["checks"]}
        most = found.get("max_words", found.get("word_count", {"n": 10**6}))["n"]
        assert found.get("min_words", {"n": 0})["n"] <= most, item["id"]
        named = {word.casefold() for word in found.get("includes", {"words": []})["words"]}
        assert not named & {word.casefold() for word in found.get("avoids", {"words": []})["words"]}, item["id"]
        if "one_of" in found:
            values = found["one_of"]["values"]
            assert any(all(checks.check(one, value) for one in item["checks"]) for value in values), item["id"]


def test_no_prompt_passes_by_being_repeated():
    """A base that echoes the prompt follows no instruction."""
    echoed = sum(all(checks.check(one, item["prompt"]) for one in item["checks"]) for item in INSTRUCTIONS)
    assert echoed == 0, "0 of all items"


def test_choices_hold_one_answer_each():
    for row in CAPABILITY:
        assert 0 <= row["answer"] < len(row["choices"]), row["id"]
        assert len(set(row["choices"])) == len(row["choices"]) >= 2, row["id"]
    for name in ("facts", "arithmetic", "grammar"):
        where = Counter(row["answer"] for row in rows(f"evaluation/{name}"))
        assert max(where.values()) <= 0.6 * sum(where.values()), name  # no place is right most of the time


def test_sums_are_right():
    sums = [(row, row["question"].splitlines()[-1].split()) for row in rows("evaluation/arithmetic")]
    written = [(row, parts) for row, parts in sums if len(parts) == 4 and parts[3] == "="]  # the others are in words
    for row, (left, sign, right, _) in written:
        a, b = int(left), int(right)
        wanted = {"+": a + b, "-": a - b, "x": a * b, "/": a / b if b else None}[sign]
        assert [i for i, choice in enumerate(row["choices"]) if int(choice) == wanted] == [row["answer"]], row["id"]
    assert len(written) >= 45


def test_a_licence_is_stated():
    assert "Apache-2.0" in (STARTER / "LICENSE.md").read_text("utf-8")
