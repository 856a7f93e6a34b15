"""The places of the rows in flight, and the one forward that a step needs: decoding rows first, joining prompts behind them.

A row stands on a shelf (`models/decoding.py`) by what it needs, a power of two of tokens. Rows that leave are replaced by rows
that join; where none does, the last rows of the shelf move into the gaps, so that the rows computed are always the first ones.
On a CPU, whose memory is taken where it is written, most rows share one shelf, the longest first.

T: tokens of the forward.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.generate.rows import Row
from posttrain.models.attention_cpu import pieces
from posttrain.models.batches import WORTH_SHARING
from posttrain.models.decoding import BLOCK, CacheStep, Filling, Reading, Shelf
from posttrain.models.lora import LoraAdapter
from posttrain.models.segments import Segments, Span

SMALLEST_SHELF = {"cpu": 1024, "cuda": BLOCK}
# Rows are sorted by length where blocks computed are more than those needed by this factor.
WORTH_SORTING = 1.15
# Rows computed are rounded up to these; beyond, to multiples of the last.
SIZES = (1, 2, 4, 8, 16, 24, 32, 40, 48, 56, 64, 80, 96, 112, 128)
# Rows that reach a block are rounded up to multiples of so many.
ROWS_STEP = 8
# A forward with prompts in it is rounded up to multiples of so many tokens.
ROUND_TO = 32


class Work(NamedTuple):
    """One forward: token ids and positions [T], the table for attention, runs of tokens with one adapter.

    `chosen` are the rows that get a token, and `source` the token that each of them is read at.
    """

    ids_T: Tensor
    positions_T: Tensor
    segments: Segments
    runs: list[tuple[int, LoraAdapter | None]]
    chosen: list[Row]
    source: list[int]


def rounded(rows: int) -> int:
    """How many rows are computed for so many."""
    return next((size for size in SIZES if size >= rows), -(-rows // SIZES[-1]) * SIZES[-1])


def capacity_for(need: int, kind: str) -> int:
    """Tokens of the shelf that a row with this need stands on, on a kind of device."""
    return max(SMALLEST_SHELF[kind], 1 << max(0, need - 1).bit_length())


def room_for(need: int, kind: str) -> int:
    """Tokens of memory that a row with this need takes."""
    return capacity_for(need, kind) if kind == "cuda" else -(-need // BLOCK) * BLOCK


class Places:
    """Who stands where: for each capacity its shelf and the rows on it, None for a gap."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.shelves: dict[int, tuple[Shelf, list[Row | None]]] = {}

    def rows(self) -> list[Row]:
        """Everybody in flight."""
        return [row for _, rows in self.shelves.values() for row in rows if row is not None]

    def put(self, joining: Sequence[Row], expected: Mapping[int, int], limit: int) -> None:
        """Give places to new rows, gaps first. Where a shelf must grow, it does so for the rows of its capacity that are
        `expected` as well, up to `limit`."""
        for row in joining:
            capacity = capacity_for(row.need, self.device.type)
            shelf, rows = self.shelves.setdefault(capacity, (Shelf(0, capacity, self.device), []))
            if None in rows:
                rows[rows.index(None)] = row
            else:
                rows.append(row)
            if len(rows) > shelf.places:
                shelf.grow(rounded(max(len(rows), min(limit, len(joining) + expected.get(capacity, 0)))))

    def leave(self, leaving: Sequence[Row]) -> None:
        """Take rows off their shelves; a shelf without rows is given up."""
        gone = {id(row) for row in leaving}
        for _, rows in self.shelves.values():
            rows[:] = [None if id(row) in gone else row for row in rows]
        self.shelves = {capacity: pair for capacity, pair in self.shelves.items() if any(pair[1])}

    def arrange(self) -> None:
        """Close the gaps of each shelf, by its last rows or, where it saves products, by sorting all of them."""
        for shelf, places in self.shelves.values():
            rows = [row for row in places if row is not None]
            if shelf.block < shelf.capacity and _spare(rows, shelf.block):
                order = sorted(rows, key=lambda row: -row.length)
            else:
                last = iter(reversed([row for row in places[len(rows) :] if row is not None]))
                order = [row if row is not None else next(last) for row in places[: len(rows)]]
            place_of = {id(row): place for place, row in enumerate(places)}
            # Of a row that has just joined nothing is there yet.
            moves = [(place_of[id(row)], place) for place, row in enumerate(order) if row.ids and place_of[id(row)] != place]
            if moves:
                shelf.move(*zip(*moves, strict=True), max(row.length for row in order))
            places[:] = order


