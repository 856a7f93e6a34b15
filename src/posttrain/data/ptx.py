"""Rows of the pretraining mix of PPO (PPO-ptx): demonstrations, or plain text of which every token is trained.

The ppo stage adds their likelihood to its update. A source whose rows have the column `text`, and not those of demonstrations,
is plain text. It is rendered with the model's BOS and without a template, as in pretraining. It has no end token, because it
may be a part of a document. Other sources are rendered as an sft stage would render them.
"""

import sys
from collections.abc import Collection
from typing import Any

from posttrain.data.chat import ChatFormat
from posttrain.data.formats import content_of, read_demonstrations, read_texts
from posttrain.data.prepare import (
    Contamination,
    PreparedRows,
    TrainRow,
    prepare_demonstrations,
    reasons,
    refuse,
    unread_warnings,
)
from posttrain.data.read_results import Texts
from posttrain.data.sources import load
from posttrain.records import Message
from posttrain.settings import as_sources
from posttrain.stages.ppo import PpoStage

# Share of the rows that may be dropped before it is an error, equal to the default of an sft stage.
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
            prepared = prepare_texts(
                texts, chat, max_tokens=min(stage.ptx_max_tokens, context), allow_dropped=allow_dropped,
                evaluation_prompts=evaluation_prompts,
            )  # fmt: skip
        else:
            prepared = prepare_demonstrations(
                read_demonstrations(loaded, seed=seed), chat, max_tokens=stage.ptx_max_tokens, validation=0.0,
                allow_dropped=allow_dropped, evaluation_prompts=evaluation_prompts, context=context,
            )  # fmt: skip
        rows += prepared.train
        reports.append(prepared.report)
    report = {
        "rows": len(rows), "tokens": sum(len(r.ids) for r in rows), "trained_tokens": sum(sum(r.trained) for r in rows),
        "sources": [source for report in reports for source in report["sources"]],
        **{name: sum(report[name] for report in reports) for name in ("truncated", "contaminated")},
        "dropped": sum(sum(report["dropped"].values()) for report in reports),
        "warnings": [f"ptx_data: {warning}" for report in reports for warning in report["warnings"]],
    }  # fmt: skip
    return PreparedRows(rows, [], report)


def with_ptx(report: dict[str, Any], mix: dict[str, Any]) -> dict[str, Any]:
    """The report on the prompts of a stage, with the report on its pretraining mix added."""
    return {**report, "ptx": mix, "warnings": [*report["warnings"], *mix["warnings"]]}


def prepare_texts(
    read: Texts, chat: ChatFormat, *, max_tokens: int, allow_dropped: float, evaluation_prompts: Collection[str]
) -> PreparedRows:
    """Encode and cut plain texts. Raises DataError if too many are dropped or none is left."""
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
