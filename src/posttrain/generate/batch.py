"""The places of running rows in the cache, and the layout of a step's forward pass: decoding rows first, then prompts.

A row has a place on a shelf (`models/cache.py`) whose capacity is the row's need rounded up to a power of two of tokens. New
rows fill the gaps of finished ones. Otherwise the last rows of the shelf move into the gaps, so the computed rows are always
the first places. A CPU allocates memory on the first write, so most rows share one shelf; the longest rows come first if
attention runs in blocks over all rows. With graph decoding (`generate/graph_decoding.py`), gaps remain until closing them
halves the computed rows.

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
# Rows are sorted by length if more blocks are computed than needed, by this factor.
WORTH_SORTING = 1.15
# The number of computed rows is rounded up to these sizes, then to multiples of the last one.
SIZES = (1, 2, 4, 8, 16, 32, 48, 64, 80, 96, 112, 128)
# The number of rows that read a block is rounded up to multiples of this.
ROWS_STEP = 8
# The minimum number of rows of a fixed-form step, if the shelf has so many places. Larger numbers are powers of two.
MIN_ROWS = 16
# The tokens of a forward with prompts are padded to a multiple of this.
ROUND_TO = 32


class StepBatch(NamedTuple):
    """The input of one forward: token ids and positions [T], the attention segments, and runs of tokens with one adapter.

    `chosen` are the rows that get a new token; `source` is the token of the forward that gives each of them its logits.
    `scored` are tokens whose next prompt token is scored: the row, the token of the forward, and the place in the prompt.
    """

    ids_T: Tensor
    positions_T: Tensor
    segments: Segments
    runs: list[tuple[int, LoraAdapter | None]]
    chosen: list[Row]
    source: list[int]
    scored: list[tuple[Row, int, int]]


class Chunk(NamedTuple):
    """The tokens [start, start + length) of the prompt that these rows share, computed in this step."""

    rows: Sequence[Row]
    start: int
    length: int

    @property
    def stop(self) -> int:
        """The first token after the chunk."""
        return self.start + self.length

    @property
    def last(self) -> bool:
        """Whether the chunk completes the prompt."""
        return self.stop == len(self.rows[0].prompt)

    @property
    def whole(self) -> bool:
        """Whether the chunk is the whole prompt."""
        return self.last and not self.start


def next_chunks(filling: Sequence[list[Row]], limit: int) -> list[Chunk]:
    """The chunks of these prompts for a step of at most `limit` prompt tokens: whole prompts in order. A prompt that is too
    long gets a part of the step, half of it if others wait."""
    chunks: list[Chunk] = []
    budget = limit
    for group in filling:
        rest = len(group[0].prompt) - group[0].filled
        if rest <= budget:
            count = rest
        elif chunks:
            continue
        else:
            count = budget if len(filling) == 1 else budget // 2
        chunks.append(Chunk(group, group[0].filled, count))
        budget -= count
    return chunks


def rounded(rows: int) -> int:
    """The number of computed rows for this number of rows."""
    return next((size for size in SIZES if size >= rows), -(-rows // SIZES[-1]) * SIZES[-1])


def fixed_form_rows(rows: int, shelf: Shelf) -> int:
    """The number of first places of a shelf that a fixed-form step computes for this number of rows."""
    return min(shelf.places, max(MIN_ROWS, 1 << (rows - 1).bit_length()))


def capacity_for(need: int, kind: str) -> int:
    """The capacity in tokens of the shelf for a row with this need, on a kind of device."""
    return max(SMALLEST_SHELF[kind], 1 << max(0, need - 1).bit_length())


def room_for(need: int, kind: str) -> int:
    """The memory of a row with this need, in tokens."""
    return capacity_for(need, kind) if kind == "cuda" else -(-need // BLOCK) * BLOCK


class Places:
    """The places of rows: for each capacity its shelf and the rows on it, None for a gap."""

    def __init__(self, device: torch.device, *, fixed_forms: bool, by_blocks: bool) -> None:
        """`fixed_forms` says that steps have fixed forms (graph decoding), `by_blocks` that attention runs over blocks of all
        rows."""
        self.device, self.fixed_forms, self.by_blocks = device, fixed_forms, by_blocks
        self.shelves: dict[int, tuple[Shelf, list[Row | None]]] = {}

    def rows(self) -> list[Row]:
        """All running rows."""
        return [row for _, rows in self.shelves.values() for row in rows if row is not None]

    def put(self, joining: Sequence[Row], waiting: Iterable[list[Row]], limit: int, tokens: int) -> None:
        """Give places to new rows, gaps first.

        If a shelf must grow, it also grows for the `waiting` rows of its capacity, up to `limit`. On a CPU, which allocates
        memory on the first write, it grows to `tokens` at once, so that it need not grow again.
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
                places = tokens // capacity
                if kind != "cpu":
                    places = len(joining) + sum(capacity_for(row.need, kind) == capacity for group in waiting for row in group)
                longest = max(row.cached for row in rows if row is not None)
                shelf.grow(rounded(max(len(rows), min(limit, places))), longest)
            shelf.used = max(shelf.used, len(rows))

    def of(self, rows: Iterable[Row]) -> list[tuple[Row, Shelf, int]]:
        """The shelf and place of each of these rows, in the order of the shelves."""
        row_ids = {id(row) for row in rows}
        return [
            (row, shelf, place)
            for shelf, rows_on_shelf in self.shelves.values()
            for place, row in enumerate(rows_on_shelf)
            if row is not None and id(row) in row_ids
        ]

    def wipe(self, row: Row, shelf: Shelf, place: int) -> None:
        """Zero the place of a row whose keys may not be finite, and all free places, which may hold old copies of it."""
        rows_on_shelf = next(rows for candidate, rows in self.shelves.values() if candidate is shelf)
        free = [
            candidate for candidate in range(shelf.used) if candidate >= len(rows_on_shelf) or rows_on_shelf[candidate] is None
        ]
        shelf.clear([place, *free], row.cached + 1)  # a failed step may have written one more

    def leave(self, leaving: Sequence[Row]) -> None:
        """Remove rows from their shelves. Shelves without rows are freed."""
        leaving_ids = {id(row) for row in leaving}
        for _, rows in self.shelves.values():
            rows[:] = [None if id(row) in leaving_ids else row for row in rows]
        self.shelves = {capacity: pair for capacity, pair in self.shelves.items() if any(pair[1])}

    def arrange(self) -> None:
        """Close the gaps of each shelf with its last rows or, if that saves work, by sorting all rows. Resting rows come
        last."""
        for shelf, places in self.shelves.values():
            rows = [row for row in places if row is not None and not row.resting]
            resting = [row for row in places if row is not None and row.resting]
            if self.fixed_forms:
                while places[-1] is None:
                    places.pop()
                if fixed_form_rows(len(rows), shelf) == fixed_form_rows(len(places), shelf):
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
    """These rows without gaps. Rows within the new length stay; the last rows fill the gaps."""
    staying = {id(row) for row in places[: len(rows)]}.intersection(map(id, rows))
    last = iter(reversed([row for row in rows if id(row) not in staying]))
    return [row if row is not None and id(row) in staying else next(last) for row in places[: len(rows)]]


