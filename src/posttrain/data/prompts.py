"""Prompts for a policy to answer: rows of prompts, the beginnings of demonstrations, or the prompts of preference pairs.

Stages that sample completions use these prompts. The answers in the files are not used. Each prompt occurs once. Prompts of
evaluation items are left out. Prompts that are too long for the stage, or that the chat template refuses, are dropped and
counted.
"""

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from posttrain.data.chat import ChatFormat
from posttrain.data.formats import read_prompts
from posttrain.data.prepare import SHOWN, Contamination, in_validation, reasons, unread_warnings
from posttrain.data.read_results import Problem
from posttrain.data.report import describe_rows
from posttrain.errors import DataError
from posttrain.records import Message
from posttrain.settings import Data

# If a larger share of the rows gives no prompt, there is a warning.
ALLOW_DROPPED = 0.01


class PromptRow(NamedTuple):
    """A prompt as token ids up to the start of the answer, the texts of its messages, separated by blank lines, the messages,
    and the file and category of its row."""

    id: str
    ids: list[int]
    text: str
    messages: tuple[Message, ...] = ()
    source: str = ""
    category: str = ""


class PreparedPrompts(NamedTuple):
    """Prompts to answer, those held out, and the report on the data."""

    train: list[PromptRow]
    validation: list[PromptRow]
    report: dict[str, Any]


def prepare_prompts(
    data: Data, chat: ChatFormat, *, seed: int, max_prompt_tokens: int,
    evaluation_prompts: Collection[str], validation: float = 0.0,
) -> PreparedPrompts:  # fmt: skip
    """Render prompts; a share may be held out. Raises DataError for files that cannot be read, and if no prompt is left."""
    read = read_prompts(data, seed=seed)
    problems = list(read.problems)
    contamination = Contamination(evaluation_prompts)
    unique: dict[tuple[int, ...], PromptRow] = {}
    held_out_ids: set[tuple[int, ...]] = set()
    too_long = f"longer than max_prompt_tokens = {max_prompt_tokens}"
    contaminated: list[str] = []
    repeated: list[str] = []
    long: list[Problem] = []
    for record in read.records:
        name, source, messages = record.id, record.source, record.messages
        if contamination.found(messages):
            contaminated.append(name)
            continue
        try:
            ids = chat.encode_prompt(messages)
        except DataError as refused:
            problems.append(Problem(source, name, f"{refused.where} {refused.found}"))
            continue
        if len(ids) > max_prompt_tokens:
            long.append(Problem(source, name, too_long))
        elif tuple(ids) in unique:
            repeated.append(name)
        else:
            unique[tuple(ids)] = PromptRow(
                name, ids, "\n\n".join(m.content for m in messages), messages, source, record.category
            )
            held_out_ids |= {tuple(ids)} if in_validation(messages, validation) else set()
    if len(unique) == len(held_out_ids):
        where = "data " + ", ".join(f'"{s.path}"' for s in read.sources)
        lost = {"longer": len(long), "evaluation prompts": len(contaminated), "held out": len(held_out_ids)} | reasons(problems)
        why = ", ".join(f"{count} {what}" for what, count in lost.items() if count) or "none could be read"
        raise DataError(
            where, f"no prompt of at most {max_prompt_tokens} tokens ({why})", do="raise max_prompt_tokens or give other data"
        )
    rows = [row for ids, row in unique.items() if ids not in held_out_ids]
    held_out = [row for ids, row in unique.items() if ids in held_out_ids]
    dropped = reasons(long) | reasons(problems)
    warnings = unread_warnings(problems, read)
    total = len(read.records) + len(read.problems)
    if len(problems) > ALLOW_DROPPED * total and not warnings:
        warnings.append(f"{len(problems):,} of {total:,} rows give no prompt: {', '.join(reasons(problems))}")
    report = describe_rows([len(r.ids) for r in rows], 0) | {
        "kind": "ppo", "sources": [s._asdict() for s in read.sources], "formats": sorted({s.layout for s in read.sources}),
        "rows": sum(s.rows for s in read.sources), "mixed_rows": total, "dropped": dropped,
        "dropped_rows": [p._asdict() for p in [*problems, *long][:SHOWN]], "warnings": warnings,
        "contaminated": len(contaminated), "contaminated_rows": contaminated[:SHOWN],
        "duplicates": len(repeated), "duplicate_rows": repeated[:SHOWN],
        "train_rows": len(rows), "validation_rows": len(held_out), "truncated": 0, "max_tokens": max_prompt_tokens,
        "ends_trained": None, "examples": [],
    }  # fmt: skip
    return PreparedPrompts(rows, held_out, report)


def check_room(rows: Sequence[PromptRow], *, max_new_tokens: int, context: int, where: str) -> None:
    """Refuse prompts that leave no room for their completions in the base's context. Raises DataError."""
    longest = max(rows, key=lambda row: len(row.ids))
    if len(longest.ids) + max_new_tokens > context:
        raise DataError(
            where, f"the prompt {longest.id} of {len(longest.ids)} tokens and {max_new_tokens} new ones",
            allowed=f"together at most {context}, the base's context", do="lower max_prompt_tokens or max_new_tokens",
        )  # fmt: skip
