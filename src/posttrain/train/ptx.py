"""The pretraining mix of PPO (PPO-ptx; Ouyang et al. 2022, eq. 2): rows whose likelihood is raised in every step of the update.

    L = L_ppo + ptx_coef * L_ptx,   L_ptx = -(1 / N) sum_i log pi(t_i)  over the N targets of the step's rows, at temperature 1

Which rows a step sees is a function of (seed, step): seeded permutations laid end to end, as in an sft stage. `ptx_coef`
multiplies a mean over tokens, since the policy's loss is one; eq. 2 sums over a row's tokens.

N: targets.
"""

from collections.abc import Sequence

from posttrain.data.packing import split_by_tokens
from posttrain.data.prepare import TrainRow
from posttrain.losses.output import LossOutput
from posttrain.losses.sft import sft_loss
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, batch_logprobs, pack_rows
from posttrain.train.loop import MicroBatch
from posttrain.train.schedule import rows_between


def ptx_batches(base: BaseModel, rows: Sequence[TrainRow], step: int, *, size: int, seed: int) -> list[MicroBatch]:
    """The micro-batches of the mix in one optimiser step (counted from 0), `size` rows; none where there are no rows."""
    if not rows:
        return []
    chosen = [rows[i] for i in rows_between(step * size, (step + 1) * size, len(rows), seed)]
    batches = []
    for group in split_by_tokens([len(row.ids) for row in chosen], MICRO_TOKENS[base.device.type]):
        batch = pack_rows([chosen[i] for i in group], base.device)
        batches.append(MicroBatch(batch, batch.tokens, tuple(chosen[i].id for i in group)))
    return batches


def ptx_loss(base: BaseModel, policy: str, micro: MicroBatch, *, step_targets: int, coef: float) -> LossOutput:
    """A micro-batch's part of the step's loss. Metrics are sums: `ptx/nll` in nats, `ptx/targets` in tokens."""
    out = sft_loss(batch_logprobs(base, micro.payload, policy), step_targets=step_targets)
    return LossOutput(coef * out.loss, {"ptx/nll": out.metrics["sft/nll"], "ptx/targets": out.metrics["sft/targets"]})
