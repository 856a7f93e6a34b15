"""Packed batches of rows on the device, and their results: log-probabilities of targets, scores of completions.

Used by the training stages, for reference log-probabilities, and to measure policies and reward models.

B: rows, N: targets, C: completions.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.data.packing import PackedBatch, Segment, forest_segments, pack, row_segments
from posttrain.data.prepare import PairRow, TrainRow
from posttrain.models.base_model import BaseModel
from posttrain.models.segments import Segments, Span

# Tokens of one forward. Memory grows with this number, but narrow layers need about 2,000 rows to reach full speed on two
# cores (at width 576: 2.9 TFLOP/s, and 1.5 with fewer rows).
MICRO_TOKENS = {"cpu": 2048, "cuda": 16384}
# Shortest common prefix that becomes a segment. Sharing has a cost: attention gathers the keys of ancestors.
WORTH_SHARING = 16


class DeviceBatch(NamedTuple):
    """A packed batch as tensors on a device."""

    ids_T: Tensor
    positions_T: Tensor
    segments: Segments
    source_N: Tensor
    target_N: Tensor
    row_N: Tensor
    last_B: Tensor
    rows: int
    tokens: int


def to_device(batch: PackedBatch, device: torch.device) -> DeviceBatch:
    """Copy a packed batch to a device."""
    segments = Segments(tuple(Span(*span) for span in batch.spans))
    numbers = [
        torch.tensor(x, dtype=torch.long, device=device)
        for x in (batch.ids, batch.positions, batch.source_N, batch.target_N, batch.row_N, batch.last_B)
    ]
    ids, positions, source, target, row, last = numbers
    return DeviceBatch(ids, positions, segments, source, target, row, last, batch.rows, batch.tokens)


def pack_rows(rows: Sequence[TrainRow], device: torch.device) -> DeviceBatch:
    """Pack conversations. Their common prefix, such as a system prompt, is computed once."""
    shared = _shared_prefix(rows)
    if shared < WORTH_SHARING:
        segments = [segment for index, row in enumerate(rows) for segment in row_segments(row.ids, row.trained, index)]
    else:
        segments = [Segment(tuple(rows[0].ids[:shared]), None, (False,) * shared, -1)]
        segments += [Segment(tuple(r.ids[shared:]), 0, tuple(r.trained[shared:]), i) for i, r in enumerate(rows)]
    return to_device(pack(segments, len(rows)), device)


def _shared_prefix(rows: Sequence[TrainRow]) -> int:
    """Length of the common prefix of all rows, up to the first target; at least one token of each row stays outside."""
    if len(rows) < 2:
        return 0
    limit = min(min(row.trained.index(True) if True in row.trained else len(row.ids), len(row.ids) - 1) for row in rows)
    first = rows[0].ids
    return next((i for i in range(limit) if any(row.ids[i] != first[i] for row in rows)), limit)


def pack_pairs(pairs: Sequence[PairRow], device: torch.device) -> DeviceBatch:
    """Pack pairs as trees: row 2i is the chosen completion of pair i, row 2i + 1 the rejected one."""
    return pack_trees(((pair.prompt_ids, (pair.chosen_ids, pair.rejected_ids)) for pair in pairs), device)


def pack_trees(trees: Iterable[tuple[Sequence[int], Sequence[Sequence[int]]]], device: torch.device) -> DeviceBatch:
    """Pack prompts with their completions as children; every completion is a row."""
    return to_device(pack(*forest_segments(trees)), device)


def batch_logprobs(base: BaseModel, batch: DeviceBatch, policy: str) -> Tensor:
    """log p of every target of the batch [N] under a policy, float32."""
    hidden_TD = base.hidden(batch.ids_T, batch.positions_T, batch.segments, policy)
    return base.logprobs(hidden_TD[batch.source_N], batch.target_N, policy)


def sum_by_row(logprobs_N: Tensor, batch: DeviceBatch) -> Tensor:
    """Sum of the targets' log-probabilities of each row [B]."""
    return logprobs_N.new_zeros(batch.rows).index_add(0, batch.row_N, logprobs_N)


def row_scores(base: BaseModel, batch: DeviceBatch, adapter: str) -> Tensor:
    """Score of every row of the batch [B] by a reward model, at the row's last token, float32."""
    hidden_TD = base.hidden(batch.ids_T, batch.positions_T, batch.segments, adapter)
    return base.scores(hidden_TD[batch.last_B], adapter)
