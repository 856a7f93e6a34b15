"""Rows in the layouts that the readers accept."""

import json
from pathlib import Path
from typing import Any

from posttrain.records import Message

USER, SAID = Message("user", "What is 2 + 2?"), Message("assistant", "4")

TURNS = [{"role": "user", "content": "What is 2 + 2?"}, {"role": "assistant", "content": "4"}]

SYSTEM = {"role": "system", "content": "Be brief."}


def write(folder: Path, rows: list[Any], name: str = "rows.jsonl") -> str:
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def answered(**more: Any) -> dict[str, Any]:
    """A prompt and an answer with further columns."""
    return {"prompt": "What is 2 + 2?", "completion": "4", **more}


def pair(**more: Any) -> dict[str, Any]:
    return {"prompt": "What is 2 + 2?", "chosen": "4", "rejected": "5", **more}
