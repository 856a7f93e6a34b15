"""Convert records to token ids for training, with a report of truncated, dropped and excluded rows.

    record -> contamination check -> rendering -> length limit -> training or validation by a hash of the first user turn

The length limit is `max_tokens` or the base's context, whichever is less.

Every row is used for training or validation, or counted under a reason with the rows named. Dropping more than `allow_dropped`
of the rows is an error. A demonstration that is too long is truncated. A pair that is too long is dropped, since truncating one
side could change which answer is better.
"""

import hashlib
import re
import sys
from collections import Counter
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

from posttrain.data.chat import ChatFormat
from posttrain.data.read_results import Demonstrations, Preferences, Problem, Prompts, Texts
from posttrain.data.report import describe_rows
from posttrain.errors import DataError
from posttrain.records import Message

# A row is contaminated if it shares this many consecutive words with an evaluation prompt (as in GPT-3's report, app. C).
OVERLAP_WORDS = 13
# Maximum number of dropped and of contaminated rows that a report names.
SHOWN = 20
_WORD = re.compile(r"\w+")


class TrainRow(NamedTuple):
    """A conversation as ids, and for each id whether it is trained."""

    id: str
    ids: list[int]
    trained: list[bool]


class PairRow(NamedTuple):
    """A preference pair as ids; both completions end with the turn's end token."""

    id: str
    prompt_ids: list[int]
    chosen_ids: list[int]
    rejected_ids: list[int]
    margin: float = 0.0
    probability: float = 1.0
    category: str = ""


class PreparedRows(NamedTuple):
    """Demonstrations ready for training."""

    train: list[TrainRow]
    validation: list[TrainRow]
    report: dict[str, Any]


class PreparedPairs(NamedTuple):
    """Pairs ready for training."""

    train: list[PairRow]
    validation: list[PairRow]
    report: dict[str, Any]


class Contamination:
    """Detects texts that repeat an evaluation prompt, whole or by 13 consecutive words."""

    def __init__(self, prompts: Collection[str]) -> None:
        words = [_WORD.findall(p.lower()) for p in prompts]
        self._prompts = {" ".join(w) for w in words if w}
        self._runs = {run for w in words for run in _runs(w)}

    def found(self, messages: Sequence[Message]) -> bool:
        """Whether any user turn equals an evaluation prompt or shares 13 consecutive words with one."""
        for message in messages:
            if message.role == "user":
                words = _WORD.findall(message.content.lower())
                if " ".join(words) in self._prompts or (self._runs and any(run in self._runs for run in _runs(words))):
                    return True
        return False


def _runs(words: list[str]) -> list[str]:
    return [" ".join(words[i : i + OVERLAP_WORDS]) for i in range(len(words) - OVERLAP_WORDS + 1)]


def in_validation(messages: Sequence[Message], share: float) -> bool:
    """Whether a row is for validation. Depends only on its first user turn, so that a prompt is never in both sets."""
    first = next((m.content for m in messages if m.role == "user"), "")
    digest = hashlib.sha256(first.strip().encode()).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64


class _Limit(NamedTuple):
    """The maximum number of tokens of a row, and the name of the limit."""

    tokens: int
    name: str


def _limit(max_tokens: int, context: int) -> _Limit:
    if context < max_tokens:
        return _Limit(context, f"the base's context of {context:,} tokens")
    return _Limit(max_tokens, f"max_tokens = {max_tokens}")


