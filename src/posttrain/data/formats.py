"""Rows of any common layout become `Conversation` and `PreferencePair`; the layout is recognised by its columns and said.

    demonstrations   messages · prompt+completion (text or messages) · ShareGPT conversations · Alpaca
    preferences      prompt+chosen+rejected · chosen+rejected with an implicit prompt · hh-rlhf transcripts ·
                     input+output_1+output_2+label (LLMBar)
                     each side text or messages

A row that cannot be learned from is a `Problem` with its number and reason, never silently repaired. Two texts without a
prompt share their beginning up to the last whole word: as in TRL, that beginning is the prompt.
"""

import math
import random
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeVar

from posttrain.data.sources import RawRow, as_sources, data_hashes, read_rows
from posttrain.errors import DataError
from posttrain.records import ROLES, Conversation, Message, PreferencePair, Role
from posttrain.settings import Source

_SHAREGPT_ROLES: dict[str, Role] = {
    "system": "system", "human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "chatgpt": "assistant",
    "bing": "assistant", "bard": "assistant",
}  # fmt: skip
_SURROGATE = re.compile("[\ud800-\udfff]")
_HH_TURN = re.compile(r"\n\n(Human|Assistant):")
DEMONSTRATION_LAYOUTS = "messages · prompt+completion · conversations (ShareGPT) · instruction+output (Alpaca)"
PREFERENCE_LAYOUTS = (
    "prompt+chosen+rejected · chosen+rejected (implicit prompt, or hh-rlhf transcripts) · "
    "input+output_1+output_2+label (LLMBar)"
)
_LLMBAR = {"input", "output_1", "output_2", "label"}
# Columns that say what sort of pair it is; the first that a row has counts.
_CATEGORIES = ("category", "subset")


class Problem(NamedTuple):
    """A row that is left out, and why."""

    source: str
    row: str
    reason: str


class SourceInfo(NamedTuple):
    """What was read from one source."""

    path: str
    layout: str
    rows: int
    sha256: str


class Demonstrations(NamedTuple):
    """Conversations that can be learned from, and the rows that cannot."""

    records: tuple[Conversation, ...]
    problems: tuple[Problem, ...]
    sources: tuple[SourceInfo, ...]


class Preferences(NamedTuple):
    """Pairs that can be learned from, and the rows that cannot."""

    records: tuple[PreferencePair, ...]
    problems: tuple[Problem, ...]
    sources: tuple[SourceInfo, ...]


@dataclass(frozen=True, slots=True)
class PlainText:
    """A document without roles, as in pretraining."""

    id: str
    text: str
    source: str


R = TypeVar("R", Conversation, PreferencePair, PlainText)


class Texts(NamedTuple):
    """Documents that can be learned from, and the rows that cannot."""

    records: tuple[PlainText, ...]
    problems: tuple[Problem, ...]
    sources: tuple[SourceInfo, ...]


class _BadRow(Exception):
    """A row that cannot be learned from; its text is the reason."""


def kind_of(columns: Iterable[str]) -> str | None:
    """ "dpo" for preferences, "sft" for demonstrations, None for neither, by the names of the columns."""
    names = set(columns)
    if {"chosen", "rejected"} <= names or names >= _LLMBAR:
        return "dpo"
    known = ({"messages"}, {"prompt", "completion"}, {"conversations"}, {"instruction", "output"})
    return "sft" if any(wanted <= names for wanted in known) else None


def read_demonstrations(data: str | tuple[Source, ...], *, seed: int) -> Demonstrations:
    """Conversations of all sources, mixed by weight. Raises DataError for files and layouts that cannot be read."""

    def layout_of(path: str, rows: list[RawRow]) -> tuple[str, Callable[[dict[str, Any], str], Conversation]]:
        layout, convert = _demonstration_layout(path, rows)
        return layout, lambda row, name: Conversation(name, convert(row), path)

    return Demonstrations(*_read(data, seed, layout_of))


def read_preferences(data: str | tuple[Source, ...], *, seed: int) -> Preferences:
    """Pairs of all sources, mixed by weight. Raises DataError for files and layouts that cannot be read."""

    def layout_of(path: str, rows: list[RawRow]) -> tuple[str, Callable[[dict[str, Any], str], PreferencePair]]:
        return _preference_layout(path, rows), lambda row, name: _preference(row, name, path)

    return Preferences(*_read(data, seed, layout_of))