def _spare(rows: Sequence[Row], block: int) -> bool:
    """Whether many more blocks would be computed than are needed, because a long row stands behind short ones."""
    needed = [row.length // block + 1 for row in rows]
    return sum(_reached(needed)) > WORTH_SORTING * sum(needed)


def _reached(blocks: Sequence[int]) -> list[int]:
    """For each block the rows up to the last one that sees it, by the number of blocks that each row sees."""
    reached = [0] * max(blocks)
    for place, count in enumerate(blocks):
        reached[:count] = [place + 1] * count
    return reached


def lay_out(places: Places, joining: Sequence[Sequence[Row]]) -> Work:
    """The forward in which all rows get a token; each of `joining` is a prompt and the rows that share it.

    What all prompts of an adapter begin with is computed once too.
    """
    new = {id(row) for group in joining for row in group}
    work = Work(torch.empty(0), torch.empty(0), Segments(()), [], [], [])
    ids: list[int] = []
    positions: list[int] = []
    readings = []
    for shelf, rows in places.shelves.values():
        decoding = [(place, row) for place, row in enumerate(rows) if row is not None and id(row) not in new]
        if not decoding:
            continue
        start, size = len(ids), min(rounded(decoding[-1][0] + 1), shelf.places)
        ids += [0] * size
        positions += [0] * size
        runs: list[tuple[int, LoraAdapter | None]] = [(1, decoding[0][1].adapter)] * size
        for place, row in decoding:
            ids[start + place], positions[start + place] = row.ids[-1], row.length
            runs[place] = (1, row.adapter)
            work.chosen.append(row)
            work.source.append(start + place)
        work.runs.extend(runs)
        readings.append(_reading(shelf, start, size, decoding, places.device))
    decoded = len(ids)
    spans: list[Span] = []
    span_of: dict[int, Span] = {}
    for groups in _by_adapter(joining):
        shared = _shared_beginning([group[0].prompt for group in groups])
        above: tuple[tuple[int, int], ...] = ()
        if shared:
            above = ((len(ids) - decoded, shared),)
            spans.append(Span(*above[0]))
            ids += groups[0][0].prompt[:shared]
            positions += range(shared)
        for group in groups:
            own = group[0].prompt[shared:]
            spans.append(Span(len(ids) - decoded, len(own), above))
            span_of |= {id(row): spans[-1] for row in group}
            ids += own
            positions += range(shared, shared + len(own))
            work.chosen.extend(group)
            work.source.extend([len(ids) - 1] * len(group))
        work.runs.append((len(ids) - sum(count for count, _ in work.runs), groups[0][0].adapter))
    if spans:
        spare = -len(ids) % ROUND_TO
        ids += [0] * spare
        positions += [0] * spare
        work.runs.append((spare, work.runs[-1][1]))
    step = CacheStep(decoded, tuple(readings), tuple(_fillings(places, span_of, decoded)))
    return work._replace(
        ids_T=torch.tensor(ids, device=places.device), positions_T=torch.tensor(positions, device=places.device),
        segments=Segments(tuple(spans), step=step), runs=_merged(work.runs),
    )  # fmt: skip


def _reading(shelf: Shelf, start: int, size: int, decoding: list[tuple[int, Row]], device: torch.device) -> Reading:
    lengths = [row.length for _, row in decoding]
    seen = min(-(-(max(lengths) + 1) // BLOCK) * BLOCK, shelf.capacity)
    blocks = [0] * (decoding[-1][0] + 1)
    for place, row in decoding:
        blocks[place] = row.length // shelf.block + 1
    # A place without a row sees its first key.
    reached = (size, *(min(size, -(-count // ROWS_STEP) * ROWS_STEP) for count in _reached(blocks)[1:]))
    place_N = torch.tensor([place for place, _ in decoding], device=device)
    return Reading(shelf, start, size, place_N, torch.tensor(lengths, device=device), place_N + start, seen, reached, {}, {})


def _by_adapter(joining: Sequence[Sequence[Row]]) -> list[list[Sequence[Row]]]:
    """Prompts of one adapter side by side."""
    found: dict[LoraAdapter | None, list[Sequence[Row]]] = {}
    for group in joining:
        found.setdefault(group[0].adapter, []).append(group)
    return list(found.values())


def _shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, a system prompt for instance; each keeps one of its own. 0 where not worth it."""
    limit = min(map(len, prompts)) - 1
    first = prompts[0]
    same = next((i for i in range(limit) if any(prompt[i] != first[i] for prompt in prompts)), limit)
    return same if len(prompts) > 1 and same >= WORTH_SHARING else 0


def _fillings(places: Places, span_of: Mapping[int, Span], decoded: int) -> list[Filling]:
    """Where the tokens of the prompts go, shelf by shelf."""
    fillings = []
    for shelf, rows in places.shelves.values():
        moves = [(place, span_of[id(row)]) for place, row in enumerate(rows) if id(row) in span_of]
        if moves:
            numbers = (
                torch.cat([torch.full((span.keys,), place) for place, span in moves]),
                torch.cat([torch.arange(span.keys) for _, span in moves]),
                torch.cat([torch.arange(a, a + n) + decoded for _, span in moves for a, n in pieces(span)]),
            )
            fillings.append(Filling(shelf, *(x.to(places.device) for x in numbers)))
    return fillings


def _merged(runs: list[tuple[int, LoraAdapter | None]]) -> list[tuple[int, LoraAdapter | None]]:
    """Neighbouring runs of one adapter as one."""
    found: list[tuple[int, LoraAdapter | None]] = []
    for count, adapter in runs:
        if found and found[-1][1] is adapter:
            found[-1] = (found[-1][0] + count, adapter)
        elif count:
            found.append((count, adapter))
    return found
