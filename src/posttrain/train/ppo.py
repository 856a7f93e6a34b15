"""The ppo stage: a policy samples, reward models or functions score, and the policy moves towards what scored more.

An iteration samples completions of prompts with the policy as it stands, scores them, and takes `ppo_epochs` passes over them
in minibatches. Policy, reference, reward model and value function are adapters on one base. An iteration's rollouts lie on disk
before its first step, so a stage that is stopped in the middle of an iteration goes on with the very same tokens. Everything an
iteration draws is a function of (seed, iteration).

Before the first step of an iteration policy and sampler are the same: ratio 1 and approximate KL 0 exactly, or the stage ends.

N: tokens, B: completions.
"""

import time
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from posttrain.data.prepare import TrainRow
from posttrain.data.prompts import check_room, prepare_prompts
from posttrain.data.ptx import prepare_ptx, with_ptx
from posttrain.errors import TrainingError
from posttrain.losses.kl import k3
from posttrain.losses.output import LossOutput
from posttrain.losses.ppo import PolicyTokens, ValueTokens, policy_loss, value_loss
from posttrain.models.batches import DeviceBatch, pack_trees
from posttrain.settings import PpoStage, reward_parts
from posttrain.train.gold import open_gold
from posttrain.train.guards import why_ended
from posttrain.train.loop import MicroBatch, TrainTask
from posttrain.train.memory import ActivationCounter, fixed_memory
from posttrain.train.ptx import PtxBatch, ptx_batches, ptx_loss
from posttrain.train.rewards import RewardScorer
from posttrain.train.roles import Roles
from posttrain.train.rollout_store import Iterations
from posttrain.train.rollouts import Rollouts
from posttrain.train.stage import StageContext, StageResult, TrainedPolicy, fit_stage, seed_of, start_policy
from posttrain.train.value import start_value, value_name


class PpoBatch(NamedTuple):
    """A packed batch of prompts with completions, and what each of its tokens was worth [N]."""

    batch: DeviceBatch
    old_N: Tensor
    advantage_N: Tensor
    value_N: Tensor
    return_N: Tensor
    first: bool
    # For a value function with an adapter of its own, so that the activations of both are never there at once.
    own_value: bool = False


def train_ppo(context: StageContext, stage: PpoStage) -> StageResult:
    """Train towards what scores. Raises DataError for prompts that cannot be used, TrainingError where PPO cannot go on."""
    base, seed = context.base, seed_of(stage, context.recipe)
    prepared = prepare_prompts(
        stage.data, base.chat, seed=context.recipe.seed, max_prompt_tokens=stage.max_prompt_tokens,
        evaluation_prompts=context.evaluation_prompts, validation=stage.validation if stage.gold else 0.0,
    )  # fmt: skip
    where = f'stage "{stage.name}"'
    check_room([*prepared.train, *prepared.validation], max_new_tokens=stage.max_new_tokens, context=base.context, where=where)
    report, ptx = prepared.report, []
    if stage.ptx_data:
        found = prepare_ptx(
            stage, base.chat, seed=context.recipe.seed, evaluation_prompts=context.evaluation_prompts, context=base.context
        )
        report, ptx = with_ptx(report, found.report), found.train
    reference = stage.init if stage.reference == "init" else stage.reference
    context.policies.activate(reference)  # one that cannot be read is told before anything is sampled
    judge = RewardScorer(reward_parts(stage.reward), context.policies, where=where, stop=context.stop, sources=context.sources)
    gold = open_gold(context, stage, prepared.validation, judge) if stage.gold else None
    policy = start_policy(context, stage)
    if policy.routing != "base":
        base.adapters.get(policy.routing).without_dropout()
    value = start_value(context, stage, policy.routing)
    roles = Roles(base, stage.temperature, policy.routing, reference, judge, value, gold)
    run = _Update(stage, roles, Iterations(context, stage, prepared.train, roles), ptx, seed)
    fresh: dict[str, float] = {}

    def publish(folder: Path) -> None:
        if gold is not None:
            fresh.update(gold.measure_published(policy.routing, roles.logprobs))
        policy.save(folder)

    trained = TrainedPolicy(policy.routing, policy.parameters | (value.parameters if value else {}), publish)
    try:
        result = fit_stage(context, stage, trained, run.task(trained.parameters), report, check=run.warnings)
        # Gold of the step that was published is the highest of several; of the fresh answers it is not.
        return result._replace(fit=result.fit._replace(metrics=result.fit.metrics | fresh))
    finally:
        base.adapters.remove(value_name(stage))
        judge.close()
        if gold is not None:
            gold.judge.close()


