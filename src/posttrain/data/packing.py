"""Packing: rows become segments laid end to end; a prompt that several completions share is computed once.

A packed batch is a list of token ids and positions, a table of segments, and for every target the packed position that
predicts it. Its length is rounded up to one of a few shapes, since a new shape costs more than spare tokens.

T: packed tokens, N: targets.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Packed lengths are multiples of this; small batches use the small steps so that tests and short rows waste little.
ROUND_TO = 64


class Segment(NamedTuple):
    """Token ids to lay down; `parent` is an earlier segment of the same batch that this one continues."""

    ids: tuple[int, ...]
    parent: int | None
    # Of each token: whether predicting it is trained or scored.
    targets: tuple[bool, ...]
    row: int


class PackedBatch(NamedTuple):
    """What one forward takes. `row_N` says which row of the caller a target belongs to, `last_B` where each row ends."""

    ids: list[int]
    positions: list[int]
    spans: list[tuple[int, int, tuple[tuple[int, int], ...]]]
    source_N: list[int]
    target_N: list[int]
    row_N: list[int]
    last_B: list[int]
    rows: int
    tokens: int


def pack(segments: Sequence[Segment], rows: int, *, filler: int = 0) -> PackedBatch:
    """Lay segments end to end. A target's predictor is the token before it, which may be the parent's last."""
    ids: list[int] = []
    positions: list[int] = []
    spans: list[tuple[int, int, tuple[tuple[int, int], ...]]] = []
    source: list[int] = []
    target: list[int] = []
    row_of: list[int] = []
    last = [0] * rows
    for segment in segments:
        start = len(ids)
        ancestors: tuple[tuple[int, int], ...] = ()
        first = 0
        before: int | None = None
        if segment.parent is not None:
            parent_start, parent_length, above = spans[segment.parent]
            ancestors = (*above, (parent_start, parent_length))
            before = parent_start + parent_length - 1
            first = positions[before] + 1
        spans.append((start, len(segment.ids), ancestors))
        if segment.row >= 0:
            # An empty completion ends where its prompt does.
            last[segment.row] = start + len(segment.ids) - 1 if segment.ids or before is None else before
        ids += segment.ids
        positions += range(first, first + len(segment.ids))
        for offset, wanted in enumerate(segment.targets):
            predictor = start + offset - 1 if offset else before
            if wanted and predictor is not None:
                source.append(predictor)
                target.append(segment.ids[offset])
                row_of.append(segment.row)
    tokens = len(ids)
    spare = -tokens % ROUND_TO
    return PackedBatch(
        ids + [filler] * spare, positions + list(range(spare)), spans, source, target, row_of, last, rows, tokens
    )


def row_segments(ids: Sequence[int], trained: Sequence[bool], row: int) -> list[Segment]:
    """A conversation: one segment without a parent."""
    return [Segment(tuple(ids), None, tuple(trained), row)]


def tree_segments(prompt: Sequence[int], completions: Sequence[Sequence[int]], *, first_row: int, index: int) -> list[Segment]:
    """A prompt with completions below it; completion i is row first_row + i. `index` is the prompt's segment number."""
    root = Segment(tuple(prompt), None, (False,) * len(prompt), -1)
    below = [Segment(tuple(c), index, (True,) * len(c), first_row + i) for i, c in enumerate(completions)]
    return [root, *below]


def forest_segments(trees: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> tuple[list[Segment], int]:
    """Prompts with their completions; the completions of all prompts are rows, numbered through. Returns their number too."""
    segments: list[Segment] = []
    rows = 0
    for prompt, completions in trees:
        segments += tree_segments(prompt, completions, first_row=rows, index=len(segments))
        rows += len(completions)
    return segments, rows


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in order, cut into groups of at most `budget` tokens (a longer single row is a group of its own)."""
    groups: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= length
    return groups