def read_texts(data: str | tuple[Source, ...], *, seed: int) -> Texts:
    """Plain texts (the column `text`) of all sources, mixed by weight. Raises DataError for files that cannot be read."""

    def layout_of(path: str, _: list[RawRow]) -> tuple[str, Callable[[dict[str, Any], str], PlainText]]:
        return "text", lambda row, name: _plain_text(row, name, path)

    return Texts(*_read(data, seed, layout_of))


def _read(
    data: str | tuple[Source, ...], seed: int,
    layout_of: Callable[[str, list[RawRow]], tuple[str, Callable[[dict[str, Any], str], R]]],
) -> tuple[tuple[R, ...], tuple[Problem, ...], tuple[SourceInfo, ...]]:  # fmt: skip
    """The records of all sources, mixed by weight, the rows that are none, and what each source is."""
    records: list[R] = []
    problems: list[Problem] = []
    infos: list[SourceInfo] = []
    for source, rows, sha256 in _sources(data):
        layout, convert = layout_of(source.path, rows)
        infos.append(SourceInfo(source.path, layout, len(rows), sha256))
        for row, name in _weighted(rows, source, seed):
            try:
                records.append(convert(row.value, name))
            except _BadRow as bad:
                problems.append(Problem(source.path, f"row {row.number}", str(bad)))
    return _unique_ids(records), tuple(problems), tuple(infos)


def _preference(row: dict[str, Any], name: str, path: str) -> PreferencePair:
    prompt, chosen, rejected = _pair(_plain_pair(row))
    margin, probability = _number(row, "margin", 0.0), _number(row, "probability", 1.0)
    if margin < 0 or not 0 <= probability <= 1:
        raise _BadRow("margin is below 0, or probability is not between 0 and 1")
    category = next((str(row[key]) for key in _CATEGORIES if row.get(key)), path)
    return PreferencePair(name, prompt, chosen, rejected, path, str(row.get("reason") or ""), margin, probability, category)


def _plain_text(row: dict[str, Any], name: str, path: str) -> PlainText:
    text = _string(row.get("text"), "text")
    if not text.strip():
        raise _BadRow("empty text")
    return PlainText(name, text, path)


def _sources(data: str | tuple[Source, ...]) -> Iterable[tuple[Source, list[RawRow], str]]:
    hashes = data_hashes(data)
    for source in as_sources(data):
        yield source, read_rows(source.path), hashes[source.path]


def _row_id(path: str, row: RawRow) -> str:
    own = row.value.get("id")
    return (
        own
        if isinstance(own, str) and own and not _SURROGATE.search(own)
        else f"{path.rsplit('/', 1)[-1].rsplit('.', 1)[0]}-{row.number}"
    )


def _weighted(rows: list[RawRow], source: Source, seed: int) -> list[tuple[RawRow, str]]:
    """Rows and their ids: 0.5 takes a seeded half in file order, 2.5 takes each twice and half of them once more.

    Copies have ids of their own. Rows that cannot be learned from are drawn like the others, so that their share stays.
    """
    whole, part = divmod(source.weight, 1.0)
    ids = [_row_id(source.path, row) for row in rows]
    taken = [(r, i if copy == 0 else f"{i}#{copy + 1}") for copy in range(int(whole)) for r, i in zip(rows, ids, strict=True)]
    chosen = sorted(random.Random(f"{seed}|{source.path}").sample(range(len(rows)), round(part * len(rows))))
    suffix = f"#{int(whole) + 1}" if whole else ""
    return taken + [(rows[i], ids[i] + suffix) for i in chosen]


def _unique_ids(records: list[R]) -> tuple[R, ...]:
    """Rows of different files may share an id; the later one gets a number."""
    seen: dict[str, int] = {}
    found: list[R] = []
    for record in records:
        seen[record.id] = seen.get(record.id, 0) + 1
        found.append(record if seen[record.id] == 1 else replace(record, id=f"{record.id}~{seen[record.id]}"))
    return tuple(found)


