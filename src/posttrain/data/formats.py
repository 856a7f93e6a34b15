"""Convert rows of common layouts to `Conversation` and `PreferencePair`. The layout is recognised by its columns and reported.

    demonstrations   messages · prompt+completion (text or messages) · ShareGPT conversations · Alpaca
    preferences      prompt+chosen+rejected · chosen+rejected with an implicit prompt · hh-rlhf transcripts ·
                     input+output_1+output_2+label (LLMBar)
                     each side text or messages
    prompts          prompt · the beginning of a demonstration · the prompt of a pair

An invalid row becomes a `Problem` with its number and reason; rows are never repaired silently. If two texts have no separate
prompt, their common prefix up to the last whole word is the prompt, as in TRL.
"""

import random
import re
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from posttrain.data.cells import (
    BadRow,
    conversation_of,
    exchanges_of,
    is_transcript,
    label_of,
    messages_of,
    number_of,
    sharegpt_of,
    side_of,
    text_of,
    unread,
)
from posttrain.data.meaning import is_empty, prompt_beside, unsupported_in_row
from posttrain.data.read_results import Demonstrations, PlainText, Preferences, Problem, Prompt, Prompts, R, SourceInfo, Texts
from posttrain.data.sources import Loaded, RawRow, load
from posttrain.errors import DataError
from posttrain.reading import SURROGATE
from posttrain.records import Conversation, Message, PreferencePair
from posttrain.settings import Data, Source
from posttrain.stages.kind import Content

DEMONSTRATION_LAYOUTS = "messages · prompt+completion · conversations (ShareGPT) · instruction+output (Alpaca)"
_ALPACA = "Alpaca"
PREFERENCE_LAYOUTS = (
    "prompt+chosen+rejected · chosen+rejected (implicit prompt, or hh-rlhf transcripts) · "
    "input+output_1+output_2+label (LLMBar)"
)
_LLMBAR = {"input", "output_1", "output_2", "label"}
# Columns with the category of a pair; the first one present is used.
_CATEGORIES = ("category", "subset")
# Scores are of the order of 1 to 100. A larger margin is a mistake and would make the loss overflow.
MAX_MARGIN = 1_000_000


def content_of(columns: Iterable[str]) -> Content | None:
    """What the rows of a file hold by the names of its columns, or None."""
    names = set(columns)
    if {"chosen", "rejected"} <= names or names >= _LLMBAR:
        return "preferences"
    layouts = ({"messages"}, {"prompt", "completion"}, {"conversations"}, {"instruction", "output"})
    if any(layout <= names for layout in layouts):
        return "demonstrations"
    return "prompts" if "prompt" in names else None


def read_demonstrations(data: Data | Loaded, *, seed: int) -> Demonstrations:
    """Conversations of all sources, mixed by weight. Raises DataError for files and layouts that cannot be read."""

    def layout_of(path: str, rows: list[RawRow]) -> tuple[str, Callable[[dict[str, Any], str], Conversation]]:
        layout, convert = _demonstration_layout(path, rows)
        return layout, lambda row, name: Conversation(name, _demonstration(row, convert, layout), path)

    return Demonstrations(*_read(data, seed, layout_of))


def read_preferences(
    data: Data | Loaded, *, seed: int, margins: bool = False, probabilities: bool = False
) -> Preferences:  # fmt: skip
    """Pairs of all sources, mixed by weight. With `margins`, also their margins, which reward models use; with `probabilities`,
    also the probabilities of their labels, which reward models and DPO use.

    Raises DataError for files and layouts that cannot be read.
    """

    def layout_of(path: str, rows: list[RawRow]) -> tuple[str, Callable[[dict[str, Any], str], PreferencePair]]:
        return _preference_layout(path, rows), lambda row, name: _preference(
            row, name, path, margin=_margin(row) if margins else 0.0, probability=_probability(row) if probabilities else 1.0
        )

    return Preferences(*_read(data, seed, layout_of))


def read_texts(data: Data | Loaded, *, seed: int) -> Texts:
    """Plain texts (the column `text`) of all sources, mixed by weight. Raises DataError for files that cannot be read."""

    def layout_of(path: str, _: list[RawRow]) -> tuple[str, Callable[[dict[str, Any], str], PlainText]]:
        return "text", lambda row, name: _plain_text(row, name, path)

    return Texts(*_read(data, seed, layout_of))


