"""What a row says beyond its layout, and would change what is learned from it, is named; the row is left out and counted."""
# ruff: noqa: E501 - a row of a table stays one line

from pathlib import Path
from typing import Any

import pytest
from rows_of_formats import SAID, SYSTEM, TURNS, USER, answered, pair, write

from posttrain.data.formats import read_demonstrations, read_preferences
from posttrain.records import Message


def said(**more: Any) -> dict[str, Any]:
    """A conversation whose answer says more."""
    return {"messages": [TURNS[0], {**TURNS[1], **more}]}


CALL = [{"id": "c1", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
UNREAD: dict[str, tuple[str, dict[str, Any]]] = {
    # OpenAI, TRL
    "a call beside text": ("tool_calls", said(tool_calls=CALL)),
    "a call without text": ("tool_calls", {"messages": [TURNS[0], {"role": "assistant", "content": None, "tool_calls": CALL}]}),
    "a call of the older form": ("function_call", said(function_call={"name": "add", "arguments": "{}"})),
    "a result": ('a turn of "tool"', {"messages": [*TURNS, {"role": "tool", "content": "4", "tool_call_id": "c1"}, *TURNS]}),
    "a developer": ('a turn of "developer"', {"messages": [{"role": "developer", "content": "Be brief."}, *TURNS]}),
    "a tools column": ("tools", {"messages": TURNS, "tools": [{"type": "function", "function": {"name": "add"}}]}),
    "tools as text": ("tools", answered(tools='[{"name": "add"}]')),
    "functions": ("functions", {"messages": TURNS, "functions": [{"name": "add"}]}),
    "weight 0": ("weight = 0", said(weight=0)),
    "half a weight": ("weight = 0.5", said(weight=0.5)),
    "a refusal": ("refusal", said(refusal="I cannot.")),
    "settings of the template": ("chat_template_kwargs", {"messages": TURNS, "chat_template_kwargs": {"enable_thinking": True}}),
    # reasoning
    "reasoning_content": ("reasoning_content", said(reasoning_content="2 and 2 are 4")),
    "thinking": ("thinking", said(thinking="2 and 2 are 4")),
    "reasoning": ("reasoning", said(reasoning="2 and 2 are 4")),
    "a column of reasoning": ("reasoning_content", answered(reasoning_content="2 and 2 are 4")),
    # Axolotl, ms-swift, Mistral
    "train: false": ("train = false", said(train=False)),
    "loss: false": ("loss = false", said(loss=False)),
    "masked": ("masked = true", said(masked=True)),
    "parts that are trained": ("train_detail", said(train_detail=[{"begin_offset": 0, "end_offset": 1, "train": False}])),
    "a beginning": ("prefix", said(prefix=True)),
    # images
    "an image in parts": (
        "content in parts (image_url, text)",
        {"messages": [{"role": "user", "content": [{"type": "text", "text": "What?"}, {"type": "image_url"}]}, TURNS[1]]},
    ),
    "one part": ("content in parts (text)", said(content=[{"type": "text", "text": "4"}])),
    "images of a turn": ("images", {"messages": [{**TURNS[0], "images": ["a.png"]}, TURNS[1]]}),
    "images of a row": ("images", answered(images=["a.png"])),
    "a video": ("videos", answered(videos=["a.mp4"])),
    # KTO, Argilla, OASST
    "label false": ("label = false", answered(label=False)),
    "label 0": ("label = false", answered(label=0)),
    "label as a text": ("label = false", answered(label="False")),
    "label in a word": ("label = bad", answered(label="bad")),
    "kto_tag": ("kto_tag = false", {"instruction": "What is 2 + 2?", "output": "4", "kto_tag": False}),
    "rejected": ("rejected = true", answered(rejected=True)),
    "deleted": ("deleted = true", answered(deleted=True)),
    "not accepted": ("accepted = false", answered(accepted="false")),
    "a row of weight 0": ("weight = 0", answered(weight=0.0)),
    # ShareGPT, LLaMA-Factory
    "ShareGPT, a call": (
        'a turn of "function_call"',
        {"conversations": [{"from": "human", "value": "?"}, {"from": "function_call", "value": "{}"}]},
    ),
    "ShareGPT, a result": (
        'a turn of "observation"',
        {"conversations": [{"from": "human", "value": "?"}, {"from": "observation", "value": "4"}]},
    ),
    "ShareGPT, weight 0": (
        "weight = 0", {"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "4", "weight": 0}]},
    ),
    "a history of no Alpaca row": ("history", answered(history=[["a", "b"]])),
}  # fmt: skip


@pytest.mark.parametrize("name", UNREAD)
def test_what_would_change_a_row_is_named_and_the_row_is_left_out(tmp_path: Path, name: str):
    unread, row = UNREAD[name]
    read = read_demonstrations(write(tmp_path, [row]), seed=0)
    assert (read.records, [p.unread for p in read.problems]) == ((), [unread])
    assert read.problems[0].reason == f"{unread}: not supported, and without it the row means something else"


# Files written from one table have every key in every row.
SAYS_NOTHING: dict[str, Any] = {
    "empty keys": said(
        tool_calls=None, function_call=None, reasoning_content="", weight=1, train=True, masked=False, name=None
    ),
    "empty columns": answered(
        tools=[], images=None, label=True, history=[], system="", weight=1.0, rejected=False, chat_template_kwargs={"a": None}
    ),
    "tools as an empty list in text": answered(tools="[]", label="1", reasoning=float("nan")),
    "a class as label": answered(label="geography", subset=3, correct=0),
    "a user of weight 0": {"messages": [{**TURNS[0], "weight": 0, "train": False}, TURNS[1]]},
    "structs of nothing": said(tool_calls=[{"function": {"name": None, "arguments": ""}}]),
}


@pytest.mark.parametrize("name", SAYS_NOTHING)
def test_columns_that_say_nothing_change_nothing(tmp_path: Path, name: str):
    read = read_demonstrations(write(tmp_path, [SAYS_NOTHING[name]]), seed=0)
    assert (read.problems, [r.messages for r in read.records]) == ((), [(USER, SAID)])


UNREAD_OF_PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "a call in a side": ("tool_calls", pair(chosen=[{**TURNS[1], "tool_calls": CALL}])),
    "tools": ("tools", pair(tools=[{"name": "add"}])),
    "images": ("images", pair(images=["a.png"])),
    "a tie": ("tie = true", pair(tie=True)),
    "a tie as a status": ("status = tie", pair(status="tie")),
    "a question": ("question (rename it to prompt)", {"question": "What?", "chosen": "It is 4", "rejected": "It is 5"}),
    "an instruction": ("instruction (rename it to prompt)", {"instruction": "Add.", "chosen": "A 4", "rejected": "A 5"}),
}


@pytest.mark.parametrize("name", UNREAD_OF_PAIRS)
def test_what_would_change_a_pair_is_named_and_the_pair_is_left_out(tmp_path: Path, name: str):
    unread, row = UNREAD_OF_PAIRS[name]
    read = read_preferences(write(tmp_path, [row]), seed=0)
    assert (read.records, [p.unread for p in read.problems]) == ((), [unread])


def test_alpaca_rows_have_a_system_and_a_history(tmp_path: Path):
    row = {"instruction": "And 3?", "input": "", "output": "6", "system": "Be brief.", "history": [["What is 2 + 2?", "4"]]}
    read = read_demonstrations(write(tmp_path, [row, {**row, "history": ["text"]}, {**row, "system": ["x"]}]), seed=0)
    turns = (Message("system", "Be brief."), USER, SAID, Message("user", "And 3?"), Message("assistant", "6"))
    assert [r.messages for r in read.records] == [turns]
    assert [p.reason for p in read.problems] == ["history is not a list of [question, answer]", "system is not text but list"]


@pytest.mark.parametrize("column", ["system", "system_prompt"])
def test_a_system_message_in_a_column_comes_first(tmp_path: Path, column: str):
    more = {column: "Be brief."}
    system = Message("system", "Be brief.")
    for row in ({"messages": TURNS, **more}, answered(**more), {"messages": [SYSTEM, *TURNS], **more}):
        assert read_demonstrations(write(tmp_path, [row]), seed=0).records[0].messages == (system, USER, SAID)
    assert read_preferences(write(tmp_path, [pair(**more)]), seed=0).records[0].prompt == (system, USER)
    other = {"messages": [{"role": "system", "content": "Be long."}, *TURNS], **more}
    (problem,) = read_demonstrations(write(tmp_path, [other]), seed=0).problems
    assert problem.reason == f"{column} differs from the system turn of the conversation"