def prepare_demonstrations(
    read: Demonstrations, chat: ChatFormat, *, max_tokens: int, validation: float, allow_dropped: float,
    evaluation_prompts: Collection[str], context: int = sys.maxsize,
) -> PreparedRows:  # fmt: skip
    """Render, truncate and split demonstrations. Raises DataError if too many rows are dropped or none is left."""
    limit = _limit(max_tokens, context)
    contamination = Contamination(evaluation_prompts)
    sides: tuple[list[TrainRow], list[TrainRow]] = ([], [])
    problems = list(read.problems)
    contaminated: list[str] = []
    truncated, uncut, ended, rewritten = 0, 0, 0, 0
    for record in read.records:
        if contamination.found(record.messages):
            contaminated.append(record.id)
            continue
        try:
            encoded = chat.encode(record.messages)
        except DataError as refused:
            problems.append(Problem(record.source, record.id, f"{refused.where} {refused.found}"))
            continue
        rewritten += sum(m.role == "assistant" for m in record.messages) - chat.trained_turns(encoded)
        if len(encoded.ids) > limit.tokens:
            truncated += 1
        else:
            uncut += 1
            ended += encoded.ids[-1] in chat.end_ids and encoded.trained[-1]
        row = TrainRow(record.id, encoded.ids[: limit.tokens], encoded.trained[: limit.tokens])
        if not any(row.trained[1:]):  # the first token is never predicted
            problems.append(Problem(record.source, record.id, f"no trained token within {limit.name}"))
            continue
        sides[in_validation(record.messages, validation)].append(row)
    refuse(problems, len(read.records), read, sides[0], allow_dropped)
    rows = [*sides[0], *sides[1]]
    warnings = unread_warnings(problems, read)
    if truncated and context < max_tokens:
        warnings.append(f"max_tokens = {max_tokens:,} exceeds {limit.name}: {truncated:,} rows are truncated")
    report = describe_rows([len(r.ids) for r in rows], sum(sum(r.trained) for r in rows))
    report |= _counts(read, problems, contaminated) | {
        "kind": "sft", "train_rows": len(sides[0]), "validation_rows": len(sides[1]), "truncated": truncated,
        "duplicates": _duplicates([tuple(r.ids) for r in rows]), "max_tokens": limit.tokens,
        "ends_trained": ended / uncut if uncut else None, "turns_rewritten": rewritten,
        "warnings": warnings,
        "examples": [{"id": r.id, "pieces": pieces(chat, r.ids, r.trained)} for r in _spread(sides[0])],
    }  # fmt: skip
    return PreparedRows(sides[0], sides[1], report)


def prepare_pairs(
    read: Preferences, chat: ChatFormat, *, max_tokens: int, validation: float, allow_dropped: float,
    evaluation_prompts: Collection[str], context: int = sys.maxsize,
) -> PreparedPairs:  # fmt: skip
    """Render and split preference pairs. Raises DataError if too many rows are dropped or none is left."""
    limit = _limit(max_tokens, context)
    contamination = Contamination(evaluation_prompts)
    sides: tuple[list[PairRow], list[PairRow]] = ([], [])
    problems = list(read.problems)
    contaminated: list[str] = []
    for record in read.records:
        if contamination.found(record.prompt):
            contaminated.append(record.id)
            continue
        try:
            prompt_ids, (chosen, rejected) = chat.encode_completions(record.prompt, (record.chosen[0], record.rejected[0]))
        except DataError as refused:
            problems.append(Problem(record.source, record.id, f"{refused.where} {refused.found}"))
            continue
        row = PairRow(record.id, prompt_ids, chosen, rejected, record.margin, record.probability, record.category)
        if len(row.prompt_ids) + max(len(row.chosen_ids), len(row.rejected_ids)) > limit.tokens:
            problems.append(Problem(record.source, record.id, f"longer than {limit.name}"))
        elif row.chosen_ids == row.rejected_ids:
            problems.append(Problem(record.source, record.id, "chosen equals rejected once rendered"))
        else:
            sides[in_validation(record.prompt, validation)].append(row)
    refuse(problems, len(read.records), read, sides[0], allow_dropped)
    rows = [*sides[0], *sides[1]]
    completions = [side for r in rows for side in (r.chosen_ids, r.rejected_ids)]
    lengths = [len(r.prompt_ids) + len(r.chosen_ids) + len(r.rejected_ids) for r in rows]
    report = describe_rows(lengths, sum(map(len, completions)))
    sides_of = [(tuple(r.prompt_ids), tuple(r.chosen_ids), tuple(r.rejected_ids)) for r in rows]
    report |= _counts(read, problems, contaminated) | {
        "kind": "dpo", "train_rows": len(sides[0]), "validation_rows": len(sides[1]), "truncated": 0,
        "duplicates": _duplicates(sides_of), "max_tokens": limit.tokens, "warnings": unread_warnings(problems, read),
        "ends_trained": sum(c[-1] in chat.end_ids for c in completions) / len(completions),
        "mean_chosen_tokens": sum(len(r.chosen_ids) for r in rows) / len(rows),
        "mean_rejected_tokens": sum(len(r.rejected_ids) for r in rows) / len(rows),
        "chosen_longer": sum(len(r.chosen_ids) > len(r.rejected_ids) for r in rows) / len(rows),
        "examples": [_pair_example(chat, r) for r in _spread(sides[0])],
    }  # fmt: skip
    return PreparedPairs(sides[0], sides[1], report)


