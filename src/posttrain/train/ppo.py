"""The ppo stage: a policy samples completions, rewards score them, and the policy moves towards those that scored more.

    for iteration:  sample; judge; advantages; for epoch: for minibatch: step            `PpoLoop.learn`

Policy, reference, reward models and value function are adapters on one base. An iteration's rollouts are on disk before the
first step on them, and everything an iteration draws is a function of (seed, iteration), so a stage that was stopped in the
middle of an iteration goes on with the same tokens. Before the first step of an iteration policy and sampler are the same: the
ratio is 1 and the approximate KL 0 exactly, or the stage ends with an error.
"""

import time
from pathlib import Path

import torch
from torch import nn

from posttrain.data.stage_data import PpoData, ppo_data
from posttrain.losses.kl import adapted, k3
from posttrain.stages.ppo import PpoStage
from posttrain.stages.reward_parts import reward_parts
from posttrain.train.gold import open_gold
from posttrain.train.guards import check_figures, check_sampler, why_ended
from posttrain.train.memory import cache_memory, fixed_memory, packed_memory
from posttrain.train.ppo_schedule import PpoSchedule
from posttrain.train.ppo_update import PpoUpdate
from posttrain.train.rewards import RewardScorer
from posttrain.train.roles import Roles
from posttrain.train.rollout_store import RolloutStore
from posttrain.train.rollouts import Rollouts, estimate_advantages, pack_prompts
from posttrain.train.sampling import JudgedSamples, PpoSampler, Samples
from posttrain.train.schedule import LoopSettings
from posttrain.train.stage import StageContext, StageResult, TrainedPolicy, seed_of, start_policy, training_stage
from posttrain.train.step import TrainingSteps
from posttrain.train.validation import Validation
from posttrain.train.value import start_value, value_name


def train_ppo(context: StageContext, stage: PpoStage) -> StageResult:
    """Train towards what scores. Raises DataError for prompts that cannot be used, TrainingError where PPO cannot go on."""
    base, where = context.base, f'stage "{stage.name}"'
    data = ppo_data(stage, base.chat, context.preparation)
    reference = stage.init if stage.reference == "init" else stage.reference
    context.policies.activate(reference)  # a reference that cannot be read fails here, before anything is sampled
    scorer = RewardScorer(
        reward_parts(stage.reward), context.policies, where=where, stop=context.stop, sources=context.sources
    )  # fmt: skip
    gold = open_gold(context, stage, data.prompts.validation, scorer) if stage.gold else None
    policy = start_policy(context, stage)
    if policy.routing != "base":
        base.adapters.get(policy.routing).without_dropout()
    value = start_value(context, stage, policy.routing)
    roles = Roles(base, stage.temperature, policy.routing, reference, scorer, value, gold)
    trained = policy.parameters | (value.parameters if value is not None else {})
    published: dict[str, float] = {}

    def save(folder: Path) -> None:
        # The gold that chose the weights is the highest of several and so too high; the gold of fresh answers is not.
        if gold is not None:
            published.update(gold.measure_published(policy.routing, roles.logprobs))
        policy.save(folder)

    loop = PpoLoop(context, stage, roles, data, trained)
    try:
        with training_stage(context, TrainedPolicy(policy.routing, trained, save), data.report):
            training = _training_steps(context, stage, roles, loop.schedule, trained)
            with training.resumed():
                if not training.finished:
                    loop.learn(training)
            fit = training.publish()
        result = fit._replace(metrics=fit.metrics | published)
        return StageResult(result, data.report, (*data.report["warnings"], *loop.warnings()))
    finally:
        base.adapters.remove(value_name(stage))
        scorer.close()
        if gold is not None:
            gold.gold_scorer.close()


def ppo_settings(stage: PpoStage, seed: int) -> LoopSettings:
    """The optimiser's settings. A ppo stage has no rows: `PpoSchedule` says how many steps it takes."""
    return LoopSettings(
        epochs=1, batch=1, learning_rate=stage.learning_rate, schedule=stage.schedule, warmup=stage.warmup,
        weight_decay=stage.weight_decay, clip=stage.clip, keep="best" if stage.gold else "last", patience=0,
        validate_every=0, checkpoint_every=stage.checkpoint_every, checkpoint_minutes=stage.checkpoint_minutes, seed=seed,
    )  # fmt: skip


