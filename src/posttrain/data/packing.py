"""Packing: rows become consecutive segments; a prompt that several completions share is computed once.

A packed batch has token ids and positions, a table of segments, and for every target the position that predicts it. Its length
is padded to a multiple of ROUND_TO, since a new shape costs more than padding.

T: packed tokens, N: targets.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

# Packed lengths are padded to multiples of this.
ROUND_TO = 64


class Segment(NamedTuple):
    """Token ids of a segment. `parent` is an earlier segment of the batch that it continues."""

    ids: tuple[int, ...]
    parent: int | None
    # For each token, whether it is a target.
    targets: tuple[bool, ...]
    row: int


class PackedBatch(NamedTuple):
    """The input of one forward. `row_N` is the caller's row of each target, `last_B` the last position of each row."""

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
    """Concatenate segments. The token before a target predicts it; it may be the parent's last."""
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
            # An empty completion ends at the end of its prompt.
            last[segment.row] = start + len(segment.ids) - 1 if segment.ids or before is None else before
        ids += segment.ids
        positions += range(first, first + len(segment.ids))
        for offset, is_target in enumerate(segment.targets):
            predictor = start + offset - 1 if offset else before
            if is_target and predictor is not None:
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
    """A prompt with completions below it; completion i is row first_row + i. `index` is the segment number of the prompt."""
    root = Segment(tuple(prompt), None, (False,) * len(prompt), -1)
    branches = [Segment(tuple(c), index, (True,) * len(c), first_row + i) for i, c in enumerate(completions)]
    return [root, *branches]


def forest_segments(trees: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]]) -> tuple[list[Segment], int]:
    """Prompts with their completions. The completions of all prompts are rows, numbered consecutively. Also returns their
    number."""
    segments: list[Segment] = []
    rows = 0
    for prompt, completions in trees:
        segments += tree_segments(prompt, completions, first_row=rows, index=len(segments))
        rows += len(completions)
    return segments, rows


def split_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Indices in order, cut into groups of at most `budget` tokens (a single longer row forms its own group)."""
    groups: list[list[int]] = []
    room = 0
    for index, length in enumerate(lengths):
        if not groups or length > room:
            groups.append([])
            room = budget
        groups[-1].append(index)
        room -= length
    return groups