# --- demonstrations ---------------------------------------------------------------------------------------------------


def _demonstration_layout(path: str, rows: list[RawRow]) -> tuple[str, Callable[[dict[str, Any]], tuple[Message, ...]]]:
    columns = set(rows[0].value)
    if "messages" in columns:
        return "messages", lambda row: _conversation(_messages(row.get("messages"), "messages"))
    if {"prompt", "completion"} <= columns:
        return "prompt+completion", _prompt_completion
    if "conversations" in columns:
        return "ShareGPT conversations", lambda row: _conversation(_sharegpt(row.get("conversations")))
    if {"instruction", "output"} <= columns:
        return "Alpaca", _alpaca
    hint = "this is a preference file: use it in a dpo stage" if {"chosen", "rejected"} <= columns else "rename the columns"
    raise DataError(f'data "{path}"', f"columns {', '.join(sorted(columns))}", allowed=DEMONSTRATION_LAYOUTS, do=hint)


def _prompt_completion(row: dict[str, Any]) -> tuple[Message, ...]:
    return _conversation(
        (*_side(row.get("prompt"), "user", "prompt"), *_side(row.get("completion"), "assistant", "completion"))
    )


def _alpaca(row: dict[str, Any]) -> tuple[Message, ...]:
    instruction, extra = _string(row.get("instruction"), "instruction"), row.get("input") or ""
    prompt = f"{instruction}\n\n{_string(extra, 'input')}" if extra else instruction
    return _conversation((Message("user", prompt), Message("assistant", _string(row.get("output"), "output"))))


def _sharegpt(turns: Any) -> tuple[Message, ...]:
    if not isinstance(turns, list):
        raise _BadRow("conversations is not a list")
    if turns and isinstance(turns[0], dict) and "role" in turns[0]:
        return _messages(turns, "conversations")
    found = []
    for turn in turns:
        if not isinstance(turn, dict) or turn.get("from") not in _SHAREGPT_ROLES:
            raise _BadRow("a turn without a known from (human, gpt, system)")
        found.append(Message(_SHAREGPT_ROLES[turn["from"]], _string(turn.get("value"), "value")))
    return tuple(found)


def _conversation(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """A conversation that can be learned from: an assistant turn, and someone before it."""
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]  # a last question without an answer teaches nothing
    if not any(m.role == "assistant" for m in messages):
        raise _BadRow("no assistant turn")
    if messages[0].role == "assistant":
        raise _BadRow("begins with an assistant turn")
    if any(not m.content.strip() for m in messages if m.role != "system"):
        raise _BadRow("empty text")
    return messages


# --- preferences ------------------------------------------------------------------------------------------------------


def _preference_layout(path: str, rows: list[RawRow]) -> str:
    first = rows[0].value
    if set(first) >= _LLMBAR:
        return "input+output_1+output_2+label (LLMBar)"
    if not {"chosen", "rejected"} <= set(first):
        hint = "this is a demonstration file: use it in an sft stage" if kind_of(first) == "sft" else "rename the columns"
        raise DataError(f'data "{path}"', f"columns {', '.join(sorted(first))}", allowed=PREFERENCE_LAYOUTS, do=hint)
    if "prompt" in first:
        return "prompt+chosen+rejected" + (" (messages)" if isinstance(first["chosen"], list) else " (text)")
    if isinstance(first["chosen"], str):
        return "hh-rlhf transcripts" if _HH_TURN.match(first["chosen"]) else "chosen+rejected (text, implicit prompt)"
    return "chosen+rejected (messages, implicit prompt)"


def _plain_pair(row: dict[str, Any]) -> dict[str, Any]:
    """A row of two numbered outputs and the number of the better one, as prompt, chosen and rejected."""
    if not set(row) >= _LLMBAR:
        return row
    if row["label"] not in (1, 2):
        raise _BadRow("label is neither 1 nor 2")
    sides = (row["output_1"], row["output_2"])
    return {"prompt": row["input"], "chosen": sides[row["label"] - 1], "rejected": sides[2 - row["label"]]}