class PpoLoop:
    """The iterations of a stage. Its state is on disk or a function of the number of the optimiser step."""

    def __init__(
        self, context: StageContext, stage: PpoStage, roles: Roles, data: PpoData, parameters: dict[str, nn.Parameter]
    ) -> None:
        self.base, self.stage, self.roles, self.gold = context.base, stage, roles, roles.gold
        self.where, self.seed = f'stage "{stage.name}"', seed_of(stage, context.recipe)
        self.schedule = PpoSchedule(stage, data.prompts.train, self.seed)
        self.sampler = PpoSampler(context, stage, self.schedule, roles, self.seed)
        self.store = RolloutStore(context.folder, context.owner, steps=self.schedule.steps, where=self.where)
        self.update = PpoUpdate(stage, roles, data.ptx, self.seed)
        self.memory = fixed_memory(roles, stage, parameters.values())

    def learn(self, training: TrainingSteps) -> None:
        """Sample, judge, estimate advantages and update, from the step that the stage was stopped at."""
        stage, schedule = self.stage, self.schedule
        for iteration in range(training.step // schedule.steps, stage.iterations):
            first_step = iteration * schedule.steps
            with training.saved_on_failure():
                if training.step > first_step:  # the stage was stopped in the middle of this iteration
                    rollouts = self.store.load(iteration)
                elif self.gold is not None and self.gold.stops(iteration):
                    break
                else:
                    samples = self.sampler.sample(iteration)
                    judged = self.sampler.judge(samples)
                    rollouts = self.advantages(samples, judged)
                    self.store.save(iteration, rollouts)
                    self.sampler.write_samples(samples, judged.samples.score_B)
            if why_ended(rollouts.stats, stage):
                break
            names = [f"{row.id} (iteration {iteration + 1})" for row in schedule.prompts_of(iteration)]
            for epoch in range(stage.ppo_epochs):
                for minibatch, chosen in enumerate(schedule.minibatches_of(iteration, epoch)):
                    step = first_step + epoch * schedule.minibatches + minibatch
                    if step < training.step:  # taken before the stage was stopped, or left out
                        continue
                    taken, metrics = self.update.step(training, rollouts, chosen, names, first=step == first_step)
                    metrics |= rollouts.stats | self.memory | {"train/epoch": (step + 1) / schedule.total_steps}
                    training.record(taken, metrics, left_out=self.left_out(step, rollouts))
        if not training.finished:
            training.finish()

    def advantages(self, samples: Samples, judged: JudgedSamples) -> Rollouts:
        """Rewards, advantages and statistics of an iteration.

        Raises NonFiniteError where a statistic is not finite, TrainingError where the sampler is not the policy in training.
        """
        rollouts = estimate_advantages(judged.samples, self.stage, self.kl_coefficient(samples.iteration))
        check_figures(rollouts.stats, where=f"{self.where} · iteration {samples.iteration + 1}")
        check_sampler(rollouts.stats["ppo/mismatch"], self.stage)
        seconds = time.monotonic() - samples.started
        speed = {"time/rollout": seconds, "time/rollout_tokens_per_second": len(rollouts.old_N) / seconds}
        memory = {
            "memory/cache": cache_memory(self.base, rollouts.prompts, self.stage),
            "memory/packed": packed_memory(self.base),
        }
        return rollouts._replace(stats={**rollouts.stats, **judged.scores.metrics(), **memory, **speed})

    def kl_coefficient(self, iteration: int) -> float:
        """What a nat of KL costs: `kl_coef`, or with `target_kl` the coefficient adapted to the KL of the iteration before."""
        stage = self.stage
        if not stage.target_kl or iteration == 0:
            return stage.kl_coef
        before = self.store.load(iteration - 1).stats
        return adapted(
            before["ppo/kl_coef"], kl=before["ppo/kl"], target=stage.target_kl,
            completions=self.schedule.count * stage.completions, horizon=stage.kl_horizon,
        )  # fmt: skip

    def left_out(self, step: int, rollouts: Rollouts) -> int:
        """Steps after this one that the iteration leaves out: those of its remaining passes where a pass has just ended and the
        passes so far moved the policy by more than `max_update_kl`.
        """
        inside = (step + 1) % self.schedule.steps
        if not self.stage.max_update_kl or not inside or inside % self.schedule.minibatches:
            return 0
        return self.schedule.steps - inside if self.update_kl(rollouts) > self.stage.max_update_kl else 0

    @torch.no_grad()
    def update_kl(self, rollouts: Rollouts) -> float:
        """Approximate KL from the policy that sampled to the policy now, over all of the iteration's tokens, nats a token."""
        total, start = 0.0, 0
        positions = range(len(rollouts.prompts))
        for _, batch in pack_prompts(rollouts.prompts, rollouts.completions, positions, self.base.device):
            logprobs_N = self.roles.logprobs(batch, self.roles.policy).cpu()
            old_N = rollouts.old_N[start : start + len(logprobs_N)]
            total += float(k3(old_N, logprobs_N).double().sum())
            start += len(logprobs_N)
        return total / start

    def warnings(self) -> tuple[str, ...]:
        """Why the stage ended before its last iteration, where it did, and what gold says."""
        iteration, rollouts = self.store.newest()
        why = why_ended(rollouts.stats, self.stage)
        ended = f"ended after {iteration} of {self.stage.iterations} iterations: {why}; lower learning_rate or raise kl_coef"
        return (*([ended] if why else []), *(self.gold.warnings() if self.gold is not None else ()))


def _training_steps(
    context: StageContext, stage: PpoStage, roles: Roles, schedule: PpoSchedule, parameters: dict[str, nn.Parameter]
) -> TrainingSteps:
    """The optimiser steps of the stage. The value function has a learning rate of its own; gold, if any, is the validation."""
    gold, value_rate = roles.gold, stage.value_learning_rate / stage.learning_rate
    validation = None
    if gold is not None:
        validation = Validation(
            lambda step: gold.measure(roles.policy, step // schedule.steps, roles.logprobs), "ppo/gold",
            every=schedule.steps * stage.gold_every, higher_is_better=True, at_start=True,
        )  # fmt: skip
    return TrainingSteps(
        parameters, ppo_settings(stage, seed_of(stage, context.recipe)), context.folder, steps=schedule.total_steps,
        label=stage.name, stop=context.stop, trackers=context.trackers, owner=context.owner, validation=validation,
        rates=dict.fromkeys(roles.value.parameters, value_rate) if roles.value is not None else {},
    )  # fmt: skip