def refuse(
    problems: list[Problem],
    read_rows: int,
    read: Demonstrations | Preferences | Texts,
    train: Sequence[Any],
    allow_dropped: float,
) -> None:
    """Raise DataError if too many rows were dropped or none is left."""
    where = "data " + ", ".join(f'"{s.path}"' for s in read.sources)
    total = read_rows + len(read.problems)
    summary = "; ".join(f"{count} rows: {reason}{_first(problems, reason)}" for reason, count in reasons(problems).items())
    if not train:
        raise DataError(
            where,
            f"no row left to train on ({summary or 'all held out or contaminated'})",
            do="run `posttrain data check`",
        )
    if len(problems) > allow_dropped * total:
        raise DataError(
            where, f"{len(problems)} of {total} rows cannot be trained on ({summary})",
            allowed=f"{allow_dropped:.0%} (allow_dropped)",
            do="correct the rows, or raise allow_dropped in the recipe",
        )  # fmt: skip


def unread_warnings(problems: Sequence[Problem], read: Demonstrations | Preferences | Texts | Prompts) -> list[str]:
    """A warning about rows dropped for unsupported fields, or an empty list."""
    names = Counter(p.unread for p in problems if p.unread).most_common()
    if not names:
        return []
    total = len(read.records) + len(read.problems)
    names_and_counts = ", ".join(f"{count:,} with {name}" for name, count in names)
    left_out = sum(count for _, count in names)
    return [f"{left_out:,} of {total:,} rows are dropped because of unsupported fields ({names_and_counts})"]


def reasons(problems: Sequence[Problem]) -> dict[str, int]:
    """The number of rows dropped for each reason, the most common first."""
    return dict(Counter(p.reason for p in problems).most_common())


def _first(problems: list[Problem], reason: str) -> str:
    return f" (first: {', '.join([p.row for p in problems if p.reason == reason][:3])})"


def _counts(read: Demonstrations | Preferences, problems: list[Problem], contaminated: list[str]) -> dict[str, Any]:
    """Counts of the rows. `mixed_rows` is their number after mixing by weight."""
    return {
        "sources": [s._asdict() for s in read.sources],
        "formats": sorted({s.layout for s in read.sources}),
        "rows": sum(s.rows for s in read.sources),
        "mixed_rows": len(read.records) + len(read.problems),
        "dropped": reasons(problems),
        "dropped_rows": [p._asdict() for p in problems[:SHOWN]],
        "contaminated": len(contaminated),
        "contaminated_rows": contaminated[:SHOWN],
    }


def _duplicates(rows: Sequence[Any]) -> int:
    """Rows that equal an earlier one."""
    return len(rows) - len(set(rows))


def _spread(rows: Sequence[Any]) -> list[Any]:
    """The first, the middle and the last row."""
    return [rows[i] for i in sorted({0, len(rows) // 2, len(rows) - 1})] if rows else []


def pieces(chat: ChatFormat, ids: Sequence[int], trained: Sequence[bool]) -> list[dict[str, Any]]:
    """The text of a row, including control tokens, cut where the mask changes."""
    cut_pieces: list[dict[str, Any]] = []
    start = 0
    for index in range(1, len(ids) + 1):
        if index == len(ids) or trained[index] != trained[start]:
            cut_pieces.append(
                {"text": chat.decode(ids[start:index], special=True, middle=start > 0), "trained": trained[start]}
            )
            start = index
    return cut_pieces


def _pair_example(chat: ChatFormat, row: PairRow) -> dict[str, Any]:
    parts = (("prompt", row.prompt_ids, False), ("chosen", row.chosen_ids, True), ("rejected", row.rejected_ids, True))
    return {
        "id": row.id,
        "pieces": [{"label": n, "text": chat.decode(i, special=True), "trained": t} for n, i, t in parts],
    }
