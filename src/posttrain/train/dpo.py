"""The dpo stage: preference pairs in, a policy out, trained against a fixed reference. A pair's probability weighs its loss.

Both completions of a pair share one prompt, which is computed once. The reference's log-probabilities are computed before the
first step and stored beside the checkpoints, so full fine-tuning needs no second model. Where the policy starts at its
reference, both must give the same log-probabilities before the first step.

B: pairs, N: targets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.data.packing import split_by_tokens
from posttrain.data.prepare import PairRow
from posttrain.data.stage_data import preference_rows
from posttrain.errors import TrainingError
from posttrain.losses.dpo import PairLogprobs, dpo_loss, log_ratio_divergence
from posttrain.losses.output import LossOutput
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, DeviceBatch, batch_logprobs, pack_pairs, sum_by_row
from posttrain.progress import Progress
from posttrain.stages.dpo import DpoStage
from posttrain.stop import StopSignal
from posttrain.train.checkpoint import CHECKPOINTS, Checkpoint, Owner, load_newest, save_checkpoint
from posttrain.train.loop import MicroBatch, TrainTask
from posttrain.train.schedule import run_order
from posttrain.train.stage import StageContext, StageResult, TrainedPolicy, fit_stage, loop_settings, seed_of, start_policy

# Nats a token by which a policy at its reference may differ from it.
START_DIVERGENCE = {torch.float32: 1e-6, torch.bfloat16: 1e-3}
# Nats by which the chosen completions may fall below the reference before the stage warns of displacement.
DISPLACEMENT_NATS = 1.0


class ReferencedBatch(NamedTuple):
    """A packed batch of pairs, the reference's log-probability of each of its targets [N], and the probability of each label
    [B], None if all are 1."""

    batch: DeviceBatch
    reference_N: Tensor
    label_B: Tensor | None


def train_dpo(context: StageContext, stage: DpoStage) -> StageResult:
    """Train on preference pairs. Raises DataError for data that cannot be trained on."""
    base = context.base
    prepared = preference_rows(stage, base.chat, context.preparation)
    name = stage.init if stage.reference == "init" else stage.reference
    # With less than one epoch the reference is not needed for pairs that no step sees.
    settings = loop_settings(stage, seed_of(stage, context.recipe))
    seen = {index for step in run_order(len(prepared.train), settings) for index in step}
    rows = [*(prepared.train[index] for index in sorted(seen)), *prepared.validation]
    adapter = context.policies.activate(name)
    reference = reference_logprobs(base, adapter, rows, context.folder, context.stop, owner=context.owner)
    policy = start_policy(context, stage)
    if name == stage.init:
        check_start(base, policy.routing, rows, reference, where=f'stage "{stage.name}"')
    task = dpo_task(base, policy, stage, prepared.train, prepared.validation, reference)
    return fit_stage(context, stage, policy, task, settings, prepared.report, check=_displacement)


def dpo_task(
    base: BaseModel, policy: TrainedPolicy, stage: DpoStage, train: Sequence[PairRow], held_out: Sequence[PairRow],
    reference: dict[str, Tensor],
) -> TrainTask:  # fmt: skip
    """What DPO learns from pairs."""

    def micro_batches(indices: Sequence[int]) -> list[MicroBatch]:
        return _micro_batches(base, [train[i] for i in indices], reference)

    def pair_loss(micro: MicroBatch, step_pairs: int) -> LossOutput:
        batch, reference_N, label_B = micro.payload
        logprobs_N = batch_logprobs(base, batch, policy.routing)
        chosen_B, rejected_B = sum_by_row(logprobs_N, batch).view(-1, 2).unbind(1)
        reference_chosen_B, reference_rejected_B = sum_by_row(reference_N, batch).view(-1, 2).unbind(1)
        pairs = PairLogprobs(chosen_B, rejected_B, reference_chosen_B, reference_rejected_B)
        out = dpo_loss(
            pairs, beta=stage.beta, loss=stage.loss, label_smoothing=stage.label_smoothing, step_pairs=step_pairs,
            label_B=label_B,
        )  # fmt: skip
        extra = {
            "pairs": torch.tensor(len(chosen_B)), "tokens": torch.tensor(len(logprobs_N)),
            "dpo/kl": log_ratio_divergence(logprobs_N, reference_N),
        }  # fmt: skip
        return LossOutput(out.loss, out.metrics | extra)

    def loss(micro: MicroBatch, step: Sequence[MicroBatch]) -> LossOutput:
        return pair_loss(micro, sum(m.payload.batch.rows // 2 for m in step))

    @torch.no_grad()
    def validate() -> dict[str, float]:
        sums: dict[str, float] = {}
        for micro in _micro_batches(base, held_out, reference):
            for key, value in pair_loss(micro, len(held_out)).metrics.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        means = summarise(sums)
        return {f"dpo/validation_{k[4:]}": means[k] for k in ("dpo/loss", "dpo/accuracy", "dpo/margin")}

    return TrainTask(
        len(train),
        policy.parameters,
        micro_batches,
        loss,
        summarise,
        validate if held_out else None,
        "dpo/validation_loss",
    )


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """Means of a step: of the KL over tokens, of everything else over pairs."""
    means = {k: v / sums["pairs"] for k, v in sums.items() if k.startswith("dpo/") and k != "dpo/kl"}
    return {**means, "dpo/kl": sums["dpo/kl"] / sums["tokens"]}


def _micro_batches(base: BaseModel, pairs: Sequence[PairRow], reference: dict[str, Tensor]) -> list[MicroBatch]:
    batches = []
    for group in split_by_tokens([_length(p) for p in pairs], MICRO_TOKENS[base.device.type]):
        chosen = [pairs[i] for i in group]
        batch = pack_pairs(chosen, base.device)
        reference_N = torch.cat([reference[p.id] for p in chosen]).to(base.device)
        soft = any(p.probability != 1 for p in chosen)
        label_B = torch.tensor([p.probability for p in chosen], device=base.device) if soft else None
        batches.append(MicroBatch(ReferencedBatch(batch, reference_N, label_B), batch.tokens, tuple(p.id for p in chosen)))
    return batches


def _length(pair: PairRow) -> int:
    return len(pair.prompt_ids) + len(pair.chosen_ids) + len(pair.rejected_ids)


@torch.no_grad()
def reference_logprobs(
    base: BaseModel, policy: str, pairs: Sequence[PairRow], folder: Path, stop: StopSignal, *, owner: Owner | None = None
) -> dict[str, Tensor]:
    """The reference's log-probability of every target of every pair: id -> [chosen tokens, then rejected tokens].

    Stored in the stage's folder, so that a resumed stage reads the numbers that it trained against.
    """
    store = folder / CHECKPOINTS / "reference"
    store.parent.mkdir(parents=owner is None, exist_ok=True)
    saved = load_newest(store, owner)
    if saved is not None and saved.tensors.keys() >= {p.id for p in pairs}:
        return saved.tensors
    logprobs: dict[str, Tensor] = {}
    progress = Progress("reference", len(pairs))
    for group in split_by_tokens([_length(p) for p in pairs], MICRO_TOKENS[base.device.type]):
        chosen = [pairs[i] for i in group]
        batch = pack_pairs(chosen, base.device)
        lengths = [len(p.chosen_ids) + len(p.rejected_ids) for p in chosen]
        parts = torch.split(batch_logprobs(base, batch, policy).cpu(), lengths)
        logprobs |= {p.id: part.clone() for p, part in zip(chosen, parts, strict=True)}
        progress.update(len(chosen), tokens=batch.tokens)
        stop.check("computing the reference")
    save_checkpoint(store, 0, Checkpoint(logprobs, {"policy": policy}), owner=owner)
    return logprobs


@torch.no_grad()
def check_start(
    base: BaseModel, policy: str, pairs: Sequence[PairRow], reference: dict[str, Tensor], *, where: str
) -> None:  # fmt: skip
    """Check that a policy that starts at its reference agrees with it on the first micro-batch. Raises TrainingError.

    A resumed run is checked too, before its weights are restored: a reference that was computed in another precision or on
    another device would make every later log-ratio wrong.
    """
    # The batch that the reference was computed in: in bfloat16 another packing gives other numbers.
    first = split_by_tokens([_length(p) for p in pairs], MICRO_TOKENS[base.device.type])[0]
    batch, reference_N, _ = _micro_batches(base, [pairs[i] for i in first], reference)[0].payload
    logprobs_N = batch_logprobs(base, batch, policy)
    divergence = float(log_ratio_divergence(logprobs_N, reference_N)) / len(reference_N)
    allowed = START_DIVERGENCE[base.dtype]
    if not divergence <= allowed:
        raise TrainingError(
            where, f"policy and reference differ by {divergence:.1e} nats a token before the first step",
            allowed=f"at most {allowed:.0e}", do="the stage was begun on another machine: remove its unfinished folder",
        )  # fmt: skip


def _displacement(metrics: dict[str, float]) -> tuple[str, ...]:
    """Likelihood displacement (Razin et al. 2024): the margin grows while the chosen completions become unlikely."""
    fallen = metrics.get("dpo/chosen_log_ratio", 0.0)
    if fallen > -DISPLACEMENT_NATS:
        return ()
    return (
        f"likelihood displacement: the chosen completions ended {-fallen:.1f} nats less likely than under the reference; "
        "lower learning_rate or epochs, or raise beta",
    )
