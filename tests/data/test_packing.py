"""Packing: rows laid end to end know their positions and what they attend to; a shared prompt changes no target."""

import random

import pytest

from posttrain.data.packing import ROUND_TO, PackedBatch, Segment, pack, row_segments, split_by_tokens, tree_segments


def attended(batch: PackedBatch, at: int) -> list[int]:
    """The ids that the token at a packed place sees, itself last: its ancestors' tokens, then its own segment's up to it."""
    for start, length, ancestors in batch.spans:
        if start <= at < start + length:
            above = [batch.ids[i] for begin, size in ancestors for i in range(begin, begin + size)]
            return above + batch.ids[start : at + 1]
    raise AssertionError("a place outside every segment")


def targets(batch: PackedBatch) -> list[tuple[int, tuple[int, ...], int, int]]:
    """Every target as (row, everything before it, its position, its id)."""
    return sorted(
        (row, tuple(attended(batch, source)), batch.positions[source], target)
        for source, target, row in zip(batch.source_N, batch.target_N, batch.row_N, strict=True)
    )


def naive(rows: list[tuple[list[int], list[bool]]]) -> list[tuple[int, tuple[int, ...], int, int]]:
    """The same from each row by itself: token i is predicted at i - 1 from all before it; the first by nothing."""
    return sorted(
        (row, tuple(ids[:i]), i - 1, ids[i])
        for row, (ids, trained) in enumerate(rows)
        for i in range(1, len(ids))
        if trained[i]
    )


def test_a_hand_worked_tree():
    batch = pack(tree_segments([5, 6, 7], [[8, 9], [10]], first_row=4, index=0), rows=6, filler=99)
    assert batch.ids[:6] == [5, 6, 7, 8, 9, 10]
    assert batch.positions[:6] == [0, 1, 2, 3, 4, 3]
    assert batch.spans == [(0, 3, ()), (3, 2, ((0, 3),)), (5, 1, ((0, 3),))]
    # 8 and 10 are both predicted by the prompt's last token, 9 by 8.
    assert list(zip(batch.source_N, batch.target_N, batch.row_N, strict=True)) == [(2, 8, 4), (3, 9, 4), (2, 10, 5)]
    assert (batch.tokens, batch.rows, len(batch.ids), set(batch.ids[6:])) == (6, 6, ROUND_TO, {99})


def test_a_segment_below_a_segment_below_a_prompt():
    segments = [
        Segment((1, 2), None, (False, False), 0),
        Segment((3,), 0, (True,), 0),
        Segment((4, 5), 1, (True, True), 0),
    ]
    batch = pack(segments, rows=1)
    assert batch.positions[:5] == [0, 1, 2, 3, 4]
    assert batch.spans[2] == (3, 2, ((0, 2), (2, 1)))
    assert targets(batch) == naive([([1, 2, 3, 4, 5], [False, False, True, True, True])])


@pytest.mark.parametrize("seed", range(20))
def test_flat_rows_have_the_targets_of_each_row_by_itself(seed: int):
    rng = random.Random(seed)
    rows = [
        ([rng.randrange(50) for _ in range(n)], [rng.random() < 0.5 for _ in range(n)])
        for n in (rng.randint(1, 30) for _ in range(rng.randint(1, 6)))
    ]
    batch = pack([s for row, (ids, trained) in enumerate(rows) for s in row_segments(ids, trained, row)], rows=len(rows))
    assert targets(batch) == naive(rows)
    assert batch.tokens == sum(len(ids) for ids, _ in rows)
    assert len(batch.ids) == len(batch.positions)
    assert len(batch.ids) % ROUND_TO == 0
    assert len(batch.ids) - batch.tokens < ROUND_TO


@pytest.mark.parametrize("seed", range(20))
def test_a_shared_prompt_has_the_targets_of_whole_rows(seed: int):
    rng = random.Random(seed)

    def some(n: int) -> list[int]:
        return [rng.randrange(50) for _ in range(n)]

    groups = [(some(rng.randint(1, 9)), [some(rng.randint(1, 9)) for _ in range(rng.randint(1, 4))]) for _ in range(3)]
    tree: list[Segment] = []
    flat: list[Segment] = []
    row = 0
    for prompt, completions in groups:
        tree += tree_segments(prompt, completions, first_row=row, index=len(tree))
        for completion in completions:
            flat += row_segments(prompt + completion, [False] * len(prompt) + [True] * len(completion), row)
            row += 1
    shared, whole = pack(tree, rows=row), pack(flat, rows=row)
    assert targets(shared) == targets(whole)
    assert shared.tokens == sum(len(p) + sum(map(len, c)) for p, c in groups)
    assert whole.tokens == sum(len(p) + len(c) for p, cs in groups for c in cs)


def test_groups_hold_every_row_once_in_order_and_within_the_budget():
    rng = random.Random(0)
    for _ in range(100):
        lengths = [rng.randint(1, 40) for _ in range(rng.randint(0, 30))]
        groups = split_by_tokens(lengths, 64)
        assert [i for group in groups for i in group] == list(range(len(lengths)))
        assert all(sum(lengths[i] for i in group) <= 64 for group in groups)
    assert split_by_tokens([10, 100, 10], 50) == [[0], [1], [2]]  # a longer row is a group of its own
    assert split_by_tokens([20, 30, 1], 50) == [[0, 1], [2]]