def _spare(rows: Sequence[Row], block: int) -> bool:
    """Whether many more blocks would be computed than needed, because a long row follows short ones."""
    needed = [row.length // block + 1 for row in rows]
    return sum(_reached(needed)) > WORTH_SORTING * sum(needed)


def _reached(blocks: Sequence[int]) -> list[int]:
    """For each block, the number of rows up to the last one that reads it, given the number of blocks of each row."""
    reached = [0] * max(blocks)
    for place, count in enumerate(blocks):
        reached[:count] = [place + 1] * count
    return reached


def lay_out(places: Places, decoding: Iterable[Row], chunks: Sequence[Chunk]) -> StepBatch:
    """The forward of a step: one token of each `decoding` row, and these chunks of prompts.

    Whole prompts of an adapter share their common prefix, or those of neighbouring groups, if that computes fewer tokens.
    """
    layout, decoding_ids = _Layout(places), {id(row) for row in decoding}
    for shelf, rows in places.shelves.values():
        layout.decode(shelf, [(place, row) for place, row in enumerate(rows) if row is not None and id(row) in decoding_ids])
    layout.decoded = len(layout.ids)
    for by_adapter in _by_adapter(chunks):
        for group in _sharing(by_adapter):
            layout.fill(group)
    return layout.finish()


class _Layout:
    """Builds the forward of a step."""

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
        # For each row with a chunk: the chunk and its tokens in the forward.
        self.filled: dict[int, tuple[Chunk, list[int]]] = {}
        # Spans with cached tokens. These follow all tokens of the forward, so their position is set at the end.
        self.past_spans: list[tuple[int, Past]] = []

    def decode(self, shelf: Shelf, decoding: list[tuple[int, Row]]) -> None:
        """Add one token of each decoding row on a shelf."""
        if not decoding:
            return
        start, size = len(self.ids), min(rounded(decoding[-1][0] + 1), shelf.places)
        self.ids += [0] * size
        self.positions += [0] * size
        adapters = {row.adapter for _, row in decoding}
        # Places without a row extend the run of a single adapter, or use the base.
        runs: list[tuple[int, LoraAdapter | None]] = [(1, adapters.pop() if len(adapters) == 1 else None)] * size
        for place, row in decoding:
            self.ids[start + place], self.positions[start + place] = row.ids[-1], row.length
            runs[place] = (1, row.adapter)
            self.chosen.append(row)
            self.source.append(start + place)
        self.runs.extend(runs)
        self.readings.append(_reading(shelf, start, size, decoding, self.places.device))

    def fill(self, chunks: Sequence[Chunk]) -> None:
        """Add chunks of prompts with one adapter."""
        first_token, whole_chunks = len(self.ids), [chunk for chunk in chunks if chunk.whole]
        shared = _shared_prefix([chunk.rows[0].prompt for chunk in whole_chunks]) if whole_chunks else 0
        above: tuple[tuple[int, int], ...] = ()
        if shared:
            above = ((len(self.ids) - self.decoded, shared),)
            self.spans.append(Span(*above[0]))
            self.ids += whole_chunks[0].rows[0].prompt[:shared]
            self.positions += range(shared)
        for chunk in chunks:
            prefix_tokens = shared if chunk.whole else 0
            start, stop = chunk.start + prefix_tokens, chunk.stop
            if chunk.start:  # its cached tokens are read from the first of its rows
                ((_, shelf, place),) = self.places.of(chunk.rows[:1])
                self.past_spans.append((len(self.spans), Past(shelf, place, chunk.start)))
            first = len(self.ids)
            self.spans.append(Span(first - self.decoded, stop - start, above if chunk.whole else ()))
            self.ids += chunk.rows[0].prompt[start:stop]
            self.positions += range(start, stop)
            tokens = [*range(first_token, first_token + prefix_tokens), *range(first, len(self.ids))]
            self._after(chunk, tokens)
        self.runs.append((len(self.ids) - first_token, chunks[0].rows[0].adapter))

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

    def finish(self) -> StepBatch:
        """The forward, padded to a multiple of ROUND_TO tokens."""
        if self.spans:
            spare = -len(self.ids) % ROUND_TO
            self.ids += [0] * spare
            self.positions += [0] * spare
            self.runs.append((spare, self.runs[-1][1]))
        behind = len(self.ids) - self.decoded
        for index, past in self.past_spans:
            self.spans[index] = self.spans[index]._replace(ancestors=((behind, past.length),))
            behind += past.length
        device = self.places.device
        step = CacheStep(
            self.decoded, tuple(self.readings), tuple(self._fillings()), tuple(past for _, past in self.past_spans)
        )
        return StepBatch(
            torch.tensor(self.ids, device=device), torch.tensor(self.positions, device=device),
            Segments(tuple(self.spans), step=step), merged(self.runs), self.chosen, self.source, self.scored,
        )  # fmt: skip

    def _fillings(self) -> Iterator[Filling]:
        """Where the keys of the prompts are stored, by shelf."""
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
    keys = min(-(-(max(lengths) + 1) // BLOCK) * BLOCK, shelf.capacity)
    blocks = [0] * (decoding[-1][0] + 1)
    for place, row in decoding:
        blocks[place] = row.length // shelf.block + 1
    # A place without a row reads its first key.
    reached = (size, *(min(size, -(-count // ROWS_STEP) * ROWS_STEP) for count in _reached(blocks)[1:]))
    place_N = torch.tensor([place for place, _ in decoding], device=device)
    return Reading(shelf, start, size, place_N, torch.tensor(lengths, device=device), place_N + start, keys, reached, {})


def _by_adapter(chunks: Sequence[Chunk]) -> list[list[Chunk]]:
    """Group chunks by adapter."""
    by_adapter: dict[LoraAdapter | None, list[Chunk]] = {}
    for chunk in chunks:
        by_adapter.setdefault(chunk.rows[0].adapter, []).append(chunk)
    return list(by_adapter.values())


def _sharing(chunks: list[Chunk]) -> list[list[Chunk]]:
    """One group, or neighbouring prompts that begin alike in groups of their own, whichever computes fewer tokens."""
    groups: list[list[Chunk]] = [[chunk] for chunk in chunks if not chunk.whole]
    whole = [chunk for chunk in chunks if chunk.whole]
    for number, chunk in enumerate(whole):
        prompt, first = chunk.rows[0].prompt, groups[-1][0].rows[0].prompt if number else ()
        if number and 2 * _shared_prefix([first, prompt]) >= max(len(first), len(prompt)):
            groups[-1].append(chunk)
        else:
            groups.append([chunk])
    return groups if sum(map(_computed, groups)) < _computed(chunks) else [chunks]


def _computed(chunks: Sequence[Chunk]) -> int:
    """Tokens that a group of chunks computes."""
    whole = [chunk for chunk in chunks if chunk.whole]
    shared = _shared_prefix([chunk.rows[0].prompt for chunk in whole]) if whole else 0
    return shared + sum(chunk.stop - chunk.start - (shared if chunk.whole else 0) for chunk in chunks)


def _shared_prefix(prompts: Sequence[Sequence[int]]) -> int:
    """The length of the common prefix of all prompts, at most all but one token of each. 0 if sharing it saves too little."""
    limit = min(map(len, prompts)) - 1
    first = prompts[0]
    shared = next((i for i in range(limit) if any(prompt[i] != first[i] for prompt in prompts)), limit)
    return shared if len(prompts) > 1 and shared >= WORTH_SHARING else 0


def merged(runs: list[tuple[int, LoraAdapter | None]]) -> list[tuple[int, LoraAdapter | None]]:
    """Merge adjacent runs of the same adapter."""
    merged_runs: list[tuple[int, LoraAdapter | None]] = []
    for count, adapter in runs:
        if merged_runs and merged_runs[-1][1] is adapter:
            merged_runs[-1] = (merged_runs[-1][0] + count, adapter)
        elif count:
            merged_runs.append((count, adapter))
    return merged_runs
