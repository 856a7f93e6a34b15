"""Every common layout becomes the same records; what cannot be learned from is named with its row and its reason."""
# ruff: noqa: E501 - a row of a table stays one line

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from rows_of_formats import SAID, TURNS, USER, answered, pair, write

from posttrain.data.formats import content_of, read_demonstrations, read_preferences, read_prompts
from posttrain.data.read_results import Problem
from posttrain.errors import DataError
from posttrain.records import Message
from posttrain.settings import Source

REAL_DATA = Path(__file__).resolve().parents[3] / "shared" / "data"


DEMONSTRATIONS = {
    "messages": ({"messages": TURNS}, "messages"),
    "prompt+completion, text": ({"prompt": "What is 2 + 2?", "completion": "4"}, "prompt+completion"),
    "prompt+completion, messages": ({"prompt": TURNS[:1], "completion": TURNS[1:]}, "prompt+completion"),
    "prompt as messages, completion as text": ({"prompt": TURNS[:1], "completion": "4"}, "prompt+completion"),
    "ShareGPT": (
        {"conversations": [{"from": "human", "value": "What is 2 + 2?"}, {"from": "gpt", "value": "4"}]}, "ShareGPT conversations",
    ),
    "ShareGPT with roles": ({"conversations": TURNS}, "ShareGPT conversations"),
    "Alpaca": ({"instruction": "What is 2 + 2?", "output": "4"}, "Alpaca"),
    "Alpaca, empty input": ({"instruction": "What is 2 + 2?", "input": "", "output": "4"}, "Alpaca"),
    "Alpaca, no input": ({"instruction": "What is 2 + 2?", "input": None, "output": "4"}, "Alpaca"),
}  # fmt: skip


@pytest.mark.parametrize("name", DEMONSTRATIONS)
def test_demonstrations_of_any_layout(tmp_path: Path, name: str):
    row, layout = DEMONSTRATIONS[name]
    read = read_demonstrations(write(tmp_path, [row]), seed=0)
    assert [r.messages for r in read.records] == [(USER, SAID)]
    assert (read.sources[0].layout, read.problems) == (layout, ())
    assert content_of(row) == "demonstrations"


def test_an_alpaca_input_follows_its_instruction(tmp_path: Path):
    read = read_demonstrations(write(tmp_path, [{"instruction": "Add.", "input": "2 and 2", "output": "4"}]), seed=0)
    assert read.records[0].messages == (Message("user", "Add.\n\n2 and 2"), SAID)


def test_sharegpt_roles_and_a_last_question_without_an_answer(tmp_path: Path):
    turns = [
        ("system", "Be brief."),
        ("human", "Hi"),
        ("gpt", "Hello"),
        ("human", "What is 2 + 2?"),
        ("gpt", "4"),
        ("human", "Thanks"),
    ]
    read = read_demonstrations(write(tmp_path, [{"conversations": [{"from": f, "value": v} for f, v in turns]}]), seed=0)
    assert [m.role for m in read.records[0].messages] == ["system", "user", "assistant", "user", "assistant"]


