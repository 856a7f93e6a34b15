"""Rows that PPO keeps in mind while it learns (PPO-ptx): demonstrations, or plain text of which every token is trained.

Where it stands: the ppo stage mixes their likelihood into its update. A source whose rows have the column `text`, and not those
of demonstrations, is plain text: it is rendered with the model's BOS and without a template, as in pretraining, and has no end
token, since it may be a part of a document. Everything else is what an sft stage would make of it.
"""

import sys
from collections.abc import Collection
from typing import Any

from posttrain.data.chat import ChatFormat
from posttrain.data.formats import Texts, content_of, read_demonstrations, read_texts
from posttrain.data.prepare import (
    Contamination,
    PreparedRows,
    TrainRow,
    prepare_demonstrations,
    reasons,
    refuse,
    unread_warnings,
)
from posttrain.data.sources import load
from posttrain.records import Message
from posttrain.settings import as_sources
from posttrain.stages.ppo import PpoStage

# Share of the rows that may be dropped before it is an error, as an sft stage has it by default.
ALLOW_DROPPED = 0.01


def prepare_ptx(
    stage: PpoStage, chat: ChatFormat, *, seed: int, evaluation_prompts: Collection[str], allow_dropped: float = ALLOW_DROPPED,
    context: int = sys.maxsize,
) -> PreparedRows:  # fmt: skip
    """The rows of `ptx_data`. Raises DataError as an sft stage would."""
    rows: list[TrainRow] = []
    reports: list[dict[str, Any]] = []
    for source in as_sources(stage.ptx_data):
        loaded = load((source,))
        if "text" in loaded.columns and content_of(loaded.columns) != "demonstrations":
            texts = read_texts(loaded, seed=seed)
            found = prepare_texts(
                texts, chat, max_tokens=min(stage.ptx_max_tokens, context), allow_dropped=allow_dropped,
                evaluation_prompts=evaluation_prompts,
            )  # fmt: skip
        else:
            found = prepare_demonstrations(
                read_demonstrations(loaded, seed=seed), chat, max_tokens=stage.ptx_max_tokens, validation=0.0,
                allow_dropped=allow_dropped, evaluation_prompts=evaluation_prompts, context=context,
            )  # fmt: skip
        rows += found.train
        reports.append(found.report)
    report = {
        "rows": len(rows), "tokens": sum(len(r.ids) for r in rows), "trained_tokens": sum(sum(r.trained) for r in rows),
        "sources": [one for report in reports for one in report["sources"]],
        **{name: sum(report[name] for report in reports) for name in ("truncated", "contaminated")},
        "dropped": sum(sum(report["dropped"].values()) for report in reports),
        "warnings": [f"ptx_data: {warning}" for report in reports for warning in report["warnings"]],
    }  # fmt: skip
    return PreparedRows(rows, [], report)


def with_ptx(report: dict[str, Any], mix: dict[str, Any]) -> dict[str, Any]:
    """The report of a stage's prompts with that of its mix."""
    return {**report, "ptx": mix, "warnings": [*report["warnings"], *mix["warnings"]]}


def prepare_texts(
    read: Texts, chat: ChatFormat, *, max_tokens: int, allow_dropped: float, evaluation_prompts: Collection[str]
) -> PreparedRows:
    """Encode and cut plain texts. Raises DataError when too many are dropped or none is left."""
    contamination = Contamination(evaluation_prompts)
    rows: list[TrainRow] = []
    contaminated, truncated = 0, 0
    for record in read.records:
        if contamination.found([Message("user", record.text)]):
            contaminated += 1
            continue
        ids = chat.encode_document(record.text)
        truncated += len(ids) > max_tokens
        ids = ids[:max_tokens]
        rows.append(TrainRow(record.id, ids, [False] + [True] * (len(ids) - 1)))
    refuse(list(read.problems), len(read.records), read, rows, allow_dropped)
    report = {
        "sources": [s._asdict() for s in read.sources], "truncated": truncated, "contaminated": contaminated,
        "dropped": reasons(read.problems), "warnings": unread_warnings(read.problems, read),
    }  # fmt: skip
    return PreparedRows(rows, [], report)
