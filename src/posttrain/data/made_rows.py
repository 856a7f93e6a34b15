"""Write the rows that a stage makes: rows.jsonl in its folder. Later stages refer to it as `stage:NAME`."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from posttrain.artifacts import write_json, write_jsonl
from posttrain.data.sources import hashes_in, refuse_changed
from posttrain.errors import DataError
from posttrain.records import Message
from posttrain.stages import ROWS_FILE
from posttrain.stages.kind import Result


def write_made_rows(
    folder: Path, rows: Sequence[Mapping[str, Any]], report: dict[str, Any], *, planned: Mapping[str, str], where: str
) -> Result:
    """Write the rows into the folder of a stage, with the report on the data that they were made from.

    `planned` has the hashes of the data from the plan of the run. Raises DataError if there is no row or the data was changed.
    """
    refuse_changed(hashes_in(report), planned)
    if not rows:
        raise DataError(where, "no row was made", do="give other data, or change the stage's settings")
    write_jsonl(folder / ROWS_FILE, [dict(row) for row in rows])
    write_json(folder / "data_report.json", report)
    return Result({"items": len(rows)}, tuple(report["warnings"]))


def turns_of(messages: Sequence[Message]) -> list[dict[str, str]]:
    """Messages as JSON data."""
    return [{"role": message.role, "content": message.content} for message in messages]


def messages_of_row(row: Mapping[str, Any]) -> list[Message]:
    """The messages of the prompt of a row that `turns_of` wrote."""
    return [Message(turn["role"], turn["content"]) for turn in row["prompt"]]


def reasons_text(counts: Mapping[str, int]) -> str:
    """Counts by reason: "3 empty, 1 copied"."""
    return ", ".join(f"{count:,} {reason}" for reason, count in counts.items())
