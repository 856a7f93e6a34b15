"""The sft stage: demonstrations in, a policy out. It trains on assistant turns only, with their end token."""

from collections.abc import Sequence

import torch

from posttrain.data.packing import split_by_tokens
from posttrain.data.prepare import TrainRow
from posttrain.data.stage_data import sft_rows
from posttrain.losses.output import LossOutput
from posttrain.losses.sft import sft_loss
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, batch_logprobs, pack_rows
from posttrain.stages.sft import SftStage
from posttrain.train.loop import MicroBatch, TrainTask
from posttrain.train.stage import StageContext, StageResult, TrainedPolicy, fit_stage, loop_settings, seed_of, start_policy


def train_sft(context: StageContext, stage: SftStage) -> StageResult:
    """Fine-tune on demonstrations. Raises DataError for data that cannot be trained on."""
    prepared = sft_rows(stage, context.base.chat, context.preparation)
    policy = start_policy(context, stage)
    settings = loop_settings(stage, seed_of(stage, context.recipe))
    task = sft_task(context.base, policy, prepared.train, prepared.validation)
    return fit_stage(context, stage, policy, task, settings, prepared.report)


def sft_task(base: BaseModel, policy: TrainedPolicy, train: Sequence[TrainRow], held_out: Sequence[TrainRow]) -> TrainTask:
    """What SFT learns from demonstrations."""

    def micro_batches(indices: Sequence[int]) -> list[MicroBatch]:
        return _micro_batches(base, [train[i] for i in indices])

    def loss(micro: MicroBatch, step: Sequence[MicroBatch]) -> LossOutput:
        targets = sum(len(m.payload.target_N) for m in step)
        return sft_loss(batch_logprobs(base, micro.payload, policy.routing), step_targets=targets)

    def validate() -> dict[str, float]:
        return {"sft/validation_loss": mean_loss(base, policy.routing, held_out)}

    return TrainTask(
        len(train), policy.parameters, micro_batches, loss,
        lambda sums: {"sft/loss": sums["sft/nll"] / sums["sft/targets"], "sft/targets": sums["sft/targets"]},
        validate if held_out else None, "sft/validation_loss",
    )  # fmt: skip


def _micro_batches(base: BaseModel, rows: Sequence[TrainRow]) -> list[MicroBatch]:
    groups = split_by_tokens([len(r.ids) for r in rows], MICRO_TOKENS[base.device.type])
    batches = []
    for group in groups:
        chosen = [rows[i] for i in group]
        packed = pack_rows(chosen, base.device)
        batches.append(MicroBatch(packed, packed.tokens, tuple(r.id for r in chosen)))
    return batches


@torch.no_grad()
def mean_loss(base: BaseModel, policy: str, rows: Sequence[TrainRow]) -> float:
    """Mean -log p of the trained tokens of rows, in nats a token."""
    total, count = 0.0, 0
    for micro in _micro_batches(base, rows):
        logprobs_N = batch_logprobs(base, micro.payload, policy)
        total -= float(logprobs_N.double().sum())
        count += len(logprobs_N)
    return total / count