def read_prompts(data: Data | Loaded, *, seed: int) -> Prompts:
    """Prompts of all sources, mixed by weight; each file may have another layout. Raises DataError as the other readers do."""

    def layout_of(path: str, rows: list[RawRow]) -> tuple[str, Callable[[dict[str, Any], str], Prompt]]:
        content = content_of(rows[0].value)
        if content == "preferences":
            return _preference_layout(path, rows), lambda row, name: _prompt(
                row, _preference(row, name, path).prompt, name, path
            )
        if content == "prompts":
            return "prompt", lambda row, name: _prompt(
                row, _with_system(row, side_of(row.get("prompt"), "user", "prompt")), name, path
            )
        layout, convert = _demonstration_layout(path, rows)
        return layout, lambda row, name: _prompt(row, _before_the_answer(_demonstration(row, convert, layout)), name, path)

    return Prompts(*_read(data, seed, layout_of))


def _prompt(row: dict[str, Any], messages: tuple[Message, ...], name: str, path: str) -> Prompt:
    """A prompt with the category of its row. It ends before the answer."""
    if not any(m.role == "user" and m.content.strip() for m in messages):
        raise BadRow("empty prompt")
    if messages[-1].role == "assistant":
        raise BadRow("prompt ends with an assistant turn")
    return Prompt(name, messages, path, next((label for key in _CATEGORIES if (label := label_of(row.get(key)))), ""))


