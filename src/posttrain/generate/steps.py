"""One step of the engine: a forward of rows that decode and of prompts, and what each row gets of it.

A try that fails has accepted nothing, and what it wrote to the cache is written again by the next one. So where a step fails,
halves of its rows are tried, down to those that fail by themselves: they end with their error, and the others get the tokens
that they would have had. A step raises only where the base cannot compute by itself any more, as after an assertion on a GPU.

T: tokens of the forward, D: width, R: rows, V: vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.generate.batch import Chunk, Places, Work, lay_out
from posttrain.generate.failures import by_halves, release
from posttrain.generate.graph_decoding import SteadyDecoder
from posttrain.generate.logits import next_logits, prompt_scores
from posttrain.generate.requests import Event, Row, Top
from posttrain.generate.sampling import Chosen, choose_tokens, draw_numbers, top_tokens
from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.base_model import BaseModel
from posttrain.models.segments import Segments, Span
from posttrain.models.token_adapters import TokenAdapters


class Steps:
    """The steps of one engine, over its places and adapters; `steady` has those of a fixed form, where there are any."""

    def __init__(self, base: BaseModel, places: Places, narrow: NarrowAdapters, steady: SteadyDecoder | None) -> None:
        self._base, self._places, self._narrow, self._steady = base, places, narrow, steady

    def run(self, items: Sequence[Row | Chunk]) -> list[Event]:
        """A token of each of these rows, and these pieces of prompts. Rows that fail have their `error` then, and no event.

        Raises what the base fails with where it cannot compute by itself either.
        """
        try:
            return self._compute(items, self._places.rows(), self._steady)
        except Exception as error:  # noqa: BLE001 - whatever it is, others are not to blame
            release(error)
        one_T = torch.zeros(1, dtype=torch.long)
        self._base.hidden(one_T, one_T, Segments((Span(0, 1),)), "base").sum().item()
        return by_halves(items, self._retry, self._fail)

    def _retry(self, items: Sequence[Row | Chunk]) -> list[Event]:
        """Again, with adapters of nobody else."""
        self._narrow.clear()
        return self._compute(items, [row for item in items for row in _rows(item)], None)

    def _fail(self, item: Row | Chunk, error: Exception) -> None:
        """What could not be computed by itself ends with this step."""
        for row in _rows(item):
            row.error = error
            if isinstance(item, Chunk):
                row.filled = item.stop  # a part of it may have been written

    def _compute(self, items: Sequence[Row | Chunk], holding: Sequence[Row], decoder: SteadyDecoder | None) -> list[Event]:
        """One forward, with the adapters of all these rows. Raises before anything is accepted."""
        self._narrow.settle([row.adapter for row in holding if row.adapter is not None])
        rows, chunks = [i for i in items if isinstance(i, Row)], [i for i in items if isinstance(i, Chunk)]
        events = None if chunks or decoder is None else self._decode(decoder)
        if events is not None:
            return events
        work = lay_out(self._places, rows, chunks)
        hidden_TD = self._forward(work)
        scores = prompt_scores(self._base, self._narrow.product, hidden_TD, work)
        chosen = None
        if work.chosen:
            chosen = self._choose(next_logits(self._base, self._narrow.product, hidden_TD, work), work.chosen)
        for chunk in chunks:
            for row in chunk.rows:
                row.filled = chunk.stop
        for row, score in scores:
            row.scores.append(score)
        events = [] if chosen is None else self._accept(work.chosen, *chosen)
        for row in (row for chunk in chunks if chunk.last for row in chunk.rows if not row.settings.max_new_tokens):
            row.finish = "length"  # a prompt that was only to be scored
            events.append(Event(row.number, None, 0.0, 0.0, row.rollout(), (), tuple(row.scores)))
        return events

    def _decode(self, decoder: SteadyDecoder) -> list[Event] | None:
        """A step without prompts, in a fixed form; None where it has none."""
        steady = decoder.lay_out(self._places)
        if steady is None:
            return None
        numbers_4R = draw_numbers([row.draw() for row in steady.rows], self._base.device)
        hidden_TD = decoder.forward(steady)
        logits_TV = self._base.row_logits(hidden_TD, [row.adapter for row in steady.rows], self._narrow.product)
        return self._accept(steady.rows, *self._choose(logits_TV[: len(steady.rows)], steady.rows, numbers_4R))

    def _choose(self, logits_RV: Tensor, rows: Sequence[Row], numbers_4R: Tensor | None = None) -> tuple[Chosen, list[Top]]:
        """The next token of each row, and the likeliest ones."""
        tops = top_tokens(logits_RV, [row.settings.top_logprobs for row in rows])
        return choose_tokens(logits_RV, [row.draw() for row in rows], numbers_4R), tops

    def _accept(self, rows: Sequence[Row], chosen: Chosen, tops: Sequence[Top]) -> list[Event]:
        """Each row takes its token; what fails in one is its own."""
        events = []
        for row, token, logprob, model_logprob, finite, top in zip(rows, *chosen, tops, strict=True):
            try:
                if not finite:
                    row.finish = "not finite"
                    events.append(Event(row.number, None, 0.0, 0.0, row.rollout()))
                    continue
                row.accept(token, logprob, model_logprob)
                rollout = row.rollout() if row.finish else None
            except Exception as error:  # noqa: BLE001 - its text cannot be decoded, for instance
                release(error)
                row.error = error
                continue
            prompt = tuple(row.scores) if row.request.prompt_logprobs and len(row.ids) == 1 else None
            events.append(Event(row.number, token, logprob, model_logprob, rollout, top, prompt, row.found))
        return events

    def _forward(self, work: Work) -> Tensor:
        """Hidden states [T, D] of a step's forward."""
        tokens = TokenAdapters(work.runs, self._narrow, self._base.device)
        with self._base.adapters.use_tokens(tokens):
            return self._base.programs.forward(work.ids_T, work.positions_T, work.segments, tokens)


def _rows(item: Row | Chunk) -> Sequence[Row]:
    return item.rows if isinstance(item, Chunk) else [item]
