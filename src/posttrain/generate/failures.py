"""Work on many rows at once that fails because of some of them: halves are tried, down to those that fail by themselves.

One bad item among n costs about 2 log2 n tries more, and only in the step in which it fails: it is not there in the next one.
"""

import logging
import traceback
from collections.abc import Callable, Sequence
from typing import TypeVar

T = TypeVar("T")
Found = TypeVar("Found")


def by_halves(
    items: Sequence[T], work: Callable[[Sequence[T]], Sequence[Found]], failed: Callable[[T, Exception], None]
) -> list[Found]:
    """What the work gives for these items, without those that it fails for even when they are alone; `failed` gets these.

    The work must leave nothing behind where it raises.
    """
    try:
        return list(work(items))
    except Exception as raised:  # noqa: BLE001 - whatever it is, it is told to whom it concerns
        error = raised
        release(error)
    if len(items) == 1:
        failed(items[0], error)
        return []
    middle = len(items) // 2
    return [*by_halves(items[:middle], work, failed), *by_halves(items[middle:], work, failed)]


def release(error: Exception) -> None:
    """Write down where something failed, and let go of the tensors in its frames: memory may be what was missing."""
    logging.getLogger(__name__).error("a step of the engine failed", exc_info=error)
    traceback.clear_frames(error.__traceback__)
