"""The engine: continuous batching with one forward per step. Rollouts, evaluation, chat and the server all use it.

A step computes one token of every running row and, in the same forward, the prompts of new rows (in a second forward if
decoding is recorded and replayed). A prompt with several completions is computed once. Rows leave in the step in which they
end. Rows with different adapters and sampling settings share a batch. The output of a row does not depend on the other rows,
because each row has its own random numbers (`generate/sampling.py`).

A prompt that exceeds the limit of a step is computed in chunks, so that it does not delay the decoding rows. For a server, keys
and values are cached (`generate/prefix.py`), owners take turns (`generate/fair_queue.py`), and no owner has more than a share
of the places and of a step's rows while others wait.

A row that makes a step fail ends with its error; other rows are not affected (`generate/steps.py`).

Not included: paging of the cache. A row reserves memory for its maximum length.
"""

import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence

import torch

from posttrain.errors import ModelError
from posttrain.generate.batch import Chunk, Places, next_chunks, room_for
from posttrain.generate.failures import by_halves
from posttrain.generate.fair_queue import FairQueue, PromptDebts, share_of_places
from posttrain.generate.graph_decoding import FixedFormDecoder
from posttrain.generate.prefix import PrefixCache
from posttrain.generate.requests import Event, Request, Row
from posttrain.generate.sampling import SamplingSettings as SamplingSettings  # re-exported for callers
from posttrain.generate.sampling import check_settings
from posttrain.generate.steps import Steps
from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter
from posttrain.records import Rollout

# Maximum number of running rows by device. All their logits (rows x vocabulary) are in memory at once.
ROWS = {"cpu": 128, "cuda": 256}
# Tokens of prompts in one forward.
PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}
# The same for a server, where clients wait for the next tokens.
SERVED_PREFILL_TOKENS = {"cpu": 512, "cuda": 4096}
# Bytes of a server's prefix cache.
PREFIX_BYTES = {"cpu": 512 * 2**20, "cuda": 8 * 2**30}
# Rows wait if the cache of running rows would exceed this; one row always runs.
CACHE_BYTES = {"cpu": 4 * 2**30, "cuda": 16 * 2**30}
# Whether steps without prompts use a few fixed forms, which CUDA graphs replay.
FIXED_FORMS = {"cpu": False, "cuda": True}


