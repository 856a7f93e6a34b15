"""The engine: requests in, tokens out, one forward a step. Rollouts, evaluation, chat and a server all generate here.

A step computes one token of every row in flight and, in the same forward, the prompts of rows that join (in one behind it
where rows that decode run as a program); a prompt of several completions is computed once. Rows leave in the step in which
they end, and any adapters and sampling settings stand side by side. What a row says does not depend on its company: its
randomness is its own (`generate/sampling.py`).

A prompt longer than a step takes is computed in pieces, so that it does not hold up the rows that decode. For a server, what
was computed is kept (`generate/prefix.py`), owners take turns (`generate/fair_queue.py`), and none has more than a share of the
places and of a step's rows while others want some.

A row that makes a step fail ends with its error, and no other notices (`generate/steps.py`).

Left out: paging of the cache. A row's room is set by its longest possible length.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence

import torch

from posttrain.errors import ModelError
from posttrain.generate.batch import Chunk, Places, next_chunks, room_for
from posttrain.generate.failures import by_halves
from posttrain.generate.fair_queue import FairQueue, PromptTime, share_of_places
from posttrain.generate.graph_decoding import SteadyDecoder
from posttrain.generate.prefix import PrefixCache
from posttrain.generate.requests import Event, Request, Row
from posttrain.generate.sampling import SamplingSettings as SamplingSettings  # callers need no other module
from posttrain.generate.sampling import check_settings
from posttrain.generate.steps import Steps
from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter
from posttrain.records import Rollout

# Rows in flight, by device; their logits (rows x vocabulary) are there at once.
ROWS = {"cpu": 128, "cuda": 256}
# Tokens of prompts in one forward.
PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}
# The same where people wait for the next token of the rows that decode.
SERVED_PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}
# Bytes of prompts that a server keeps.
PREFIX_BYTES = {"cpu": 512 * 2**20, "cuda": 8 * 2**30}
# Rows wait while the cache of those in flight would be larger; one row always runs.
CACHE_BYTES = {"cpu": 4 * 2**30, "cuda": 16 * 2**30}
# Whether steps without prompts have few fixed forms, which a GPU replays.
STEADY = {"cpu": False, "cuda": True}


class Engine:
    """Continuous batching over one base. Not for several threads at once; `generate/worker.py` has a face for a server."""

    def __init__(self, base: BaseModel, *, serving: bool = False) -> None:
        self.base = base
        kind = base.device.type
        self._rows_limit = ROWS[kind]
        self._prefill_limit = (SERVED_PREFILL_TOKENS if serving else PREFILL_TOKENS)[kind]
        self._cache_tokens = CACHE_BYTES[kind] // base.cache_bytes
        self._prefix_bytes = PREFIX_BYTES[kind] if serving else 0
        self._serving, self._count = serving, 0
        self.reset()

    def reset(self) -> None:
        """Forget all that waits, is in flight or is kept: at the start, and after a step that failed half way."""
        base = self.base
        steady = STEADY[base.device.type]
        self._places = Places(base.device, steady=steady, by_blocks=not steady and not base.attends_by_row)
        self._narrow = NarrowAdapters(base.dtype, base.device, serving=self._serving)
        self._steady = SteadyDecoder(base, self._narrow) if steady else None
        self._steps = Steps(base, self._places, self._narrow, self._steady)
        self.prefixes = PrefixCache(self._prefix_bytes)
        # Rows that share a prompt join together.
        self._waiting = FairQueue()
        self._prompts, self._decoding = PromptTime(), Counter[str]()
        # In flight, with a part of their prompt still to be computed.
        self._filling: list[list[Row]] = []
        self._done: list[Row] = []

    @property
    def live(self) -> bool:
        """Whether anything is left to tell."""
        return bool(self._waiting or self._done or self._places.shelves)

    @property
    def waiting(self) -> Counter[str]:
        """Completions that have not begun, by owner."""
        return self._waiting.counts

    @property
    def running(self) -> int:
        """Completions in flight."""
        return len(self._places.rows())

    def check(self, request: Request) -> LoraAdapter | None:
        """The adapter that a request names, None for the base. Raises ModelError or AdapterError where none can answer."""
        base, where, prompt = self.base, "generation", request.prompt
        vocabulary = base.vocabulary
        check_settings(request.settings, vocabulary)
        adapter = None if request.adapter == "base" else base.adapters.get(request.adapter)
        if request.completions < 1:
            raise ModelError(where, f"completions = {request.completions}", allowed="1 or more")
        if not prompt:
            raise ModelError(where, "an empty prompt", do="give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ModelError(where, "a prompt with ids out of the vocabulary", allowed=f"0 to {vocabulary - 1}")
        if len(prompt) + request.settings.max_new_tokens > base.context:
            raise ModelError(
                where, f"a prompt of {len(prompt)} tokens and {request.settings.max_new_tokens} new ones",
                allowed=f"together at most {base.context}", do="shorten the prompt or max_new_tokens",
            )  # fmt: skip
        return adapter

    def submit(self, request: Request) -> list[int]:
        """Take a request; returns the number of each completion, by which events name it. Raises as `check` does."""
        return self.take(request, self.check(request))

    def take(self, request: Request, adapter: LoraAdapter | None) -> list[int]:
        """Take a request that was checked before, with the adapter that it named then: the name may have gone since."""
        fingerprint = self._fingerprint(adapter)
        first = self._count
        self._count += request.completions
        rows = [Row(first + g, request, g, adapter, self.base.chat, fingerprint) for g in range(request.completions)]
        if rows[0].finish is not None:
            self._done += rows
        else:
            for g in range(0, len(rows), self._rows_limit):
                self._waiting.add(rows[g : g + self._rows_limit])
        return [row.number for row in rows]

    def _fingerprint(self, adapter: LoraAdapter | None) -> str | None:
        """What the weights of base and adapter are known by; None where they may change."""
        own = "" if adapter is None else None if adapter.training else adapter.fingerprint
        return None if own is None or self.base.weights_hash is None else f"{self.base.weights_hash} {own}"

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """End a completion, waiting or in flight; its last event comes with the next step. Others are not touched."""
        found = self._waiting.drop(number)
        if not found:
            found = [row for row in self._places.rows() if row.number == number]
            for row, shelf, place in self._places.of(found):
                if not row.ids:  # whether what is filled of it is finite is not known yet
                    self._places.wipe(row, shelf, place)
            self._leave(found)
        for row in found:
            row.finish = "cancelled"
        self._done += found

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token of every row, and the ends of those that are done."""
        began = time.perf_counter()
        self._decoding = self._owners()
        events, chunks = self._step()
        tokens = Counter[str]()
        for chunk in chunks:
            tokens[chunk.rows[0].request.owner] += chunk.length
        self._prompts.pay(time.perf_counter() - began, tokens, self._decoding)
        return events

    def _step(self) -> tuple[list[Event], list[Chunk]]:
        """The same, and the prompts that were computed."""
        events = self._ended()
        joining = self._admit()
        self._rest()
        self._places.arrange()
        self._begin(joining)
        chunks = next_chunks([group for group in self._filling if self._hurry(group)], self._prefill_limit)
        done = {id(chunk.rows) for chunk in chunks if chunk.last}
        self._filling = [group for group in self._filling if id(group) not in done]
        rows = [row for row in self._places.rows() if row.ids and not row.resting]
        forwards: list[list[Row | Chunk]] = [[*rows, *chunks]]
        # Where rows that decode run as recorded steps, prompts beside them would prevent it.
        if self.base.attends_by_row and self.base.programs.wants_decoding_alone:
            forwards = [[*rows], [*chunks]]
        for items in forwards:
            events += self._steps.run(items) if items else []
        owners = {row.number: row.request.owner for row in self._places.rows()}
        for event in events:
            if event.token is not None:
                self._waiting.charge(owners[event.row], 1)
        self._end([row for row in self._places.rows() if row.over])
        return events + self._ended(), chunks

    def _ended(self) -> list[Event]:
        """The last events of completions that ended without a token."""
        events = []
        for row in self._done:
            try:
                events.append(Event(row.number, None, 0.0, 0.0, None if row.error else row.rollout(), error=row.error))
            except Exception as error:  # noqa: BLE001 - a text that cannot be decoded is nobody else's
                events.append(Event(row.number, None, 0.0, 0.0, None, error=error))
        self._done = []
        return events

    def _end(self, rows: list[Row]) -> None:
        """Rows leave; what was computed of them may come again."""
        for row, shelf, place in self._places.of(rows):
            if row.error is not None or row.finish == "not finite":
                self._places.wipe(row, shelf, place)
            else:
                self.prefixes.keep(row, shelf, place)
        self._leave(rows)
        self._done += [row for row in rows if row.error is not None]

    def _leave(self, rows: Sequence[Row]) -> None:
        """Rows give up their places."""
        gone = {id(row) for row in rows}
        self._places.leave(rows)
        self._filling = [left for group in self._filling if (left := [row for row in group if id(row) not in gone])]

    def _admit(self) -> list[list[Row]]:
        """Take the prompts that join now off the queue and give their rows places."""
        if not self._waiting:
            return []
        rows, kind, limit = self._places.rows(), self.base.device.type, self._prefill_limit
        count, tokens = len(rows), sum(room_for(row.need, kind) for row in rows)
        rests = [len(group[0].prompt) - group[0].filled for group in self._filling if self._hurry(group)]
        in_pieces = any(rest > limit for rest in rests)
        prefill = sum(rest for rest in rests if rest <= limit) + (limit // 2 if in_pieces else 0)
        held = Counter(row.request.owner for row in rows)
        passed: set[str] = set()
        joining: list[list[Row]] = []
        while group := self._next_group(held, passed):
            owner, length = group[0].request.owner, len(group[0].prompt)
            # One prompt at a time is computed in pieces; other owners pass it, and those whose prompts held up others.
            if (length > limit and in_pieces) or not self._hurry(group):
                passed.add(owner)
                continue
            needed, now = sum(room_for(row.need, kind) for row in group), length if length <= limit else limit // 2
            full = count + len(group) > self._rows_limit or (count and tokens + needed > self._cache_tokens)
            if full or ((joining or rests) and prefill + now > limit):
                break
            self._waiting.take(group)
            self._waiting.charge(owner, length)
            joining.append(group)
            in_pieces |= length > limit
            held[owner] += len(group)
            count, tokens, prefill = count + len(group), tokens + needed, prefill + now
        if joining:
            by_halves(joining, self._join, self._stay)
        return [group for group in joining if group[0].error is None]

    def _join(self, groups: Sequence[list[Row]]) -> list[Event]:
        """Give places to rows. Raises where there is no memory for them, and they have none then."""
        rows = [row for group in groups for row in group]
        try:
            self._places.put(rows, self._waiting, self._rows_limit, self._cache_tokens)
        except BaseException:
            self._places.leave(rows)
            raise
        return []

    def _stay(self, group: list[Row], error: Exception) -> None:
        """There is no memory for these rows even if no others join."""
        for row in group:
            row.error = error
        self._done += group

    def _next_group(self, held: Counter[str], passed: set[str]) -> list[Row] | None:
        """The group whose turn it is, among the owners that have not been passed and do not `hold` too many places."""
        share = self._share(held.keys())
        return self._waiting.next(lambda owner: owner not in passed and held[owner] < share)

    def _share(self, holding: Iterable[str]) -> int:
        """How many places one owner may have, if these hold some."""
        owners = len({*holding, *self._waiting.owners})
        return share_of_places(self._rows_limit, owners) if self._serving and owners else self._rows_limit

    def _hurry(self, group: list[Row]) -> bool:
        """Whether a prompt is computed in this step, if there is room. Steps of a fixed form have none that wait half way."""
        return not self._serving or self._steady is not None or self._prompts.may(group[0].request.owner, self._decoding)

    def _rest(self) -> None:
        """Of an owner with more rows than its share, as nobody else wanted places before, the newest rest where rows cost."""
        rows = sorted(self._places.rows(), key=lambda row: row.number)
        share, counted = self._share(row.request.owner for row in rows), Counter[str]()
        for row in rows:
            counted[row.request.owner] += 1
            row.resting = self._steady is None and counted[row.request.owner] > share
        self._decoding = self._owners()

    def _owners(self) -> Counter[str]:
        """Whose rows get tokens, and how many."""
        return Counter(row.request.owner for row in self._places.rows() if row.ids and not row.resting)

    def _begin(self, joining: list[list[Row]]) -> None:
        """Copy what is known of their prompts to the places of rows that have joined."""
        for row, shelf, place in self._places.of(row for group in joining for row in group):
            row.filled = row.found = self.prefixes.fill(row, shelf, place)
        self._filling += joining


def generate(
    base: BaseModel, prompts: Sequence[Sequence[int]], settings: SamplingSettings | Sequence[SamplingSettings],
    adapter: str | Sequence[str], *, completions: int = 1, advance: Callable[[int, int], None] | None = None,
) -> list[Rollout]:  # fmt: skip
    """`completions` rollouts a prompt, in the order of the prompts. Settings and adapter are for all prompts or one each.

    `advance(rows, tokens)` is told what each step finished. Raises ModelError, before anything is computed, for a prompt that
    leaves no room in the context and for settings that cannot be. What one row fails with has a note that names the row.
    """
    engine = Engine(base)
    every_setting = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else settings
    every_adapter = [adapter] * len(prompts) if isinstance(adapter, str) else adapter
    asked = [
        Request(prompt, own, name, index * completions, completions)
        for index, (prompt, own, name) in enumerate(zip(prompts, every_setting, every_adapter, strict=True))
    ]
    # Policy by policy: what prompts of one begin with alike is computed once where they stand in one step.
    numbers = {request.first: engine.submit(request) for request in sorted(asked, key=lambda request: request.adapter)}
    rollouts: dict[int, Rollout] = {}
    while engine.live:
        events = engine.step()
        for event in events:
            if event.error is not None:
                request = next(request for request in asked if event.row in numbers[request.first])
                place, copy = request.first // completions + 1, numbers[request.first].index(event.row) + 1
                row = f'prompt {place} of {len(asked)}, under "{request.adapter}", completion {copy} of {completions}'
                event.error.add_note(row)
                raise event.error
        finished = {event.row: event.rollout for event in events if event.rollout is not None}
        rollouts |= finished
        broken = next((r.adapter for r in finished.values() if r.finish == "not finite"), None)
        if broken is not None:
            raise ModelError(
                "generation", f'"{broken}" gives numbers that are not finite', do="look at what it was trained with"
            )
        if advance is not None:
            advance(len(finished), sum(event.token is not None for event in events))
    return [rollouts[number] for request in asked for number in numbers[request.first]]


def stream(engine: Engine, prompt: Sequence[int], settings: SamplingSettings, adapter: str) -> Generator[int, None, None]:
    """Tokens of one answer as they come, without the end token, from an engine that answers nothing else meanwhile.

    Closing the iterator ends the answer; the engine can be used again. Raises ModelError or AdapterError as `submit` does.
    """
    (number,) = engine.submit(Request(prompt, settings, adapter))
    try:
        while True:
            for event in engine.step():
                if event.row != number:  # the end of an answer that nobody listens to any more
                    continue
                if event.error is not None:
                    raise event.error
                if event.token is not None and not (event.rollout is not None and event.rollout.ended):
                    yield event.token
                if event.rollout is not None:
                    return
    finally:
        engine.cancel(number)