def _before_the_answer(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    return messages[: next(i for i, message in enumerate(messages) if message.role == "assistant")]


def _read(
    data: Data | Loaded, seed: int,
    layout_of: Callable[[str, list[RawRow]], tuple[str, Callable[[dict[str, Any], str], R]]],
) -> tuple[tuple[R, ...], tuple[Problem, ...], tuple[SourceInfo, ...]]:  # fmt: skip
    """The records of all sources, mixed by weight, the problems of invalid rows, and a description of each source."""
    records: list[R] = []
    problems: list[Problem] = []
    infos: list[SourceInfo] = []
    for source, (rows, sha256) in (data if isinstance(data, Loaded) else load(data)).sources:
        layout, convert = layout_of(source.path, rows)
        infos.append(SourceInfo(source.path, layout, len(rows), sha256))
        for row, name in _weighted(rows, source, seed):
            try:
                records.append(convert(row.value, name))
            except BadRow as error:
                problems.append(Problem(source.path, f"row {row.number}", str(error), error.unread))
    return _unique_ids(records), tuple(problems), tuple(infos)


def _preference(
    row: dict[str, Any], name: str, path: str, *, margin: float = 0.0, probability: float = 1.0
) -> PreferencePair:  # fmt: skip
    _check_meaning(row, pairs=True)
    prompt, chosen, rejected = _pair(_as_plain_pair(row))
    category = next((label for key in _CATEGORIES if (label := label_of(row.get(key)))), path)
    return PreferencePair(
        name, _with_system(row, prompt), chosen, rejected, path, label_of(row.get("reason")), margin, probability, category,
        _authors(row),
    )  # fmt: skip


def _authors(row: dict[str, Any]) -> tuple[str, str]:
    """Who wrote the chosen and the rejected completion, "" where unknown."""
    names = ("chosen_author", "rejected_author")
    if set(row) >= _LLMBAR:
        names = ("author_1", "author_2") if number_of(row["label"], "label") == 1 else ("author_2", "author_1")
    return label_of(row.get(names[0])), label_of(row.get(names[1]))


def _margin(row: dict[str, Any]) -> float:
    """The margin of a pair, 0 if it has none."""
    margin = number_of(row.get("margin"), "margin") or 0.0
    if not 0 <= margin <= MAX_MARGIN:
        raise BadRow(f"margin is not between 0 and {MAX_MARGIN:,}")
    return margin


def _probability(row: dict[str, Any]) -> float:
    """The probability of a pair's label, 1 if it has none."""
    probability = number_of(row.get("probability"), "probability")
    probability = 1.0 if probability is None else probability
    if not 0 <= probability <= 1:
        raise BadRow("probability is not between 0 and 1")
    return probability


def _check_meaning(row: dict[str, Any], *, pairs: bool = False) -> None:
    """Raise BadRow for a row with an unsupported column that changes its meaning."""
    if (name := unsupported_in_row(row, pairs=pairs)) is not None:
        raise unread(name)


def _with_system(row: dict[str, Any], messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Put the system message of a separate column first."""
    for name in ("system", "system_prompt"):
        if not is_empty(row.get(name)):
            system = Message("system", text_of(row[name], name))
            if messages[:1] and messages[0].role == "system":
                if messages[0] == system:
                    return messages
                raise BadRow(f"{name} differs from the system turn of the conversation")
            return (system, *messages)
    return messages


def _plain_text(row: dict[str, Any], name: str, path: str) -> PlainText:
    text = text_of(row.get("text"), "text")
    if not text.strip():
        raise BadRow("empty text")
    return PlainText(name, text, path)


def _row_id(path: str, row: RawRow) -> str:
    row_id = row.value.get("id")
    return (
        row_id
        if isinstance(row_id, str) and row_id and not SURROGATE.search(row_id)
        else f"{path.rsplit('/', 1)[-1].rsplit('.', 1)[0]}-{row.number}"
    )


def _weighted(rows: list[RawRow], source: Source, seed: int) -> list[tuple[RawRow, str]]:
    """Rows and their ids, by weight: 0.5 takes a seeded half in file order, 2.5 takes each row twice and half of them once
    more.

    Copies have their own ids. Invalid rows are sampled like the others, so that their share is unchanged.
    """
    full_copies, fraction = divmod(source.weight, 1.0)
    ids = [_row_id(source.path, row) for row in rows]
    rows_and_ids = [
        (r, i if copy == 0 else f"{i}#{copy + 1}") for copy in range(int(full_copies)) for r, i in zip(rows, ids, strict=True)
    ]
    sampled = sorted(random.Random(f"{seed}|{source.path}").sample(range(len(rows)), round(fraction * len(rows))))
    suffix = f"#{int(full_copies) + 1}" if full_copies else ""
    return rows_and_ids + [(rows[i], ids[i] + suffix) for i in sampled]


def _unique_ids(records: list[R]) -> tuple[R, ...]:
    """Make ids unique: later records with the same id get a number."""
    counts: dict[str, int] = {}
    unique: list[R] = []
    for record in records:
        counts[record.id] = counts.get(record.id, 0) + 1
        unique.append(record if counts[record.id] == 1 else replace(record, id=f"{record.id}~{counts[record.id]}"))
    return tuple(unique)


# --- demonstrations ---------------------------------------------------------------------------------------------------


def _demonstration_layout(path: str, rows: list[RawRow]) -> tuple[str, Callable[[dict[str, Any]], tuple[Message, ...]]]:
    columns = set(rows[0].value)
    if "messages" in columns:
        return "messages", lambda row: _conversation(messages_of(row.get("messages"), "messages"))
    if {"prompt", "completion"} <= columns:
        return "prompt+completion", _prompt_completion
    if "conversations" in columns:
        return "ShareGPT conversations", lambda row: _conversation(sharegpt_of(row.get("conversations")))
    if {"instruction", "output"} <= columns:
        return _ALPACA, _alpaca
    hint = "this is a preference file: use it in a dpo stage" if {"chosen", "rejected"} <= columns else "rename the columns"
    raise DataError(f'data "{path}"', f"columns {', '.join(sorted(columns))}", allowed=DEMONSTRATION_LAYOUTS, do=hint)


def _demonstration(
    row: dict[str, Any], convert: Callable[[dict[str, Any]], tuple[Message, ...]], layout: str
) -> tuple[Message, ...]:
    _check_meaning(row)
    if layout != _ALPACA and not is_empty(row.get("history")):
        raise unread("history")
    return _with_system(row, convert(row))


def _prompt_completion(row: dict[str, Any]) -> tuple[Message, ...]:
    return _conversation(
        (*side_of(row.get("prompt"), "user", "prompt"), *side_of(row.get("completion"), "assistant", "completion"))
    )


def _alpaca(row: dict[str, Any]) -> tuple[Message, ...]:
    instruction, extra = text_of(row.get("instruction"), "instruction"), row.get("input") or ""
    prompt = f"{instruction}\n\n{text_of(extra, 'input')}" if extra else instruction
    history = row.get("history")
    before = () if is_empty(history) else exchanges_of(history, "history")
    return _conversation((*before, Message("user", prompt), Message("assistant", text_of(row.get("output"), "output"))))


def _conversation(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """Check that a conversation can be trained: an assistant turn after another turn, and no empty text."""
    while messages and messages[-1].role != "assistant":
        messages = messages[:-1]  # a final question without an answer is not used
    if not any(m.role == "assistant" for m in messages):
        raise BadRow("no assistant turn")
    if messages[0].role == "assistant":
        raise BadRow("begins with an assistant turn")
    if any(not m.content.strip() for m in messages if m.role != "system"):
        raise BadRow("empty text")
    return messages


# --- preferences ------------------------------------------------------------------------------------------------------


def _preference_layout(path: str, rows: list[RawRow]) -> str:
    first = rows[0].value
    if set(first) >= _LLMBAR:
        return "input+output_1+output_2+label (LLMBar)"
    if not {"chosen", "rejected"} <= set(first):
        hint = (
            "this is a demonstration file: use it in an sft stage"
            if content_of(first) == "demonstrations"
            else "rename the columns"
        )
        raise DataError(f'data "{path}"', f"columns {', '.join(sorted(first))}", allowed=PREFERENCE_LAYOUTS, do=hint)
    if "prompt" in first:
        return "prompt+chosen+rejected" + (" (messages)" if isinstance(first["chosen"], list) else " (text)")
    if isinstance(first["chosen"], str):
        return "hh-rlhf transcripts" if is_transcript(first["chosen"]) else "chosen+rejected (text, implicit prompt)"
    return "chosen+rejected (messages, implicit prompt)"


def _as_plain_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Convert a row with two outputs and the number of the better one to prompt, chosen and rejected."""
    if not set(row) >= _LLMBAR:
        return row
    label = number_of(row["label"], "label")
    if label not in (1, 2):
        raise BadRow("label is neither 1 nor 2")
    sides = (row["output_1"], row["output_2"]) if label == 1 else (row["output_2"], row["output_1"])
    return {"prompt": row["input"], "chosen": sides[0], "rejected": sides[1]}


def _pair(row: dict[str, Any]) -> tuple[tuple[Message, ...], tuple[Message, ...], tuple[Message, ...]]:
    chosen, rejected = row.get("chosen"), row.get("rejected")
    if row.get("prompt") is not None:
        prompt = side_of(row["prompt"], "user", "prompt")
        sides = side_of(chosen, "assistant", "chosen"), side_of(rejected, "assistant", "rejected")
        sides = (_without_prompt(sides[0], prompt), _without_prompt(sides[1], prompt))
    elif isinstance(chosen, str) and isinstance(rejected, str) and not is_transcript(chosen):
        if (name := prompt_beside(row)) is not None:
            raise unread(f"{name} (rename it to prompt)")
        prompt, sides = _split_texts(chosen, rejected)
    else:
        conversations = conversation_of(chosen, "chosen"), conversation_of(rejected, "rejected")
        shared = 0
        while shared < min(map(len, conversations)) - 1 and conversations[0][shared] == conversations[1][shared]:
            shared += 1
        prompt, sides = conversations[0][:shared], (conversations[0][shared:], conversations[1][shared:])
    for name, side in (("chosen", sides[0]), ("rejected", sides[1])):
        if len(side) != 1 or side[0].role != "assistant":
            raise BadRow(f"{name} is not one assistant turn after the prompt")
        if not side[0].content.strip():
            raise BadRow(f"{name} is empty")
    if not prompt or prompt[-1].role == "assistant" or not prompt[-1].content.strip():
        raise BadRow("the prompt is empty or ends with an assistant turn")
    if sides[0] == sides[1]:
        raise BadRow("chosen equals rejected")
    return prompt, sides[0], sides[1]


def _split_texts(chosen: str, rejected: str) -> tuple[tuple[Message, ...], tuple[tuple[Message, ...], tuple[Message, ...]]]:
    """Split two texts after the last white space of their common prefix."""
    if chosen == rejected:
        raise BadRow("chosen equals rejected")
    pairs = enumerate(zip(chosen, rejected, strict=False))
    shared = next((i for i, (a, b) in pairs if a != b), min(len(chosen), len(rejected)))
    words = re.match(r"(?s).*\s", chosen[:shared])
    if words is None or not words.group().strip():
        raise BadRow("no prompt column, and chosen and rejected have no common prefix")
    sides = [(Message("assistant", text_of(side[words.end() :], "text")),) for side in (chosen, rejected)]
    return (Message("user", text_of(words.group().strip(), "text")),), (sides[0], sides[1])


def _without_prompt(side: tuple[Message, ...], prompt: tuple[Message, ...]) -> tuple[Message, ...]:
    """Remove the prompt from a side that repeats it."""
    return side[len(prompt) :] if len(side) > len(prompt) and side[: len(prompt)] == prompt else side
