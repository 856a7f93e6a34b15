"""One step of the engine: a forward of decoding rows and prompts, and the new token of each row.

A failed attempt accepts no token, and the next attempt overwrites what it wrote to the cache. So after a failure the step is
retried on halves of its rows, down to single rows. Rows that fail alone end with their error; the others get the tokens that
they would have got. A step raises only if the base itself cannot compute any more, for example after an assertion on a GPU.

T: tokens of the forward, D: width, R: rows, V: vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.generate.batch import Chunk, Places, StepBatch, lay_out
from posttrain.generate.failures import by_halves, release
from posttrain.generate.graph_decoding import FixedFormDecoder
from posttrain.generate.logits import next_logits, prompt_scores
from posttrain.generate.requests import Event, Row, Top
from posttrain.generate.sampling import ChosenTokens, choose_tokens, draw_numbers, top_tokens
from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.base_model import BaseModel
from posttrain.models.segments import Segments, Span
from posttrain.models.token_adapters import TokenAdapters


class Steps:
    """The steps of one engine, over its places and adapters. `decoder`, if any, runs steps with a fixed form."""

    def __init__(self, base: BaseModel, places: Places, adapters: NarrowAdapters, decoder: FixedFormDecoder | None) -> None:
        self._base, self._places, self._adapters, self._decoder = base, places, adapters, decoder

    def run(self, items: Sequence[Row | Chunk]) -> list[Event]:
        """Compute one token of each of these rows, and these chunks of prompts. A failed row gets its `error` and no event.

        Raises the error of the base if a forward of the base alone fails too.
        """
        try:
            return self._compute(items, self._places.rows(), self._decoder)
        except Exception as error:  # noqa: BLE001 - any error; the retry isolates the rows that cause it
            release(error)
        one_T = torch.zeros(1, dtype=torch.long)
        self._base.hidden(one_T, one_T, Segments((Span(0, 1),)), "base").sum().item()
        return by_halves(items, self._retry_alone, self._fail)

    def _retry_alone(self, items: Sequence[Row | Chunk]) -> list[Event]:
        """Retry with the adapters of these rows only."""
        self._adapters.clear()
        return self._compute(items, [row for item in items for row in _rows(item)], None)

    def _fail(self, item: Row | Chunk, error: Exception) -> None:
        """End the rows of an item that fails alone."""
        for row in _rows(item):
            row.error = error
            if isinstance(item, Chunk):
                row.filled = item.stop  # a part of it may have been written

    def _compute(
        self, items: Sequence[Row | Chunk], adapter_rows: Sequence[Row], decoder: FixedFormDecoder | None
    ) -> list[Event]:
        """One forward, with the adapters of `adapter_rows` loaded. If it raises, no token was accepted."""
        self._adapters.settle([row.adapter for row in adapter_rows if row.adapter is not None])
        rows, chunks = [i for i in items if isinstance(i, Row)], [i for i in items if isinstance(i, Chunk)]
        events = None if chunks or decoder is None else self._decode(decoder)
        if events is not None:
            return events
        batch = lay_out(self._places, rows, chunks)
        hidden_TD = self._forward(batch)
        scores = prompt_scores(self._base, self._adapters.product, hidden_TD, batch)
        chosen = None
        if batch.chosen:
            chosen = self._choose(next_logits(self._base, self._adapters.product, hidden_TD, batch), batch.chosen)
        for chunk in chunks:
            for row in chunk.rows:
                row.filled = chunk.stop
        for row, score in scores:
            row.scores.append(score)
        events = [] if chosen is None else self._accept(batch.chosen, *chosen)
        for row in (row for chunk in chunks if chunk.last for row in chunk.rows if not row.settings.max_new_tokens):
            row.finish = "length"  # a prompt that is only scored
            events.append(Event(row.number, None, 0.0, 0.0, row.rollout(), (), tuple(row.scores)))
        return events

    def _decode(self, decoder: FixedFormDecoder) -> list[Event] | None:
        """A step without prompts in a fixed form, or None if it has none."""
        step = decoder.lay_out(self._places)
        if step is None:
            return None
        numbers_4R = draw_numbers([row.draw() for row in step.rows], self._base.device)
        hidden_TD = decoder.forward(step)
        logits_TV = self._base.row_logits(hidden_TD, [row.adapter for row in step.rows], self._adapters.product)
        return self._accept(step.rows, *self._choose(logits_TV[: len(step.rows)], step.rows, numbers_4R))

    def _choose(
        self, logits_RV: Tensor, rows: Sequence[Row], numbers_4R: Tensor | None = None
    ) -> tuple[ChosenTokens, list[Top]]:
        """The next token of each row, and its likeliest tokens."""
        tops = top_tokens(logits_RV, [row.settings.top_logprobs for row in rows])
        return choose_tokens(logits_RV, [row.draw() for row in rows], numbers_4R), tops

    def _accept(self, rows: Sequence[Row], chosen: ChosenTokens, tops: Sequence[Top]) -> list[Event]:
        """Append the new tokens to the rows. An error affects only its row."""
        events = []
        for row, token, logprob, model_logprob, finite, top in zip(rows, *chosen, tops, strict=True):
            try:
                if not finite:
                    row.finish = "not finite"
                    events.append(Event(row.number, None, 0.0, 0.0, row.rollout()))
                    continue
                row.accept(token, logprob, model_logprob)
                rollout = row.rollout() if row.finish else None
            except Exception as error:  # noqa: BLE001 - for example text that cannot be decoded
                release(error)
                row.error = error
                continue
            prompt = tuple(row.scores) if row.request.prompt_logprobs and len(row.ids) == 1 else None
            events.append(Event(row.number, token, logprob, model_logprob, rollout, top, prompt, row.cached_tokens))
        return events

    def _forward(self, batch: StepBatch) -> Tensor:
        """Hidden states [T, D] of a step's forward."""
        tokens = TokenAdapters(batch.runs, self._adapters, self._base.device)
        with self._base.adapters.use_tokens(tokens):
            return self._base.programs.forward(batch.ids_T, batch.positions_T, batch.segments, tokens)


def _rows(item: Row | Chunk) -> Sequence[Row]:
    return item.rows if isinstance(item, Chunk) else [item]
