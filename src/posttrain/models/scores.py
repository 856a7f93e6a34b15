"""Scores of whole completions by a reward model, in packed batches: prompts as trees with their completions below them.

    score_c = head(h at the last token of completion c)

C: completions, T: packed tokens.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.data.packing import Segment, pack, tree_segments
from posttrain.data.rankings import RankedPrompt
from posttrain.models.load import BaseModel
from posttrain.models.segments import Segments, Span


class PromptBatch(NamedTuple):
    """Packed prompts with their completions, the place of each completion's last token [C], and the tokens computed."""

    ids_T: Tensor
    positions_T: Tensor
    segments: Segments
    last_C: Tensor
    tokens: int


def pack_prompts(prompts: Sequence[RankedPrompt], device: torch.device) -> PromptBatch:
    """Prompts as trees; the completions of all prompts are numbered through."""
    segments: list[Segment] = []
    completions = 0
    for prompt in prompts:
        segments += tree_segments(prompt.prompt_ids, prompt.completions, first_row=completions, index=len(segments))
        completions += len(prompt.completions)
    packed = pack(segments, completions)
    last = [start + length - 1 for start, length, ancestors in packed.spans if ancestors]
    ids_T, positions_T, last_C = (torch.tensor(x, device=device) for x in (packed.ids, packed.positions, last))
    return PromptBatch(ids_T, positions_T, Segments(tuple(Span(*span) for span in packed.spans)), last_C, packed.tokens)


def batch_scores(base: BaseModel, batch: PromptBatch, adapter: str) -> Tensor:
    """The score of every completion of the batch [C], float32."""
    hidden_TD = base.hidden(batch.ids_T, batch.positions_T, batch.segments, adapter)
    return base.scores(hidden_TD[batch.last_C], adapter)