_HH = "\n\nHuman: What is 2 + 2?\n\nAssistant: "
PREFERENCES = {
    "explicit text": ({"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5"}, "prompt+chosen+rejected (text)"),
    "explicit messages": (
        {"prompt": TURNS[:1], "chosen": TURNS[1:], "rejected": [{"role": "assistant", "content": "5"}]},
        "prompt+chosen+rejected (messages)",
    ),
    "prompt as messages, sides as text": ({"prompt": TURNS[:1], "chosen": "4", "rejected": "5"}, "prompt+chosen+rejected (text)"),
    "prompt repeated in both sides": (
        {"prompt": "What is 2 + 2?", "chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "5"}]},
        "prompt+chosen+rejected (messages)",
    ),
    "prompt as a transcript": ({"prompt": _HH.rstrip(), "chosen": "4", "rejected": "5"}, "prompt+chosen+rejected (text)"),
    "implicit messages": (
        {"chosen": TURNS, "rejected": [TURNS[0], {"role": "assistant", "content": "5"}]}, "chosen+rejected (messages, implicit prompt)",
    ),
    "implicit text": ({"chosen": "What is 2 + 2? 4", "rejected": "What is 2 + 2? 5"}, "chosen+rejected (text, implicit prompt)"),
    "hh-rlhf": ({"chosen": _HH + "4", "rejected": _HH + "5"}, "hh-rlhf transcripts"),
}  # fmt: skip


@pytest.mark.parametrize("name", PREFERENCES)
def test_preferences_of_any_layout(tmp_path: Path, name: str):
    row, layout = PREFERENCES[name]
    read = read_preferences(write(tmp_path, [row | {"reason": "sums"}]), seed=0)
    assert not read.problems
    (pair,) = read.records
    assert (pair.prompt, pair.chosen, pair.rejected) == ((USER,), (SAID,), (Message("assistant", "5"),))
    assert (read.sources[0].layout, pair.reason) == (layout, "sums")
    assert content_of(row) == "preferences"


def test_an_implicit_text_prompt_ends_with_a_whole_word(tmp_path: Path):
    read = read_preferences(write(tmp_path, [{"chosen": "The sky is blue.", "rejected": "The sky is black."}]), seed=0)
    pair = read.records[0]
    assert [m[0].content for m in (pair.prompt, pair.chosen, pair.rejected)] == ["The sky is", "blue.", "black."]


def test_a_transcript_of_several_turns_shares_all_but_the_last(tmp_path: Path):
    start = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant:"
    read = read_preferences(write(tmp_path, [{"chosen": start + " Yes.", "rejected": start + " No."}]), seed=0)
    assert [m.role for m in read.records[0].prompt] == ["user", "assistant", "user"]
    assert read.records[0].chosen == (Message("assistant", "Yes."),)


# --- rows that cannot be learned from ---------------------------------------------------------------------------------

BAD_DEMONSTRATIONS: dict[str, Any] = {
    "no assistant turn": {"messages": [TURNS[0]]},
    "begins with an assistant turn": {"messages": [TURNS[1]]},
    "empty text": {"messages": [TURNS[0], {"role": "assistant", "content": " \n"}]},
    "messages is not a list of messages": {"messages": "text"},
    "messages has a turn without a role of system, user, assistant": {"messages": [{"role": "robot", "content": "x"}]},
    "content is not text but int": {"messages": [TURNS[0], {"role": "assistant", "content": 4}]},
    "content is not text but NoneType": {"messages": [TURNS[0], {"role": "assistant", "content": None}]},
    "content holds half of a character (a lone surrogate)": {
        "messages": [TURNS[0], {"role": "assistant", "content": "\ud83d"}]
    },
}


def test_rows_without_a_lesson_are_named(tmp_path: Path):
    rows = [{"messages": TURNS}, *BAD_DEMONSTRATIONS.values(), {"other": 1}]
    path = write(tmp_path, rows)
    read = read_demonstrations(path, seed=0)
    reasons = [*BAD_DEMONSTRATIONS, "messages is not a list of messages"]
    assert read.problems == tuple(Problem(path, f"row {number}", reason) for number, reason in enumerate(reasons, 2))
    assert (len(read.records), read.sources[0].rows) == (1, 10)


BAD_PAIRS: dict[str, Any] = {
    "chosen equals rejected": {"prompt": "a", "chosen": "b", "rejected": "b"},
    "chosen is empty": {"prompt": "a", "chosen": "", "rejected": "b"},
    "rejected is empty": {"prompt": "a", "chosen": "b", "rejected": " "},
    "the prompt is empty or ends with an assistant turn": {"prompt": " ", "chosen": "b", "rejected": "c"},
    "rejected is not a list of messages": {"prompt": "a", "chosen": "b", "rejected": None},
    "chosen is not one assistant turn after the prompt": {"prompt": "a", "chosen": TURNS, "rejected": "c"},
    "no prompt column, and chosen and rejected have no common prefix": {"chosen": "Yes.", "rejected": "No."},
    "chosen holds half of a character (a lone surrogate)": {"prompt": "a", "chosen": "\udc00", "rejected": "c"},
}


def test_pairs_without_a_preference_are_named(tmp_path: Path):
    path = write(tmp_path, [{"prompt": "a", "chosen": "b", "rejected": "c"}, *BAD_PAIRS.values()])
    read = read_preferences(path, seed=0)
    assert read.problems == tuple(Problem(path, f"row {number}", reason) for number, reason in enumerate(BAD_PAIRS, 2))
    assert len(read.records) == 1


# --- values of any type ------------------------------------------------------------------------------------------------


def test_a_label_may_be_any_spelling_of_1_and_2(tmp_path: Path):
    row = {"input": "q", "output_1": "a", "output_2": "b"}
    labels: list[Any] = [1, 1.0, "1", "1.0", 2, 2.0, " 2 ", 0, 3, True, None, "x", [1], 10**400, float("nan"), 1.5]
    read = read_preferences(write(tmp_path, [{**row, "label": label} for label in labels]), seed=0)
    assert [r.chosen[0].content for r in read.records] == ["a"] * 4 + ["b"] * 3
    assert len(read.problems) == len(labels) - 7


@pytest.mark.parametrize(
    "margin, found",
    [(None, 0.0), ("", 0.0), (2, 2.0), ("0.5", 0.5), ("1e2", 100.0), (0, 0.0), (10**400, None), (1e300, None), ("large", None),
     ("nan", None), ("inf", None), ("1_0", None), (True, None), ([1], None), (-1, None), (float("inf"), None)],
)  # fmt: skip
def test_a_margin_is_read_for_reward_models_alone(tmp_path: Path, margin: Any, found: float | None):
    path = write(tmp_path, [pair(margin=margin)])
    assert [r.margin for r in read_preferences(path, seed=0).records] == [0.0]
    assert [r.margin for r in read_preferences(path, seed=0, margins=True).records] == ([] if found is None else [found])


@pytest.mark.parametrize(
    "probability, found",
    [(None, 1.0), ("", 1.0), (1, 1.0), ("0.5", 0.5), (0, 0.0), (1.01, None), (-0.1, None), ("likely", None), (True, None)],
)  # fmt: skip
def test_a_probability_is_read_for_reward_models_and_dpo(tmp_path: Path, probability: Any, found: float | None):
    path = write(tmp_path, [pair(probability=probability)])
    assert [r.probability for r in read_preferences(path, seed=0).records] == [1.0]
    read = read_preferences(path, seed=0, probabilities=True)
    assert [r.probability for r in read.records] == ([] if found is None else [found])
    assert len(read_prompts(path, seed=0).records) == 1


def test_a_csv_file_may_have_numbers(tmp_path: Path):
    (tmp_path / "p.csv").write_text("prompt,chosen,rejected,margin,probability\nq,a,b,0.5,\nq,c,d,,0.9\n", encoding="utf-8")
    read = read_preferences(str(tmp_path / "p.csv"), seed=0, margins=True, probabilities=True)
    assert [(r.margin, r.probability) for r in read.records] == [(0.5, 1.0), (0.0, 0.9)]
    (tmp_path / "l.csv").write_text("input,output_1,output_2,label\nq,a,b,2\nq,a,b,1.0\n", encoding="utf-8")
    assert [r.chosen[0].content for r in read_preferences(str(tmp_path / "l.csv"), seed=0).records] == ["b", "a"]


def test_no_value_of_any_column_ends_in_a_traceback(tmp_path: Path):
    values: list[Any] = [
        None,
        True,
        0,
        -1.5,
        10**400,
        float("nan"),
        float("inf"),
        "",
        "text",
        "\ud83d",
        [],
        [[]],
        [None],
        {},
        {"a": 1},
    ]
    values += [[{}], [{"role": []}], [{"from": {}}], [{"role": "user", "content": {}}], [{"from": "gpt", "value": 1}]]
    layouts = [
        {"messages": TURNS}, answered(), {"instruction": "a", "output": "b"}, {"conversations": TURNS},
        pair(), {"chosen": "a b", "rejected": "a c"}, {"input": "q", "output_1": "a", "output_2": "b", "label": 1},
    ]  # fmt: skip
    further = [
        "id", "system", "history", "label", "margin", "probability", "category", "reason", "tools", "weight", "status", "tie",
        "input",
    ]  # fmt: skip
    for layout in layouts:
        rows = [{**layout, column: value} for column in (*layout, *further) for value in values]
        path = write(tmp_path, [layout, *rows])
        read = (
            read_preferences(path, seed=0, margins=True, probabilities=True)
            if content_of(layout) == "preferences"
            else read_demonstrations(path, seed=0)
        )
        assert len(read.records) + len(read.problems) == len(rows) + 1
        json.dumps([repr(r) for r in read.records], ensure_ascii=False).encode()  # no half of a character is left


def test_files_of_the_other_kind_are_sent_to_the_other_stage(tmp_path: Path):
    with pytest.raises(DataError, match="this is a preference file: use it in a dpo stage"):
        read_demonstrations(write(tmp_path, [{"chosen": "a", "rejected": "b"}]), seed=0)
    with pytest.raises(DataError, match="this is a demonstration file: use it in an sft stage"):
        read_preferences(write(tmp_path, [{"messages": TURNS}]), seed=0)
    with pytest.raises(DataError) as error:
        read_demonstrations(write(tmp_path, [{"question": "a", "answer": "b"}], "odd.jsonl"), seed=0)
    assert str(error.value) == (
        f'data "{tmp_path}/odd.jsonl" · columns answer, question · messages · prompt+completion · conversations (ShareGPT) · '
        "instruction+output (Alpaca) · rename the columns"
    )


# --- mixing -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [0.5, 1.0, 2.0])
def test_a_weight_leaves_the_share_of_bad_rows_as_it_is(tmp_path: Path, weight: float):
    good = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    path = tmp_path / "d.jsonl"
    path.write_text("".join(json.dumps(good if i % 2 else {"messages": []}) + "\n" for i in range(400)))
    read = read_demonstrations((Source(path=str(path), weight=weight),), seed=1)
    assert len(read.records) + len(read.problems) == 400 * weight
    assert 0.4 <= len(read.problems) / (400 * weight) <= 0.6


@pytest.mark.parametrize("weight, copies", [(0.5, {0: 5, 1: 5}), (1.0, {1: 10}), (2.0, {2: 10}), (2.5, {2: 5, 3: 5})])
def test_weights_take_parts_and_copies(tmp_path: Path, weight: float, copies: dict[int, int]):
    path = write(tmp_path, [{"id": f"r{i}", "prompt": f"q{i}", "completion": "a"} for i in range(10)])
    read = [read_demonstrations((Source(path=path, weight=weight),), seed=seed) for seed in (1, 1, 2)]
    taken = Counter(r.messages for r in read[0].records)
    assert len(read[0].records) == 10 * weight
    assert Counter(taken.get((Message("user", f"q{i}"), Message("assistant", "a")), 0) for i in range(10)) == copies
    assert len({r.id for r in read[0].records}) == len(read[0].records)
    assert read[0] == read[1]
    assert (read[0] == read[2]) == (weight % 1 == 0)  # another seed takes another half


def test_rows_of_two_files_with_one_id_are_told_apart(tmp_path: Path):
    row = {"id": "same", "prompt": "q", "completion": "a"}
    first, second = write(tmp_path, [row], "one.jsonl"), write(tmp_path, [row, row], "two.jsonl")
    read = read_demonstrations((Source(path=first), Source(path=second)), seed=0)
    assert [r.id for r in read.records] == ["same", "same~2", "same~3"]
    assert [(s.path, s.rows) for s in read.sources] == [(first, 1), (second, 2)]


def test_a_row_without_an_id_is_named_after_its_file_and_line(tmp_path: Path):
    read = read_demonstrations(write(tmp_path, [{"prompt": "q", "completion": "a"}], "mine.jsonl"), seed=0)
    assert read.records[0].id == "mine-1"


# --- real files -------------------------------------------------------------------------------------------------------

REAL = {
    "demonstrations/oasst_threads.jsonl": 204,
    "demonstrations/self_instruct_seeds.jsonl": 175,
    "demonstrations/dolly_subset.jsonl": 387,
    "demonstrations/gpteacher.jsonl": 6458,
    "preferences/oasst_pairs.jsonl": 611,
    "preferences/hh_harmless.jsonl": 1804,  # of 1,808: of four pairs one side ends with the human or is empty
}


@pytest.mark.parametrize("name", REAL)
def test_real_files_load(name: str):
    path = REAL_DATA / name
    if not path.exists():
        pytest.skip(f"there is no {path}")
    read = read_demonstrations(str(path), seed=0) if name.startswith("dem") else read_preferences(str(path), seed=0)
    lost = {"preferences/hh_harmless.jsonl": 4}.get(name, 0)
    assert (len(read.records), len(read.problems)) == (REAL[name], lost)
