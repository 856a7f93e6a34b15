"""The engine: requests in, tokens out, one forward a step. Rollouts, evaluation, chat and a server all generate here.

A step computes one token of every row in flight and, in the same forward, the prompts of rows that join; a prompt of several
completions is computed once. Rows leave in the step in which they end, and any adapters and sampling settings stand
side by side. What a row says does not depend on its company: its randomness is its own (`generate/sampling.py`).

Left out: prefixes shared between steps, prompts computed in pieces, paging of the cache. A row's room is set by its longest
possible length, rounded up to a power of two.
"""

from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence

import torch

from posttrain.errors import ModelError
from posttrain.generate.batch import Places, Work, capacity_for, lay_out, room_for, rounded
from posttrain.generate.rows import Event, Request, Row
from posttrain.generate.sampling import Chosen, check_settings, choose_tokens
from posttrain.generate.sampling import SamplingSettings as SamplingSettings  # callers need no other module
from posttrain.models.decoding import bytes_per_token
from posttrain.models.load import BaseModel
from posttrain.models.lora import LoraAdapter
from posttrain.models.mixed import NarrowAdapters, TokenAdapters
from posttrain.records import Rollout

# Rows in flight, by device; their logits (rows x vocabulary) are there at once.
ROWS = {"cpu": 128, "cuda": 256}
# Tokens of joining prompts in one forward; a longer prompt comes alone.
PREFILL_TOKENS = {"cpu": 4096, "cuda": 16384}
# Rows wait while the cache of those in flight would be larger; one row always runs.
CACHE_BYTES = {"cpu": 4 * 2**30, "cuda": 16 * 2**30}