class Engine:
    """Continuous batching over one base. Not thread-safe; `generate/worker.py` wraps it for a server."""

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
        """Drop all waiting and running rows and the prefix cache: at the start, and after a failed step."""
        base = self.base
        fixed_forms = FIXED_FORMS[base.device.type]
        self._places = Places(base.device, fixed_forms=fixed_forms, by_blocks=not fixed_forms and not base.attends_by_row)
        self._adapters = NarrowAdapters(base.dtype, base.device, serving=self._serving)
        self._decoder = FixedFormDecoder(base, self._adapters) if fixed_forms else None
        self._steps = Steps(base, self._places, self._adapters, self._decoder)
        self.prefixes = PrefixCache(self._prefix_bytes)
        # Rows that share a prompt start together.
        self._waiting = FairQueue()
        self._prompts, self._decoding = PromptDebts(), Counter[str]()
        # Running rows whose prompt is not complete, in groups that share a prompt.
        self._filling: list[list[Row]] = []
        self._finished: list[Row] = []

    @property
    def live(self) -> bool:
        """Whether any completion is waiting, running or has events to return."""
        return bool(self._waiting or self._finished or self._places.shelves)

    @property
    def waiting(self) -> Counter[str]:
        """Completions that have not started, by owner."""
        return self._waiting.counts

    @property
    def running(self) -> int:
        """The number of running completions."""
        return len(self._places.rows())

    def check(self, request: Request) -> LoraAdapter | None:
        """The adapter of a request, None for the base. Raises ModelError or AdapterError if the request is invalid."""
        base, where, prompt = self.base, "generation", request.prompt
        vocabulary = base.vocabulary
        check_settings(request.settings, vocabulary)
        adapter = None if request.adapter == "base" else base.adapters.get(request.adapter)
        if request.completions < 1:
            raise ModelError(where, f"completions = {request.completions}", allowed="1 or more")
        if not prompt:
            raise ModelError(where, "an empty prompt", do="give at least one token")
        if not 0 <= min(prompt) <= max(prompt) < vocabulary:
            raise ModelError(where, "token ids outside the vocabulary", allowed=f"0 to {vocabulary - 1}")
        if len(prompt) + request.settings.max_new_tokens > base.context:
            raise ModelError(
                where, f"a prompt of {len(prompt)} tokens and {request.settings.max_new_tokens} new ones",
                allowed=f"together at most {base.context}", do="shorten the prompt or max_new_tokens",
            )  # fmt: skip
        return adapter

    def submit(self, request: Request) -> list[int]:
        """Add a request. Returns the number of each completion, which its events carry. Raises as `check` does."""
        return self.take(request, self.check(request))

    def take(self, request: Request, adapter: LoraAdapter | None) -> list[int]:
        """Add a request that `check` has accepted, with the adapter it returned: the name may have been reassigned since."""
        fingerprint = self._fingerprint(adapter)
        first = self._count
        self._count += request.completions
        rows = [Row(first + g, request, g, adapter, self.base.chat, fingerprint) for g in range(request.completions)]
        if rows[0].finish is not None:
            self._finished += rows
        else:
            for g in range(0, len(rows), self._rows_limit):
                self._waiting.add(rows[g : g + self._rows_limit])
        return [row.number for row in rows]

    def _fingerprint(self, adapter: LoraAdapter | None) -> str | None:
        """The hash of the weights of base and adapter, or None if they may change."""
        adapter_hash = "" if adapter is None else None if adapter.training else adapter.fingerprint
        return None if adapter_hash is None or self.base.weights_hash is None else f"{self.base.weights_hash} {adapter_hash}"

    @torch.inference_mode()
    def cancel(self, number: int) -> None:
        """Cancel a waiting or running completion. Its last event comes with the next step. Others are not affected."""
        rows = self._waiting.drop(number)
        if not rows:
            rows = [row for row in self._places.rows() if row.number == number]
            for row, shelf, place in self._places.of(rows):
                if not row.ids:  # its cached keys were not checked to be finite yet
                    self._places.wipe(row, shelf, place)
            self._leave(rows)
        for row in rows:
            row.finish = "cancelled"
        self._finished += rows

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """Compute one token of every running row. Returns the events."""
        began = time.perf_counter()
        self._decoding = self._owners()
        events, chunks = self._step()
        tokens = Counter[str]()
        for chunk in chunks:
            tokens[chunk.rows[0].request.owner] += chunk.length
        self._prompts.pay(time.perf_counter() - began, tokens, self._decoding)
        return events

    def _step(self) -> tuple[list[Event], list[Chunk]]:
        """Run one step. Also returns the computed chunks of prompts."""
        events = self._take_last_events()
        joining = self._admit()
        self._set_resting()
        self._places.arrange()
        self._begin(joining)
        chunks = next_chunks([group for group in self._filling if self._may_prefill(group)], self._prefill_limit)
        completed = {id(chunk.rows) for chunk in chunks if chunk.last}
        self._filling = [group for group in self._filling if id(group) not in completed]
        rows = [row for row in self._places.rows() if row.ids and not row.resting]
        forwards: list[list[Row | Chunk]] = [[*rows, *chunks]]
        # Decoding steps that are recorded run without prompts.
        if self.base.attends_by_row and self.base.programs.wants_decoding_alone:
            forwards = [[*rows], [*chunks]]
        for rows_and_chunks in forwards:
            events += self._steps.run(rows_and_chunks) if rows_and_chunks else []
        owners = {row.number: row.request.owner for row in self._places.rows()}
        for event in events:
            if event.token is not None:
                self._waiting.charge(owners[event.row], 1)
        self._end([row for row in self._places.rows() if row.over])
        return events + self._take_last_events(), chunks

    def _take_last_events(self) -> list[Event]:
        """The last events of completions that ended without a new token."""
        events = []
        for row in self._finished:
            try:
                events.append(Event(row.number, None, 0.0, 0.0, None if row.error else row.rollout(), error=row.error))
            except Exception as error:  # noqa: BLE001 - a decoding error affects only this row
                events.append(Event(row.number, None, 0.0, 0.0, None, error=error))
        self._finished = []
        return events

    def _end(self, rows: list[Row]) -> None:
        """Remove finished rows, and cache their keys and values for later prompts."""
        for row, shelf, place in self._places.of(rows):
            if row.error is not None or row.finish == "not finite":
                self._places.wipe(row, shelf, place)
            else:
                self.prefixes.keep(row, shelf, place)
        self._leave(rows)
        self._finished += [row for row in rows if row.error is not None]

    def _leave(self, rows: Sequence[Row]) -> None:
        """Free the places of rows."""
        leaving_ids = {id(row) for row in rows}
        self._places.leave(rows)
        self._filling = [
            remaining for group in self._filling if (remaining := [row for row in group if id(row) not in leaving_ids])
        ]

    def _admit(self) -> list[list[Row]]:
        """Take prompts from the queue that can start now, and give their rows places."""
        if not self._waiting:
            return []
        rows, kind, limit = self._places.rows(), self.base.device.type, self._prefill_limit
        count, tokens = len(rows), sum(room_for(row.need, kind) for row in rows)
        rests = [len(group[0].prompt) - group[0].filled for group in self._filling if self._may_prefill(group)]
        in_pieces = any(rest > limit for rest in rests)
        prefill = sum(rest for rest in rests if rest <= limit) + (limit // 2 if in_pieces else 0)
        rows_by_owner = Counter(row.request.owner for row in rows)
        passed_owners: set[str] = set()
        joining: list[list[Row]] = []
        while group := self._next_group(rows_by_owner, passed_owners):
            owner, length = group[0].request.owner, len(group[0].prompt)
            # Only one prompt at a time is computed in chunks. Other owners may pass it, and owners whose prompts delayed
            # others.
            if (length > limit and in_pieces) or not self._may_prefill(group):
                passed_owners.add(owner)
                continue
            needed, prefill_now = sum(room_for(row.need, kind) for row in group), length if length <= limit else limit // 2
            is_full = count + len(group) > self._rows_limit or (count and tokens + needed > self._cache_tokens)
            if is_full or ((joining or rests) and prefill + prefill_now > limit):
                break
            self._waiting.take(group)
            self._waiting.charge(owner, length)
            joining.append(group)
            in_pieces |= length > limit
            rows_by_owner[owner] += len(group)
            count, tokens, prefill = count + len(group), tokens + needed, prefill + prefill_now
        if joining:
            by_halves(joining, self._join, self._fail_to_join)
        return [group for group in joining if group[0].error is None]

    def _join(self, groups: Sequence[list[Row]]) -> list[Event]:
        """Give places to rows. If memory is short, raises and leaves them without places."""
        rows = [row for group in groups for row in group]
        try:
            self._places.put(rows, self._waiting, self._rows_limit, self._cache_tokens)
        except BaseException:
            self._places.leave(rows)
            raise
        return []

    def _fail_to_join(self, group: list[Row], error: Exception) -> None:
        """End rows for which there is not enough memory, even without other new rows."""
        for row in group:
            row.error = error
        self._finished += group

    def _next_group(self, rows_by_owner: Counter[str], passed_owners: set[str]) -> list[Row] | None:
        """The next group, among the owners that were not passed over and hold fewer places than their share."""
        share = self._share(rows_by_owner.keys())
        return self._waiting.next(lambda owner: owner not in passed_owners and rows_by_owner[owner] < share)

    def _share(self, holders: Iterable[str]) -> int:
        """The number of places per owner, given the owners that hold some."""
        owners = len({*holders, *self._waiting.owners})
        return share_of_places(self._rows_limit, owners) if self._serving and owners else self._rows_limit

    def _may_prefill(self, group: list[Row]) -> bool:
        """Whether a prompt may be computed in this step. With fixed-form decoding it always may."""
        return (
            not self._serving or self._decoder is not None or self._prompts.may_prefill(group[0].request.owner, self._decoding)
        )

    def _set_resting(self) -> None:
        """Pause the newest rows of owners with more rows than their share, which they got while no one else waited."""
        rows = sorted(self._places.rows(), key=lambda row: row.number)
        share, counted = self._share(row.request.owner for row in rows), Counter[str]()
        for row in rows:
            counted[row.request.owner] += 1
            row.resting = self._decoder is None and counted[row.request.owner] > share
        self._decoding = self._owners()

    def _owners(self) -> Counter[str]:
        """The number of rows per owner that get tokens."""
        return Counter(row.request.owner for row in self._places.rows() if row.ids and not row.resting)

    def _begin(self, joining: list[list[Row]]) -> None:
        """Copy cached prefixes of the prompts to the places of new rows."""
        for row, shelf, place in self._places.of(row for group in joining for row in group):
            row.filled = row.cached_tokens = self.prefixes.fill(row, shelf, place)
        self._filling += joining


def generate(
    base: BaseModel, prompts: Sequence[Sequence[int]], settings: SamplingSettings | Sequence[SamplingSettings],
    adapter: str | Sequence[str], *, completions: int = 1, advance: Callable[[int, int], None] | None = None,
) -> list[Rollout]:  # fmt: skip
    """Generate `completions` rollouts per prompt, in the order of the prompts. Settings and adapter are for all prompts or one
    each.

    `advance(rows, tokens)` is called after each step with its finished rows and new tokens. Raises ModelError before any
    computation for a prompt that leaves no room in the context and for invalid settings. The error of a row has a note that
    names the row.
    """
    engine = Engine(base)
    every_setting = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else settings
    every_adapter = [adapter] * len(prompts) if isinstance(adapter, str) else adapter
    requests = [
        Request(prompt, row_settings, name, index * completions, completions)
        for index, (prompt, row_settings, name) in enumerate(zip(prompts, every_setting, every_adapter, strict=True))
    ]
    # Sorted by policy: the common prefix of its prompts is computed once if they run in one step.
    numbers = {request.first: engine.submit(request) for request in sorted(requests, key=lambda request: request.adapter)}
    rollouts: dict[int, Rollout] = {}
    while engine.live:
        events = engine.step()
        for event in events:
            if event.error is not None:
                request = next(request for request in requests if event.row in numbers[request.first])
                prompt_number, completion_number = request.first // completions + 1, numbers[request.first].index(event.row) + 1
                answer = f"completion {completion_number} of {completions}"
                row = f'prompt {prompt_number} of {len(requests)}, under "{request.adapter}", {answer}'
                event.error.add_note(row)
                raise event.error
        finished = {event.row: event.rollout for event in events if event.rollout is not None}
        rollouts |= finished
        not_finite = next((r.adapter for r in finished.values() if r.finish == "not finite"), None)
        if not_finite is not None:
            raise ModelError(
                "generation",
                f'"{not_finite}" produced logits that are not finite',
                do="check its training data and learning rate",
            )
        if advance is not None:
            advance(len(finished), sum(event.token is not None for event in events))
    return [rollouts[number] for request in requests for number in numbers[request.first]]


def stream(engine: Engine, prompt: Sequence[int], settings: SamplingSettings, adapter: str) -> Generator[int, None, None]:
    """Yield the tokens of one answer, without the end token. The engine must have no other requests.

    Closing the iterator cancels the answer; the engine can be used again. Raises ModelError or AdapterError as `submit` does.
    """
    (number,) = engine.submit(Request(prompt, settings, adapter))
    try:
        while True:
            for event in engine.step():
                if event.row != number:  # the last event of a cancelled answer
                    continue
                if event.error is not None:
                    raise event.error
                if event.token is not None and not (event.rollout is not None and event.rollout.ended):
                    yield event.token
                if event.rollout is not None:
                    return
    finally:
        engine.cancel(number)
