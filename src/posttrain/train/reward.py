"""The reward stage: preference pairs in, a reward model out: an adapter with a scalar head, started from a policy.

All completions of a prompt share it in one tree, and all pairs of a prompt are trained on in one step, so each completion of a
ranking is computed once and not once a pair. A score is read at the last token of its completion. After training the scores
are shifted so that the demonstrations have mean 0 (Ouyang et al. 2022, section 3.5).

C: completions, P: pairs.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from posttrain.data.packing import split_by_tokens
from posttrain.data.prepare import TrainRow
from posttrain.data.rankings import RankedPrompt, rank_prompts
from posttrain.data.sources import hashes_in, refuse_changed
from posttrain.data.stage_data import preference_rows_with_margins, sft_rows
from posttrain.losses.output import LossOutput
from posttrain.losses.reward import ScoredPairs, reward_loss
from posttrain.models.adapter_files import save_adapter, save_full
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, DeviceBatch, pack_rows, pack_trees, row_scores
from posttrain.models.heads import new_head
from posttrain.models.lora import LoraAdapter
from posttrain.stages.reward import RewardStage
from posttrain.stages.sft import SftStage
from posttrain.train.loop import MicroBatch, TrainTask
from posttrain.train.stage import (
    StageContext,
    StageResult,
    TrainedPolicy,
    fit_stage,
    loop_settings,
    seed_of,
    start_adapter,
    start_policy,
)

# Demonstrations that the shift is measured on; the standard error of their mean is a tenth of the scores' spread.
SHIFT_ROWS = 100


class PairBatch(NamedTuple):
    """A packed batch and its pairs [P]: their completions, margin, label probability and share of the prompt's weight."""

    batch: DeviceBatch
    chosen_P: Tensor
    rejected_P: Tensor
    margin_P: Tensor
    probability_P: Tensor
    share_P: Tensor
    prompts: int


def train_reward(context: StageContext, stage: RewardStage) -> StageResult:
    """Train on preference pairs. Raises DataError for data that cannot be trained on."""
    base = context.base
    prepared = preference_rows_with_margins(stage, base.chat, context.preparation)
    adapter, parameters = _start(context, stage)
    train, held_out = rank_prompts(prepared.train), rank_prompts(prepared.validation)

    def save(folder: Path) -> None:
        assert adapter.head is not None
        shift = mean_score(base, adapter.name, _shift_rows(context, stage, train))
        adapter.head = adapter.head._replace(shift=shift)
        if adapter.weights:
            save_adapter(folder, adapter, base)
        else:
            save_full(folder, base, adapter.head)

    policy = TrainedPolicy(adapter.name, parameters, save)
    task = reward_task(base, policy, train, held_out, center=stage.center)
    settings = loop_settings(stage, seed_of(stage, context.recipe))
    return fit_stage(context, stage, policy, task, settings, {**prepared.report, "kind": "reward", "prompts": len(train)})


def _start(context: StageContext, stage: RewardStage) -> tuple[LoraAdapter, dict[str, nn.Parameter]]:
    """The reward model before training, with a new head, and its trained parameters.

    It is a copy of the init policy's adapter, a new adapter, or the full weights in place.
    """
    base, name, seed = context.base, f"{stage.name} in training", seed_of(stage, context.recipe)
    width = base.model.get_input_embeddings().weight.shape[1]
    head = new_head(width, seed=seed, device=base.device)
    if context.recipe.adapter.kind == "full":
        full_weights = start_policy(context, stage).parameters
        adapter = base.adapters.add_head(name, head)
    else:
        full_weights = {}
        adapter = start_adapter(context, stage.init, name, seed=seed)
        adapter.head = head
    adapter.requires_grad_(True)
    return adapter, full_weights | adapter.parameters()


