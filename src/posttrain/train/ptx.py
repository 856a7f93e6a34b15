"""The pretraining mix of PPO (PPO-ptx; Ouyang et al. 2022, eq. 2): rows whose likelihood is raised in every step of the update.

    L = L_ppo + ptx_coef * L_ptx,   L_ptx = -(1 / N) sum_i log pi(t_i)  over the N targets of the step's rows, at temperature 1

Which rows a step sees is a function of (seed, step): seeded permutations laid end to end, as in an sft stage. Their coefficient
multiplies a mean over tokens, as the policy's loss is one; eq. 2 sums over a row's tokens.

N: targets.
"""

from collections.abc import Sequence
from typing import NamedTuple

from posttrain.data.packing import split_by_tokens
from posttrain.data.prepare import TrainRow
from posttrain.losses.output import LossOutput
from posttrain.losses.sft import sft_loss
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, DeviceBatch, batch_logprobs, pack_rows
from posttrain.train.loop import MicroBatch
from posttrain.train.schedule import rows_between


class PtxBatch(NamedTuple):
    """Packed rows of the mix."""

    batch: DeviceBatch


def ptx_batches(base: BaseModel, rows: Sequence[TrainRow], step: int, *, size: int, seed: int) -> list[MicroBatch]:
    """The micro-batches of the mix in one optimiser step (counted from 0), `size` rows; none where there are no rows."""
    if not rows:
        return []
    chosen = [rows[i] for i in rows_between(step * size, (step + 1) * size, len(rows), seed)]
    found = []
    for group in split_by_tokens([len(row.ids) for row in chosen], MICRO_TOKENS[base.device.type]):
        batch = pack_rows([chosen[i] for i in group], base.device)
        found.append(MicroBatch(PtxBatch(batch), batch.tokens, tuple(chosen[i].id for i in group)))
    return found


def ptx_loss(base: BaseModel, policy: str, micro: MicroBatch, step: Sequence[MicroBatch], *, coef: float) -> LossOutput:
    """A micro-batch's part of the step's loss. Metrics are sums: `ptx/nll` in nats, `ptx/targets` in tokens."""
    targets = sum(len(m.payload.batch.target_N) for m in step if isinstance(m.payload, PtxBatch))
    out = sft_loss(batch_logprobs(base, micro.payload.batch, policy), step_targets=targets)
    return LossOutput(coef * out.loss, {"ptx/nll": out.metrics["sft/nll"], "ptx/targets": out.metrics["sft/targets"]})
