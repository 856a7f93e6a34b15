"""Generation: prompts in, rollouts out; one engine for samples, chat and evaluation.

Prompts are prefilled as packed segments into the rows of a preallocated cache; every step then computes one token of each
row. A row that ends gives its place to the next prompt, so a batch stays full without copying a cache. A row's randomness
is its own (seed, index of the prompt): what it samples does not depend on which rows stand beside it.

    p(t) = softmax(z / temperature), cut to the smallest set with mass top_p;   logprobs are taken under this p
    temperature 0 takes the likeliest token; logprobs are then those of temperature 1

R: rows of the decoding batch, V: vocabulary, D: width. Left out: prefix sharing between prompts, mixed adapters in a batch.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

from posttrain.errors import ModelError
from posttrain.models.load import BaseModel
from posttrain.models.segments import KeyValueCache, Segments, Span
from posttrain.records import Rollout

# Rows decoded together, by device; their cache and their logits (R x V) set the memory.
ROWS = {"cpu": 128, "cuda": 256}
PREFILL_TOKENS = {"cpu": 1024, "cuda": 16384}
# New prompts join when so many rows are free: a prefill of one short prompt costs as much as a whole decoding step.
JOIN_SHARE = 4
# Packed prefills are rounded up to multiples of this, since a new shape costs more than spare tokens.
ROUND_TO = 64
# Tokens of the vocabulary that are looked through at once when one of them is chosen.
BLOCK = 512


class SamplingSettings(NamedTuple):
    """How to choose tokens. `logprobs=False` saves a pass over the vocabulary where nobody reads them."""

    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    logprobs: bool = True


class _Row:
    """One prompt on its way."""

    def __init__(self, index: int, prompt: Sequence[int], settings: SamplingSettings) -> None:
        self.index, self.prompt = index, tuple(prompt)
        self.ids: list[int] = []
        self.logprobs: list[float] = []
        self.done = settings.max_new_tokens == 0
        self.ended = False
        # 2^31 - 1 is prime: neighbouring seeds and indices do not collide
        self.random = torch.Generator().manual_seed((settings.seed * 1_000_003 + index) % (2**31 - 1))

    def accept(self, token: int, logprob: float, settings: SamplingSettings, end_ids: frozenset[int]) -> None:
        """Take one token; the end token is kept as the last of the completion."""
        self.ids.append(token)
        self.logprobs.append(logprob)
        self.ended = token in end_ids
        self.done = self.ended or len(self.ids) >= settings.max_new_tokens


def generate(
    base: BaseModel, prompts: Sequence[Sequence[int]], settings: SamplingSettings, adapter: str, *,
    advance: Callable[[int, int], None] | None = None,
) -> list[Rollout]:  # fmt: skip
    """One rollout a prompt, in the order of the prompts. Stops at the end of the turn or after `max_new_tokens`.

    `advance(rows, tokens)` is told what each step finished. Raises ModelError for a prompt that leaves no room in the
    context, and for settings that cannot be.
    """
    _check(base, prompts, settings)
    rows = [_Row(i, p, settings) for i, p in enumerate(prompts)]
    # Longest first: the cache is widest at the start and shrinks with the batch.
    waiting = sorted((r for r in rows if not r.done), key=lambda r: -len(r.prompt))
    if waiting:
        decoder = _Decoder(base, settings, adapter, waiting)
        while decoder.live:
            finished, tokens = decoder.step()
            if advance is not None:
                advance(finished, tokens)
    return [_rollout(base, row, adapter) for row in rows]


def stream(base: BaseModel, prompt: Sequence[int], settings: SamplingSettings, adapter: str) -> Iterator[int]:
    """Tokens of one answer as they come, without the end token."""
    _check(base, [prompt], settings)
    row = _Row(0, prompt, settings)
    if row.done:
        return
    decoder = _Decoder(base, settings, adapter, [row])
    while True:
        if row.ids and not row.ended:
            yield row.ids[-1]
        if not decoder.live:
            return
        decoder.step()


def _check(base: BaseModel, prompts: Sequence[Sequence[int]], settings: SamplingSettings) -> None:
    where = "generation"
    if settings.max_new_tokens < 0 or not 0 <= settings.temperature < math.inf or not 0 < settings.top_p <= 1:
        raise ModelError(where, str(settings), allowed="max_new_tokens >= 0, temperature >= 0, 0 < top_p <= 1")
    longest = max((len(p) for p in prompts), default=0)
    if longest + settings.max_new_tokens > base.context:
        raise ModelError(
            where, f"a prompt of {longest} tokens and {settings.max_new_tokens} new ones",
            allowed=f"together at most {base.context}", do="shorten the prompt or max_new_tokens",
        )  # fmt: skip
    if any(not p for p in prompts):
        raise ModelError(where, "an empty prompt", do="give at least one token")


def _rollout(base: BaseModel, row: _Row, adapter: str) -> Rollout:
    text = base.chat.decode(row.ids[:-1] if row.ended else row.ids)
    return Rollout(row.prompt, tuple(row.ids), tuple(row.logprobs), text, row.ended, adapter)


class _Decoder:
    """The rows in flight, their cache and the prompts that wait."""

    def __init__(self, base: BaseModel, settings: SamplingSettings, adapter: str, waiting: list[_Row]) -> None:
        self.base, self.settings, self.adapter, self.waiting = base, settings, adapter, waiting
        places = min(ROWS[base.device.type], len(waiting))
        capacity = max(len(r.prompt) for r in waiting) + settings.max_new_tokens
        self.cache = KeyValueCache(places, capacity)
        self.rows: list[_Row | None] = [None] * places
        self.last_R = torch.zeros(places, dtype=torch.long)
        with torch.inference_mode():
            self._join()

    @property
    def live(self) -> bool:
        """Whether any row still has tokens to come."""
        return any(row is not None for row in self.rows) or bool(self.waiting)

    @torch.inference_mode()
    def step(self) -> tuple[int, int]:
        """One token of every row; returns rows finished and tokens made."""
        before = len(self.waiting) + sum(r is not None for r in self.rows)
        self._make_room()
        if any(r is not None for r in self.rows):
            segments = Segments((), cache=self.cache, decoding=True)
            hidden_RD = self._forward(self.last_R, self.cache.lengths_R, segments)
            places = [p for p, r in enumerate(self.rows) if r is not None]
            self.cache.lengths_R[places] += 1
            self._choose(hidden_RD[places] if len(places) < len(self.rows) else hidden_RD, places)
            tokens = len(places)
        else:
            tokens = 0
        return before - len(self.waiting) - sum(r is not None for r in self.rows), tokens

    def _forward(self, ids_T: Tensor, positions_T: Tensor, segments: Segments) -> Tensor:
        return self.base.hidden(ids_T, positions_T, segments, self.adapter)

    def _make_room(self) -> None:
        """Let waiting prompts join, or drop places that nobody will use again."""
        free = sum(r is None for r in self.rows)
        if self.waiting:
            if free * JOIN_SHARE >= len(self.rows):
                self._join()
        elif free * 2 >= len(self.rows) and free < len(self.rows):
            places = [p for p, r in enumerate(self.rows) if r is not None]
            self.cache.keep(torch.tensor(places))
            self.rows = [self.rows[p] for p in places]
            self.last_R = self.last_R[places]

    def _join(self) -> None:
        """Prefill waiting prompts into the free places, a packed batch at a time; their first token is chosen here."""
        free = [p for p, r in enumerate(self.rows) if r is None]
        joining = [self.waiting.pop(0) for _ in range(min(len(free), len(self.waiting)))]
        while joining:
            group = [joining.pop(0)]
            tokens = len(group[0].prompt)
            while joining and tokens + len(joining[0].prompt) <= PREFILL_TOKENS[self.base.device.type]:
                tokens += len(joining[0].prompt)
                group.append(joining.pop(0))
            places = [free.pop(0) for _ in group]
            self._prefill(group, places)

    def _prefill(self, group: list[_Row], places: list[int]) -> None:
        ids: list[int] = []
        positions: list[int] = []
        spans = []
        for row in group:
            spans.append(Span(len(ids), len(row.prompt)))
            ids += row.prompt
            positions += range(len(row.prompt))
        spare = -len(ids) % ROUND_TO
        last_T = [span.start + span.length - 1 for span in spans]
        self.cache.filling = places
        hidden_TD = self._forward(
            torch.tensor(ids + [0] * spare),
            torch.tensor(positions + list(range(spare))),
            Segments(tuple(spans), cache=self.cache),
        )
        self.cache.lengths_R[places] = torch.tensor([len(row.prompt) for row in group])
        for place, row in zip(places, group, strict=True):
            self.rows[place] = row
        self._choose(hidden_TD[last_T], places)

    def _choose(self, hidden_RD: Tensor, places: list[int]) -> None:
        """Choose the next token of the rows at `places`; rows that are done leave."""
        rows = [self.rows[p] for p in places]
        logits_RV = self.base.logits(hidden_RD, self.adapter)
        if self.base.softcap is not None:
            logits_RV = torch.tanh(logits_RV.float() / self.base.softcap) * self.base.softcap
        uniform_R = None
        if self.settings.temperature > 0:
            uniform_R = torch.cat([torch.rand(1, generator=r.random, dtype=torch.float64) for r in rows if r is not None])
        token_R, logprob_R = choose_tokens(logits_RV, self.settings, uniform_R)
        self.last_R[places] = token_R
        for place, row, token, logprob in zip(places, rows, token_R.tolist(), logprob_R.tolist(), strict=True):
            assert row is not None
            row.accept(token, logprob, self.settings, self.base.chat.end_ids)
            if row.done:
                self.rows[place] = None


def choose_tokens(logits_RV: Tensor, settings: SamplingSettings, uniform_R: Tensor | None) -> tuple[Tensor, Tensor]:
    """Token [R] and its log-probability [R] (float32, on the CPU), by inverting the cumulative distribution at uniform_R.

    One uniform number a row replaces one exponential a token of the vocabulary.
    """
    if uniform_R is None:
        token_R = _argmax(logits_RV)
        if not settings.logprobs:
            return token_R.cpu(), torch.zeros(len(token_R))
        chosen_R = logits_RV.gather(1, token_R[:, None])[:, 0].float()
        return token_R.cpu(), (chosen_R - logits_RV.float().logsumexp(1)).cpu()
    scaled_RV = logits_RV.float() / settings.temperature
    weights_RV = (scaled_RV - scaled_RV.amax(1, keepdim=True)).exp_()
    if settings.top_p < 1:
        weights_RV = _keep_top_p(weights_RV, settings.top_p)
    token_R, total_R = _draw(weights_RV, uniform_R.to(weights_RV.device))
    weight_R = weights_RV.gather(1, token_R[:, None])[:, 0].double()
    return token_R.cpu(), (weight_R / total_R).log().float().cpu()


def _in_blocks(x_RV: Tensor, filler: float) -> Tensor:
    """The vocabulary cut into blocks [R, V / BLOCK, BLOCK]: what is looked for is found in its block, then inside of it."""
    padded_RV = functional.pad(x_RV, (0, -x_RV.shape[1] % BLOCK), value=filler)
    return padded_RV.view(len(padded_RV), -1, BLOCK)


def _argmax(logits_RV: Tensor) -> Tensor:
    """The first of the largest logits [R]: at 262k tokens a twentieth of the time of argmax, which is not vectorised."""
    blocks_RCW = _in_blocks(logits_RV, -math.inf)
    block_R = blocks_RCW.amax(2).argmax(1)
    return block_R * BLOCK + blocks_RCW[torch.arange(len(block_R), device=block_R.device), block_R].argmax(1)


def _draw(weights_RV: Tensor, uniform_R: Tensor) -> tuple[Tensor, Tensor]:
    """Where uniform_R in [0, 1) falls in the cumulative distribution of weights: token [R], total weight [R] in float64."""
    blocks_RCW = _in_blocks(weights_RV, 0.0)
    cumulative_RC = blocks_RCW.sum(2, dtype=torch.float64).cumsum(1)
    total_R = cumulative_RC[:, -1]
    draw_R1 = (uniform_R * total_R)[:, None]
    # Rounding may carry a draw past the last token with any weight; it then takes that one.
    block_R1 = torch.searchsorted(cumulative_RC, draw_R1, right=True).clamp(max=cumulative_RC.shape[1] - 1)
    before_R1 = torch.where(block_R1 > 0, cumulative_RC.gather(1, (block_R1 - 1).clamp(min=0)), 0.0)
    inside_RW = blocks_RCW[torch.arange(len(block_R1), device=block_R1.device), block_R1[:, 0]].double()
    place_R1 = torch.searchsorted(inside_RW.cumsum(1), draw_R1 - before_R1, right=True)
    last_R1 = BLOCK - 1 - (inside_RW.flip(1) > 0).int().argmax(1, keepdim=True)
    return (block_R1 * BLOCK + torch.minimum(place_R1, last_R1))[:, 0], total_R


def _keep_top_p(weights_RV: Tensor, top_p: float) -> Tensor:
    """Set to zero what lies outside the smallest set of tokens with mass `top_p` (Holtzman et al. 2020)."""
    ordered_RV, index_RV = weights_RV.sort(1, descending=True)
    before_RV = ordered_RV.cumsum(1) - ordered_RV
    ordered_RV[before_RV >= top_p * ordered_RV.sum(1, keepdim=True)] = 0.0
    return torch.zeros_like(weights_RV).scatter_(1, index_RV, ordered_RV)