def reward_task(
    base: BaseModel, policy: TrainedPolicy, train: Sequence[RankedPrompt], held_out: Sequence[RankedPrompt], *, center: float
) -> TrainTask:
    """What a reward model learns from pairs; its rows are prompts."""

    def prompt_loss(micro: MicroBatch, step_prompts: int) -> LossOutput:
        batch: PairBatch = micro.payload
        score_C = row_scores(base, batch.batch, policy.routing)
        scored = score_C[batch.chosen_P], score_C[batch.rejected_P]
        pairs = ScoredPairs(*scored, batch.margin_P, batch.probability_P, batch.share_P)
        out = reward_loss(pairs, center=center, step_prompts=step_prompts)
        return LossOutput(out.loss, out.metrics | {"prompts": torch.tensor(batch.prompts)})

    def loss(micro: MicroBatch, step: Sequence[MicroBatch]) -> LossOutput:
        return prompt_loss(micro, sum(m.payload.prompts for m in step))

    @torch.no_grad()
    def validate() -> dict[str, float]:
        sums: dict[str, float] = {}
        for micro in micro_batches(base, held_out):
            for key, value in prompt_loss(micro, len(held_out)).metrics.items():
                sums[key] = sums.get(key, 0.0) + float(value)
        means = summarise(sums)
        return {f"reward/validation_{k[7:]}": means[k] for k in ("reward/loss", "reward/accuracy", "reward/gap")}

    return TrainTask(
        len(train), policy.parameters, lambda indices: micro_batches(base, [train[i] for i in indices]), loss, summarise,
        validate if held_out else None, "reward/validation_loss",
    )  # fmt: skip


def summarise(sums: dict[str, float]) -> dict[str, float]:
    """Means of a step over its prompts."""
    return {k: v / sums["prompts"] for k, v in sums.items() if k.startswith("reward/")}


def micro_batches(base: BaseModel, prompts: Sequence[RankedPrompt]) -> list[MicroBatch]:
    """Prompts with all of their completions, as many at once as fit."""
    batches = []
    for group in split_by_tokens([p.tokens for p in prompts], MICRO_TOKENS[base.device.type]):
        chosen = [prompts[i] for i in group]
        batch = _pair_batch(chosen, base.device)
        batches.append(MicroBatch(batch, batch.batch.tokens, tuple(p.id for p in chosen)))
    return batches


def _pair_batch(prompts: Sequence[RankedPrompt], device: torch.device) -> PairBatch:
    chosen, rejected, margin, probability, share = [], [], [], [], []
    first = 0  # the number of the prompt's first completion in the batch
    for prompt in prompts:
        for pair in prompt.pairs:
            chosen.append(first + pair.chosen)
            rejected.append(first + pair.rejected)
            margin.append(pair.margin)
            probability.append(pair.probability)
            share.append(1 / len(prompt.pairs))
        first += len(prompt.completions)
    places = [torch.tensor(x, device=device) for x in (chosen, rejected)]
    numbers = [torch.tensor(x, device=device) for x in (margin, probability, share)]
    batch = pack_trees((prompt.tree for prompt in prompts), device)
    return PairBatch(batch, places[0], places[1], numbers[0], numbers[1], numbers[2], len(prompts))


def _shift_rows(context: StageContext, stage: RewardStage, train: Sequence[RankedPrompt]) -> list[TrainRow]:
    """Rows whose mean score becomes 0: demonstrations of the nearest earlier sft stage, else chosen completions."""
    stages = {s.name: s for s in context.recipe.stage}
    name = stage.init
    while name in stages and not isinstance(stages[name], SftStage):
        name = stages[name].init
    sft = stages.get(name)
    if isinstance(sft, SftStage):
        without_validation = sft.model_copy(update={"validation": 0.0})
        prepared = sft_rows(without_validation, context.base.chat, context.preparation._replace(allow_dropped=1.0))
        refuse_changed(hashes_in(prepared.report), context.data)
        return prepared.train[:SHIFT_ROWS]
    full_rows = [[*p.prompt_ids, *p.completions[p.pairs[0].chosen]] for p in train[:SHIFT_ROWS]]
    return [TrainRow("", ids, [False] * len(ids)) for ids in full_rows]


@torch.no_grad()
def mean_score(base: BaseModel, adapter: str, rows: Sequence[TrainRow]) -> float:
    """Mean score of whole rows, read at their last token."""
    total = 0.0
    for group in split_by_tokens([len(r.ids) for r in rows], MICRO_TOKENS[base.device.type]):
        batch = pack_rows([rows[i] for i in group], base.device)
        total += float(row_scores(base, batch, adapter).double().sum())
    return total / len(rows)