class _Update:
    """What is learned from the iterations; all of its state is on disk or a function of the step."""

    def __init__(self, stage: PpoStage, roles: Roles, iterations: Iterations, ptx: Sequence[TrainRow], seed: int) -> None:
        self.stage, self.roles, self.iterations, self.ptx, self.seed = stage, roles, iterations, ptx, seed
        self.base, self.policy, self.gold, self.steps = roles.base, roles.policy, roles.gold, iterations.steps
        self.begun, self.tokens, self.kept = 0.0, 0, ActivationCounter(roles.base)  # of the step in hand
        self.memory: dict[str, float] = {}

    def task(self, parameters: dict[str, nn.Parameter]) -> TrainTask:
        """PPO as the loop sees it; a row is an optimiser step."""
        steps, faster = self.stage.iterations * self.steps, self.stage.value_learning_rate / self.stage.learning_rate
        value = self.roles.value.parameters if self.roles.value else {}
        self.memory = fixed_memory(self.roles, self.stage, parameters.values())
        task = TrainTask(
            steps, parameters, self.batches_at, self._loss, self._summarise, None, "ppo/score", by_step=True,
            next_step=self.next_step if self.stage.max_update_kl else None, rates=dict.fromkeys(value, faster),
        )  # fmt: skip
        if self.gold is None:
            return task
        return task._replace(
            validate_at=lambda step: self._measure(step // self.steps), validate_every=self.steps * self.stage.gold_every,
            validation_metric="ppo/gold", higher_is_better=True,
        )  # fmt: skip

    def warnings(self, _: dict[str, float]) -> tuple[str, ...]:
        """Why the stage ended before its last iteration, where it did."""
        why = why_ended(self.iterations.newest().stats, self.stage)
        after = f"ended after {self.iterations.number} of {self.stage.iterations} iterations"
        ended = (f"{after}: {why}; lower learning_rate or raise kl_coef",) if why else ()
        return ended + (self.gold.warnings() if self.gold is not None else ())

    def next_step(self, step: int) -> int:
        """The step itself, or the first of the next iteration where the passes so far moved the policy by `max_update_kl`."""
        iteration, inside = divmod(step, self.steps)
        if inside % self.iterations.minibatches or not inside:
            return step
        return (iteration + 1) * self.steps if self._moved(self.iterations.at(iteration)) > self.stage.max_update_kl else step

    @torch.no_grad()
    def _moved(self, rollouts: Rollouts) -> float:
        """Approximate KL from the policy that sampled to the policy now, over all of the iteration's tokens, nats a token."""
        total, start = 0.0, 0
        for group in self.iterations.groups(rollouts.prompts, rollouts.completions, range(len(rollouts.prompts))):
            batch = pack_trees(((rollouts.prompts[i], rollouts.completions[i]) for i in group), self.base.device)
            logprobs_N = self.roles.logprobs(batch, self.policy).cpu()
            total += float(k3(rollouts.old_N[start : start + len(logprobs_N)], logprobs_N).double().sum())
            start += len(logprobs_N)
        return total / start

    def batches_at(self, steps: Sequence[int]) -> list[MicroBatch]:
        """The micro-batches of one step; none where the KL ceiling was passed, which ends the stage."""
        (step,) = steps
        iteration, inside = divmod(step, self.steps)
        epoch, minibatch = divmod(inside, self.iterations.minibatches)
        if inside == 0:
            if self.gold is not None and self.gold.stops(iteration):
                return []
            self.iterations.roll(iteration)
        rollouts = self.iterations.at(iteration)
        if why_ended(rollouts.stats, self.stage):
            return []
        order = list(range(len(rollouts.prompts)))
        if epoch:  # the first pass is packed as the log-probabilities were
            order = torch.randperm(len(order), generator=self.iterations.generator(iteration, epoch)).tolist()
        chosen = order[minibatch * self.stage.minibatch : (minibatch + 1) * self.stage.minibatch]
        micros = self._micros(rollouts, chosen, first=inside == 0)
        if self.roles.value is not None and not self.roles.shared:
            micros += [MicroBatch(m.payload._replace(own_value=True), 0, m.row_ids) for m in micros]
        micros += ptx_batches(self.base, self.ptx, step, size=self.stage.minibatch, seed=self.seed)
        self.begun, self.tokens, self.kept = time.monotonic(), sum(m.tokens for m in micros), ActivationCounter(self.base)
        return micros

    def _measure(self, iteration: int) -> dict[str, float]:
        assert self.gold is not None
        return self.gold.measure(self.policy, iteration, self.roles.logprobs)

    def _micros(self, rollouts: Rollouts, chosen: Sequence[int], *, first: bool) -> list[MicroBatch]:
        """Prompts of one step with their completions, as many at once as fit."""
        places, asked = rollouts.tokens_of(), self.iterations.asked(self.iterations.number)
        flat = (rollouts.old_N, rollouts.advantage_N, rollouts.value_N, rollouts.return_N)
        found = []
        for group in self.iterations.groups(rollouts.prompts, rollouts.completions, chosen):
            batch = pack_trees(((rollouts.prompts[i], rollouts.completions[i]) for i in group), self.base.device)
            tokens = torch.cat([torch.arange(start, stop) for i in group for start, stop in places[i]])
            parts = [x[tokens].to(self.base.device) for x in flat]
            payload = PpoBatch(batch, parts[0], parts[1], parts[2], parts[3], first)
            names = tuple(f"{asked[i].id} (iteration {self.iterations.number + 1})" for i in group)
            found.append(MicroBatch(payload, batch.tokens, names))
        return found

    def _loss(self, micro: MicroBatch, step: Sequence[MicroBatch]) -> LossOutput:
        with self.kept.counted():
            return self._learned(micro, step)

    def _learned(self, micro: MicroBatch, step: Sequence[MicroBatch]) -> LossOutput:
        if isinstance(micro.payload, PtxBatch):
            return ptx_loss(self.base, self.policy, micro, step, coef=self.stage.ptx_coef)
        payload: PpoBatch = micro.payload
        total = sum(len(m.payload.old_N) for m in step if isinstance(m.payload, PpoBatch) and not m.payload.own_value)
        if payload.own_value:
            return self._value_loss(payload, self.roles.own_values(payload.batch), total)
        logprobs_N, value_N = self.roles.outputs(payload.batch)
        tokens = PolicyTokens(logprobs_N, payload.old_N, payload.advantage_N)
        out = policy_loss(tokens, clip=self.stage.clip_range, step_tokens=total, entropy_coef=self.stage.entropy_coef)
        if payload.first and float(out.metrics["ppo/approximate_kl"]) != 0:
            raise TrainingError(
                f'stage "{self.stage.name}"', "the policy is not the one that sampled, before the first step of an iteration",
                do="this is a defect of posttrain, or of the machine: two equal computations differ",
            )  # fmt: skip
        loss, metrics = out.loss, {**out.metrics, "tokens": torch.tensor(len(logprobs_N))}
        if value_N is not None:
            learned = self._value_loss(payload, value_N, total)
            loss, metrics = loss + learned.loss, metrics | learned.metrics
        return LossOutput(loss, metrics)

    def _value_loss(self, payload: PpoBatch, value_N: Tensor, total: int) -> LossOutput:
        values = ValueTokens(value_N, payload.value_N, payload.return_N)
        out = value_loss(values, clip=self.stage.value_clip, step_tokens=total)
        return LossOutput(self.stage.value_coef * out.loss, out.metrics)

    def _summarise(self, sums: dict[str, float]) -> dict[str, float]:
        means = {name: value / sums["tokens"] for name, value in sums.items() if name.startswith("ppo/")}
        loss = means["ppo/policy_loss"] + self.stage.value_coef * means.get("ppo/value_loss", 0.0)
        if "ptx/nll" in sums:
            means["ppo/ptx_loss"] = sums["ptx/nll"] / sums["ptx/targets"]
            loss += self.stage.ptx_coef * means["ppo/ptx_loss"]
        speed = {"time/update_tokens_per_second": self.tokens / (time.monotonic() - self.begun)}
        memory = {**self.memory, "memory/activations": self.kept.largest}
        return {"ppo/loss": loss, **means, **self.iterations.newest().stats, **memory, **speed}
