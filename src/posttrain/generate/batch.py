"""The places of the rows in flight, and the one forward that a step needs: decoding rows first, prompts behind them.

A row stands on a shelf (`models/cache.py`) by what it needs, a power of two of tokens. Rows that leave are replaced by rows
that join; where none does, the last rows of the shelf move into the gaps, so that the rows computed are always the first ones.
On a CPU, whose memory is taken where it is written, most rows share one shelf, the longest first where attention computes by
blocks of all rows. With graph decoding (`generate/graph_decoding.py`), gaps stay until closing them halves the rows computed.

T: tokens of the forward.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.generate.requests import Row
from posttrain.models.batches import WORTH_SHARING
from posttrain.models.cache import BLOCK, CacheStep, Filling, Past, Reading, Shelf
from posttrain.models.lora import LoraAdapter
from posttrain.models.segments import Segments, Span

SMALLEST_SHELF = {"cpu": 1024, "cuda": BLOCK}
# Rows are sorted by length where blocks computed are more than those needed by this factor.
WORTH_SORTING = 1.15
# Rows computed are rounded up to these; beyond, to multiples of the last.
SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128)
# Rows that reach a block are rounded up to multiples of so many.
ROWS_STEP = 8
# Of a steady step's rows there are powers of two, and no fewer than these where the shelf has them.
LEAST_ROWS = 16
# A forward with prompts in it is rounded up to multiples of so many tokens.
ROUND_TO = 32


class Work(NamedTuple):
    """One forward: token ids and positions [T], the table for attention, runs of tokens with one adapter.

    `chosen` are the rows that get a token, and `source` the token that each of them is read at. `scored` are tokens at which
    the prompt's own next token is looked up: the row, the token of the forward, and the place in the prompt.
    """

    ids_T: Tensor
    positions_T: Tensor
    segments: Segments
    runs: list[tuple[int, LoraAdapter | None]]
    chosen: list[Row]
    source: list[int]
    scored: list[tuple[Row, int, int]]


class Chunk(NamedTuple):
    """Tokens [start, start + length) of the prompt of these rows, which share it: what is computed of it now."""

    rows: Sequence[Row]
    start: int
    length: int

    @property
    def stop(self) -> int:
        """The first token that is left for later."""
        return self.start + self.length

    @property
    def last(self) -> bool:
        """Whether the prompt is filled after it."""
        return self.stop == len(self.rows[0].prompt)

    @property
    def whole(self) -> bool:
        """Whether it is all of the prompt."""
        return self.last and not self.start


def next_chunks(filling: Sequence[list[Row]], limit: int) -> list[Chunk]:
    """What is computed of these prompts in a step of at most so many tokens of them: whole ones, in order; of one that is too
    long a piece, which is half of the step where others wait."""
    chunks: list[Chunk] = []
    left = limit
    for group in filling:
        rest = len(group[0].prompt) - group[0].filled
        if rest <= left:
            count = rest
        elif chunks:
            continue
        else:
            count = left if len(filling) == 1 else left // 2
        chunks.append(Chunk(group, group[0].filled, count))
        left -= count
    return chunks


def rounded(rows: int) -> int:
    """How many rows are computed for so many."""
    return next((size for size in SIZES if size >= rows), -(-rows // SIZES[-1]) * SIZES[-1])


def steady_rows(rows: int, shelf: Shelf) -> int:
    """How many of a shelf's first places a steady step computes for so many."""
    return min(shelf.places, max(LEAST_ROWS, 1 << (rows - 1).bit_length()))


def capacity_for(need: int, kind: str) -> int:
    """Tokens of the shelf that a row with this need stands on, on a kind of device."""
    return max(SMALLEST_SHELF[kind], 1 << max(0, need - 1).bit_length())