class Engine:
    """Continuous batching over one base. Not for several threads at once; `generate/serving.py` has a face for a server."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base
        kind = base.device.type
        self._rows_limit, self._prefill_limit = ROWS[kind], PREFILL_TOKENS[kind]
        self._cache_tokens = CACHE_BYTES[kind] // bytes_per_token(base.model.config.get_text_config().to_dict(), base.dtype)
        self._places = Places(base.device)
        self._narrow = NarrowAdapters(base.dtype, base.device)
        # Rows that share a prompt join together.
        self._waiting: deque[list[Row]] = deque()
        self._done: list[Row] = []
        self._count = 0

    @property
    def live(self) -> bool:
        """Whether anything is left to tell."""
        return bool(self._waiting or self._done or self._places.shelves)

    @property
    def waiting(self) -> int:
        """Completions that have not begun."""
        return sum(map(len, self._waiting))

    def check(self, request: Request) -> LoraAdapter | None:
        """The adapter that a request names, None for the base. Raises ModelError or AdapterError where none can answer."""
        base, where, prompt = self.base, "generation", request.prompt
        vocabulary = len(base.head_VD)
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
        first = self._count
        self._count += request.completions
        rows = [Row(first + g, request, g, adapter, self.base.chat) for g in range(request.completions)]
        if rows[0].finish is not None:
            self._done += rows
        else:
            self._waiting += [rows[g : g + self._rows_limit] for g in range(0, len(rows), self._rows_limit)]
        return [row.number for row in rows]

    def cancel(self, number: int) -> None:
        """End a completion, waiting or in flight; its last event comes with the next step. Others are not touched."""
        for group in self._waiting:
            for row in group:
                if row.number == number:
                    group.remove(row)
                    self._end([row])
        self._waiting = deque(group for group in self._waiting if group)
        found = [row for row in self._places.rows() if row.number == number]
        self._places.leave(found)
        self._end(found)

    def _end(self, rows: list[Row]) -> None:
        for row in rows:
            row.finish = "cancelled"
        self._done += rows

    @torch.inference_mode()
    def step(self) -> list[Event]:
        """One token of every row, and the ends of those that are done."""
        events = [Event(row.number, None, 0.0, 0.0, row.rollout()) for row in self._done]
        self._done = []
        joining = self._admit()
        self._places.arrange()
        if not self._places.shelves:
            return events
        work = lay_out(self._places, joining)
        found = self._choose(work)
        for row, token, logprob, model_logprob in zip(work.chosen, *found, strict=True):
            row.accept(token, logprob, model_logprob)
            events.append(Event(row.number, token, logprob, model_logprob, row.rollout() if row.finish else None))
        self._places.leave([row for row in work.chosen if row.finish])
        return events

    def _admit(self) -> list[list[Row]]:
        """Take the prompts that join now off the queue, first come first served, and give their rows places."""
        rows, kind = self._places.rows(), self.base.device.type
        count, tokens, prefill = len(rows), sum(room_for(row.need, kind) for row in rows), 0
        joining: list[list[Row]] = []
        while self._waiting:
            group = self._waiting[0]
            needed = sum(room_for(row.need, kind) for row in group)
            length = len(group[0].prompt)
            full = count + len(group) > self._rows_limit or (count and tokens + needed > self._cache_tokens)
            if full or (joining and prefill + length > self._prefill_limit):
                break
            joining.append(self._waiting.popleft())
            count, tokens, prefill = count + len(group), tokens + needed, prefill + length
        if joining:
            expected = Counter(capacity_for(row.need, kind) for group in self._waiting for row in group)
            self._places.put([row for group in joining for row in group], expected, self._rows_limit)
        return joining

    def _choose(self, work: Work) -> Chosen:
        """The forward, and the next token of each row."""
        base = self.base
        with base.adapters.use_tokens(TokenAdapters(work.runs, self._narrow, base.device)):
            hidden_TD = base.forward(work.ids_T, work.positions_T, work.segments)
        # The head runs once for rows that begin alike.
        source = list(dict.fromkeys(work.source))
        adapter_of = dict(zip(work.source, (row.adapter for row in work.chosen), strict=True))
        spare = rounded(len(source)) - len(source)
        padded = source + source[:1] * spare
        index = torch.tensor(padded, device=base.device)
        logits_RV = base.row_logits(hidden_TD[index], [adapter_of[token] for token in padded], self._narrow.product)
        if len(source) < len(work.source):
            place = {token: place for place, token in enumerate(source)}
            logits_RV = logits_RV[torch.tensor([place[token] for token in work.source], device=base.device)]
        return choose_tokens(logits_RV[: len(work.source)], [row.draw() for row in work.chosen])


def generate(
    base: BaseModel, prompts: Sequence[Sequence[int]], settings: SamplingSettings | Sequence[SamplingSettings],
    adapter: str | Sequence[str], *, completions: int = 1, advance: Callable[[int, int], None] | None = None,
) -> list[Rollout]:  # fmt: skip
    """`completions` rollouts a prompt, in the order of the prompts. Settings and adapter are for all prompts or one each.

    `advance(rows, tokens)` is told what each step finished. Raises ModelError, before anything is computed, for a prompt that
    leaves no room in the context and for settings that cannot be.
    """
    engine = Engine(base)
    every_setting = [settings] * len(prompts) if isinstance(settings, SamplingSettings) else settings
    every_adapter = [adapter] * len(prompts) if isinstance(adapter, str) else adapter
    asked = zip(prompts, every_setting, every_adapter, strict=True)
    numbers = [
        number
        for index, (prompt, own, name) in enumerate(asked)
        for number in engine.submit(Request(prompt, own, name, index * completions, completions))
    ]
    rollouts: dict[int, Rollout] = {}
    while engine.live:
        events = engine.step()
        finished = {event.row: event.rollout for event in events if event.rollout is not None}
        rollouts |= finished
        if advance is not None:
            advance(len(finished), sum(event.token is not None for event in events))
    return [rollouts[number] for number in numbers]


def stream(base: BaseModel, prompt: Sequence[int], settings: SamplingSettings, adapter: str) -> Iterator[int]:
    """Tokens of one answer as they come, without the end token."""
    engine = Engine(base)
    engine.submit(Request(prompt, settings, adapter))
    while engine.live:
        for event in engine.step():
            ended = event.rollout is not None and event.rollout.ended
            if event.token is not None and not ended:
                yield event.token