def _pair(row: dict[str, Any]) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is not None:
        prompt = _side(row["prompt"], "user", "prompt")
        sides = _side(chosen, "assistant", "chosen"), _side(rejected, "assistant", "rejected")
        sides = (_without_prompt(sides[0], prompt), _without_prompt(sides[1], prompt))
    elif isinstance(chosen, str) and isinstance(rejected, str) and not _HH_TURN.match(chosen):
        prompt, sides = _split_texts(chosen, rejected)
    else:
        both = _whole(chosen, "chosen"), _whole(rejected, "rejected")
        shared = 0
        while shared < min(map(len, both)) - 1 and both[0][shared] == both[1][shared]:
            shared += 1
        prompt, sides = both[0][:shared], (both[0][shared:], both[1][shared:])
    for name, side in (("chosen", sides[0]), ("rejected", sides[1])):
        if len(side) != 1 or side[0].role != "assistant":
            raise _BadRow(f"{name} is not one assistant turn after the prompt")
        if not side[0].content.strip():
            raise _BadRow(f"{name} is empty")
    if not prompt or prompt[-1].role == "assistant" or not prompt[-1].content.strip():
        raise _BadRow("no prompt that ends before the assistant speaks")
    if sides[0] == sides[1]:
        raise _BadRow("chosen equals rejected")
    return prompt, sides[0], sides[1]


def _split_texts(chosen: str, rejected: str) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], tuple[Message, ...]]]:
    """Two texts that begin alike, cut after the last whitespace that they share."""
    if chosen == rejected:
        raise _BadRow("chosen equals rejected")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    words = re.match(r"(?s).*\s", chosen[:shared])
    if words is None or not words.group().strip():
        raise _BadRow("no prompt column, and chosen and rejected do not begin alike")
    sides = [(Message("assistant", _string(side[words.end() :], "text")),) for side in (chosen, rejected)]
    return (Message("user", _string(words.group().strip(), "text")),), (sides[0], sides[1])


def _without_prompt(side: tuple[Message, ...], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """Some files repeat the prompt in both sides."""
    return side[len(prompt) :] if len(side) > len(prompt) and side[: len(prompt)] == prompt else side


def _whole(value: Any, name: str) -> tuple[Message, ...]:
    """A whole conversation given as messages or as a transcript."""
    if isinstance(value, str):
        return _transcript(value, name)
    return _messages(value, name)


def _transcript(text: str, name: str) -> tuple[Message, ...]:
    parts = _HH_TURN.split(text)
    if len(parts) < 3 or parts[0].strip():
        raise _BadRow(f'{name} is not a "Human: … Assistant: …" transcript')
    turns = zip(parts[1::2], parts[2::2], strict=True)
    found = tuple(Message("user" if who == "Human" else "assistant", _string(said.strip(), name)) for who, said in turns)
    # A prompt of its own often ends in "Assistant:", where the sides begin.
    return found[:-1] if name == "prompt" and found[-1] == Message("assistant", "") else found


# --- parts ------------------------------------------------------------------------------------------------------------


def _side(value: Any, role: Role, name: str) -> tuple[Message, ...]:
    """Text is one turn of `role`; a transcript and a list of messages are what they say."""
    if isinstance(value, str):
        return _transcript(value, name) if _HH_TURN.match(value) else (Message(role, _string(value, name)),)
    return _messages(value, name)


def _messages(value: Any, name: str) -> tuple[Message, ...]:
    if not isinstance(value, list) or not value:
        raise _BadRow(f"{name} is not a list of messages")
    found = []
    for turn in value:
        if not isinstance(turn, dict) or turn.get("role") not in ROLES:
            raise _BadRow(f"{name} has a turn without a role of {', '.join(ROLES)}")
        found.append(Message(turn["role"], _string(turn.get("content"), "content")))
    return tuple(found)


def _number(row: dict[str, Any], name: str, default: float) -> float:
    value = row.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise _BadRow(f"{name} is not a finite number")
    return float(value)


def _string(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(f"{name} is not text but {type(value).__name__}")
    if _SURROGATE.search(value):  # JSON can spell half of a character ("\\ud83d"), which no text can hold
        raise _BadRow(f"{name} holds half of a character (a lone surrogate)")
    return value