def room_for(need: int, kind: str) -> int:
    """Tokens of memory that a row with this need takes."""
    return capacity_for(need, kind) if kind == "cuda" else -(-need // BLOCK) * BLOCK


class Places:
    """Who stands where: for each capacity its shelf and the rows on it, None for a gap."""

    def __init__(self, device: torch.device, *, steady: bool, by_blocks: bool) -> None:
        """`by_blocks`: attention computes the blocks of all rows up to the last one that reaches them."""
        self.device, self.steady, self.by_blocks = device, steady, by_blocks
        self.shelves: dict[int, tuple[Shelf, list[Row | None]]] = {}

    def rows(self) -> list[Row]:
        """Everybody in flight."""
        return [row for _, rows in self.shelves.values() for row in rows if row is not None]

    def put(self, joining: Sequence[Row], waiting: Iterable[list[Row]], limit: int, tokens: int) -> None:
        """Give places to new rows, gaps first.

        Where a shelf must grow, it does so for the rows `waiting` for one of its capacity as well, up to `limit`; on a CPU,
        whose memory is taken only where it is written, for as many as `tokens` of them give room to, so that it need not again.
        """
        kind = self.device.type
        for row in joining:
            capacity = capacity_for(row.need, kind)
            shelf, rows = self.shelves.setdefault(capacity, (Shelf(0, capacity, self.device), []))
            if None in rows:
                rows[rows.index(None)] = row
            else:
                rows.append(row)
            if len(rows) > shelf.places:
                wanted = tokens // capacity
                if kind != "cpu":
                    wanted = len(joining) + sum(capacity_for(row.need, kind) == capacity for group in waiting for row in group)
                longest = max(row.cached for row in rows if row is not None)
                shelf.grow(rounded(max(len(rows), min(limit, wanted))), longest)
            shelf.used = max(shelf.used, len(rows))

    def of(self, rows: Iterable[Row]) -> list[tuple[Row, Shelf, int]]:
        """Shelf and place of each of these rows, in the order of the shelves."""
        wanted = {id(row) for row in rows}
        return [
            (row, shelf, place)
            for shelf, there in self.shelves.values()
            for place, row in enumerate(there)
            if row is not None and id(row) in wanted
        ]

    def wipe(self, row: Row, shelf: Shelf, place: int) -> None:
        """Zeros where a row stands whose keys may not be finite, and in free places: copies lie where it was moved from."""
        there = next(rows for other, rows in self.shelves.values() if other is shelf)
        free = [other for other in range(shelf.used) if other >= len(there) or there[other] is None]
        shelf.clear([place, *free], row.cached + 1)  # a step that failed may have written one more

    def leave(self, leaving: Sequence[Row]) -> None:
        """Take rows off their shelves; a shelf without rows is given up."""
        gone = {id(row) for row in leaving}
        for _, rows in self.shelves.values():
            rows[:] = [None if id(row) in gone else row for row in rows]
        self.shelves = {capacity: pair for capacity, pair in self.shelves.items() if any(pair[1])}

    def arrange(self) -> None:
        """Close the gaps of each shelf, by its last rows or, where it saves products, by sorting all of them. Rows that rest
        stand behind the others."""
        for shelf, places in self.shelves.values():
            rows = [row for row in places if row is not None and not row.resting]
            resting = [row for row in places if row is not None and row.resting]
            if self.steady:
                while places[-1] is None:
                    places.pop()
                if steady_rows(len(rows), shelf) == steady_rows(len(places), shelf):
                    continue
            if self.by_blocks and rows and shelf.block < shelf.capacity and _spare(rows, shelf.block):
                order = sorted(rows, key=lambda row: -row.length)
            else:
                order = _closed(places, rows)
            order += _closed(places[len(order) :], resting)
            place_of = {id(row): place for place, row in enumerate(places)}
            moves = [(place_of[id(row)], place) for place, row in enumerate(order) if row.cached and place_of[id(row)] != place]
            if moves:
                sources, targets = zip(*moves, strict=True)
                shelf.move(sources, targets, max(row.cached for row in order))
            places[:] = order


def _closed(places: Sequence[Row | None], rows: Sequence[Row]) -> list[Row]:
    """These rows without gaps: who stands far enough in front stays, the last ones stand where others do not."""
    kept = {id(row) for row in places[: len(rows)]}.intersection(map(id, rows))
    last = iter(reversed([row for row in rows if id(row) not in kept]))
    return [row if row is not None and id(row) in kept else next(last) for row in places[: len(rows)]]


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


def lay_out(places: Places, decoding: Iterable[Row], chunks: Sequence[Chunk]) -> Work:
    """The forward of a step: a token of each row that is `decoding`, and these pieces of prompts.

    What all whole prompts of an adapter begin with is computed once.
    """
    work, wanted = _Layout(places), {id(row) for row in decoding}
    for shelf, rows in places.shelves.values():
        work.decode(shelf, [(place, row) for place, row in enumerate(rows) if row is not None and id(row) in wanted])
    work.decoded = len(work.ids)
    for group in _by_adapter(chunks):
        work.fill(group)
    return work.finish()


class _Layout:
    """A forward as it grows."""

    def __init__(self, places: Places) -> None:
        self.places, self.decoded = places, 0
        self.ids: list[int] = []
        self.positions: list[int] = []
        self.runs: list[tuple[int, LoraAdapter | None]] = []
        self.chosen: list[Row] = []
        self.source: list[int] = []
        self.scored: list[tuple[Row, int, int]] = []
        self.readings: list[Reading] = []
        self.spans: list[Span] = []
        # For each row that is filled: its chunk and the packed tokens of it.
        self.filled: dict[int, tuple[Chunk, list[int]]] = {}
        # Spans with a past: it stands behind all tokens, and their number is not known before the end.
        self.late: list[tuple[int, Past]] = []

    def decode(self, shelf: Shelf, decoding: list[tuple[int, Row]]) -> None:
        """One token of each row on a shelf."""
        if not decoding:
            return
        start, size = len(self.ids), min(rounded(decoding[-1][0] + 1), shelf.places)
        self.ids += [0] * size
        self.positions += [0] * size
        adapters = {row.adapter for _, row in decoding}
        # Places without a row stretch the one run of the rows, or take the base.
        runs: list[tuple[int, LoraAdapter | None]] = [(1, adapters.pop() if len(adapters) == 1 else None)] * size
        for place, row in decoding:
            self.ids[start + place], self.positions[start + place] = row.ids[-1], row.length
            runs[place] = (1, row.adapter)
            self.chosen.append(row)
            self.source.append(start + place)
        self.runs.extend(runs)
        self.readings.append(_reading(shelf, start, size, decoding, self.places.device))

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Pieces of prompts with one adapter."""
        before, whole = len(self.ids), [chunk for chunk in chunks if chunk.whole]
        shared = _shared_beginning([chunk.rows[0].prompt for chunk in whole]) if whole else 0
        above: tuple[tuple[int, int], ...] = ()
        if shared:
            above = ((len(self.ids) - self.decoded, shared),)
            self.spans.append(Span(*above[0]))
            self.ids += whole[0].rows[0].prompt[:shared]
            self.positions += range(shared)
        for chunk in chunks:
            skipped = shared if chunk.whole else 0
            start, stop = chunk.start + skipped, chunk.stop
            if chunk.start:  # what is cached of it is read at the first of its rows
                ((_, shelf, place),) = self.places.of(chunk.rows[:1])
                self.late.append((len(self.spans), Past(shelf, place, chunk.start)))
            first = len(self.ids)
            self.spans.append(Span(first - self.decoded, stop - start, above if chunk.whole else ()))
            self.ids += chunk.rows[0].prompt[start:stop]
            self.positions += range(start, stop)
            tokens = [*range(before, before + skipped), *range(first, len(self.ids))]
            self._after(chunk, tokens)
        self.runs.append((len(self.ids) - before, chunks[0].rows[0].adapter))

    def _after(self, chunk: Chunk, tokens: list[int]) -> None:
        for row in chunk.rows:
            self.filled[id(row)] = (chunk, tokens)
            if row.request.prompt_logprobs:
                scored = zip(tokens, range(chunk.start, len(row.prompt) - 1), strict=False)
                self.scored.extend((row, token, place) for token, place in scored)
        if chunk.last:
            answering = [row for row in chunk.rows if row.settings.max_new_tokens]
            self.chosen.extend(answering)
            self.source.extend([tokens[-1]] * len(answering))

    def finish(self) -> Work:
        """The forward, rounded up to a size that comes often."""
        if self.spans:
            spare = -len(self.ids) % ROUND_TO
            self.ids += [0] * spare
            self.positions += [0] * spare
            self.runs.append((spare, self.runs[-1][1]))
        behind = len(self.ids) - self.decoded
        for index, past in self.late:
            self.spans[index] = self.spans[index]._replace(ancestors=((behind, past.length),))
            behind += past.length
        device = self.places.device
        step = CacheStep(self.decoded, tuple(self.readings), tuple(self._fillings()), tuple(past for _, past in self.late))
        return Work(
            torch.tensor(self.ids, device=device), torch.tensor(self.positions, device=device),
            Segments(tuple(self.spans), step=step), merged(self.runs), self.chosen, self.source, self.scored,
        )  # fmt: skip

    def _fillings(self) -> Iterator[Filling]:
        """Where the tokens of the prompts go, shelf by shelf."""
        device = self.places.device
        for shelf, rows in self.places.shelves.values():
            moves = [(place, *self.filled[id(row)]) for place, row in enumerate(rows) if id(row) in self.filled]
            if moves:
                yield Filling(
                    shelf,
                    torch.cat([torch.full((chunk.length,), place) for place, chunk, _ in moves]).to(device),
                    torch.cat([torch.arange(chunk.start, chunk.stop) for _, chunk, _ in moves]).to(device),
                    torch.tensor([token for _, _, tokens in moves for token in tokens], device=device),
                )


def _reading(shelf: Shelf, start: int, size: int, decoding: list[tuple[int, Row]], device: torch.device) -> Reading:
    lengths = [row.length for _, row in decoding]
    seen = min(-(-(max(lengths) + 1) // BLOCK) * BLOCK, shelf.capacity)
    blocks = [0] * (decoding[-1][0] + 1)
    for place, row in decoding:
        blocks[place] = row.length // shelf.block + 1
    # A place without a row sees its first key.
    reached = (size, *(min(size, -(-count // ROWS_STEP) * ROWS_STEP) for count in _reached(blocks)[1:]))
    place_N = torch.tensor([place for place, _ in decoding], device=device)
    return Reading(shelf, start, size, place_N, torch.tensor(lengths, device=device), place_N + start, seen, reached, {})


def _by_adapter(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Prompts of one adapter side by side."""
    found: dict[LoraAdapter | None, list[Chunk]] = {}
    for chunk in chunks:
        found.setdefault(chunk.rows[0].adapter, []).append(chunk)
    return list(found.values())


def _shared_beginning(prompts: Sequence[Sequence[int]]) -> int:
    """How many tokens all prompts begin with, a system prompt for instance; each keeps one of its own. 0 where not worth it."""
    limit = min(map(len, prompts)) - 1
    first = prompts[0]
    same = next((i for i in range(limit) if any(prompt[i] != first[i] for prompt in prompts)), limit)
    return same if len(prompts) > 1 and same >= WORTH_SHARING else 0


def merged(runs: list[tuple[int, LoraAdapter | None]]) -> list[tuple[int, LoraAdapter | None]]:
    """Neighbouring runs of one adapter as one."""
    found: list[tuple[int, LoraAdapter | None]] = []
    for count, adapter in runs:
        if found and found[-1][1] is adapter:
            found[-1] = (found[-1][0] + count, adapter)
        elif count:
            found.append((count, adapter))
    return found
