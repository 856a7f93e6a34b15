"""Work on many prompts in parts whose results are saved, so that a stopped stage resumes at the next part.

A part's file is in the scratch folder of the stage. It has the bytes that an uninterrupted stage writes.
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from posttrain.artifacts import read_jsonl, write_jsonl
from posttrain.progress import Progress
from posttrain.train.checkpoint import CHECKPOINTS
from posttrain.train.stage import StageContext

T = TypeVar("T")
Row = dict[str, Any]


def in_parts(
    context: StageContext,
    items: Sequence[T],
    work: Callable[[Sequence[T], int], list[Row]],
    *,
    name: str,
    doing: str,
    size: int,
) -> list[Row]:
    """The rows of all parts, in order. `work` gets the items of a part and the part's number.

    Raises Interrupted between two parts after a request to stop; `doing` says what was stopped.
    """
    rows: list[Row] = []
    progress = Progress(name, len(items))
    for number, start in enumerate(range(0, len(items), size)):
        part = items[start : start + size]
        saved = context.folder / CHECKPOINTS / f"{name}-{number:05d}.jsonl"
        if saved.exists():
            rows += list(read_jsonl(saved))
        else:
            made = work(part, number)
            saved.parent.mkdir(exist_ok=True)
            write_jsonl(saved, made)
            rows += list(read_jsonl(saved))
        progress.update(len(part))
        context.stop.check(doing)
    return rows
