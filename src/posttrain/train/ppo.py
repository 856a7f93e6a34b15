"""The ppo stage: a policy samples, a reward model scores, and the policy moves towards what scored more.

An iteration samples completions of prompts with the policy as it stands, scores them, and takes `ppo_epochs` passes over them
in minibatches. Policy, reference, reward model and value function are adapters on one base. An iteration's rollouts lie on disk
before its first step, so a stage that is stopped in the middle of an iteration goes on with the very same tokens. Everything an
iteration draws is a function of (seed, iteration).

Before the first step of an iteration policy and sampler are the same: ratio 1 and approximate KL 0 exactly, or the stage ends.

N: tokens, B: completions.
"""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from posttrain.artifacts import write_jsonl
from posttrain.data.packing import split_by_tokens
from posttrain.data.prompts import PromptRow, prepare_prompts
from posttrain.errors import Interrupted, TrainingError
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.losses.kl import adapted
from posttrain.losses.output import LossOutput
from posttrain.losses.ppo import PolicyTokens, ValueTokens, policy_loss, value_loss
from posttrain.models.batches import MICRO_TOKENS, DeviceBatch, pack_trees, row_scores
from posttrain.models.lora import LoraAdapter
from posttrain.progress import Progress
from posttrain.records import Rollout
from posttrain.settings import PpoStage
from posttrain.train.checkpoint import Checkpoint, load_step, save_checkpoint
from posttrain.train.loop import MicroBatch, TrainTask
from posttrain.train.rollouts import Rollouts, Sampled, from_tensors, judge_rollouts, to_tensors
from posttrain.train.stage import StageContext, StageResult, TrainedPolicy, fit_stage, start_policy

SAMPLES = "samples.jsonl"
SHOWN = 5


class PpoBatch(NamedTuple):
    """A packed batch of prompts with completions, and what each of its tokens was worth [N]."""

    batch: DeviceBatch
    old_N: Tensor
    advantage_N: Tensor
    value_N: Tensor
    return_N: Tensor
    first: bool


def train_ppo(context: StageContext, stage: PpoStage) -> StageResult:
    """Train against a reward model. Raises DataError for prompts that cannot be used, TrainingError where PPO cannot go on."""
    base, seed = context.base, context.recipe.seed
    prepared = prepare_prompts(
        stage.data, base.chat, seed=seed, max_prompt_tokens=stage.max_prompt_tokens,
        evaluation_prompts=context.evaluation_prompts,
    )  # fmt: skip
    reference = context.policies.activate(stage.init if stage.reference == "init" else stage.reference)
    policy = start_policy(context, stage)
    _without_dropout(base.adapters.get(policy.routing))
    run = _PpoRun(context, stage, prepared.train, policy.routing, reference, context.policies.activate(stage.reward))
    trained = TrainedPolicy(policy.routing, policy.parameters | run.value_parameters(), policy.save)
    try:
        return fit_stage(context, stage, trained, run.task(trained.parameters), prepared.report)
    finally:
        base.adapters.remove(run.value_name)


def _without_dropout(adapter: LoraAdapter) -> None:
    """A policy that drops inputs while it learns is not the one that sampled."""
    adapter.settings = adapter.settings._replace(dropout=0.0)


class _PpoRun:
    """The iteration in hand; all of its state is on disk or a function of the step."""

    def __init__(
        self, context: StageContext, stage: PpoStage, prompts: Sequence[PromptRow], policy: str, reference: str, reward: str
    ) -> None:
        self.base, self.stage, self.folder, self.stop = context.base, stage, context.folder, context.stop
        self.seed, self.prompts = context.recipe.seed, prompts
        self.policy, self.reference, self.reward = policy, reference, reward
        self.value_name = f"{stage.name} value in training"
        self.value: LoraAdapter | None = None
        if stage.estimator == "gae":
            self.value = self.base.adapters.copy(reward, self.value_name)
            _without_dropout(self.value)
            self.value.requires_grad_(True)
        self.asked = min(stage.prompts, len(prompts))
        self.minibatches = -(-self.asked // stage.minibatch)
        self.iteration = -1
        self.rollouts: Rollouts | None = None

    def value_parameters(self) -> dict[str, nn.Parameter]:
        """The value function's adapter and head, under names of their own."""
        return {f"value.{name}": p for name, p in self.value.parameters().items()} if self.value is not None else {}

    def task(self, parameters: dict[str, nn.Parameter]) -> TrainTask:
        """PPO as the loop sees it; a row is an optimiser step."""
        steps = self.stage.iterations * self.stage.ppo_epochs * self.minibatches
        return TrainTask(steps, parameters, self.batches_at, self._loss, self._summarise, None, "ppo/score", by_step=True)

    def batches_at(self, steps: Sequence[int]) -> list[MicroBatch]:
        """The micro-batches of one step; none where the KL ceiling was passed, which ends the stage."""
        (step,) = steps
        iteration, inside = divmod(step, self.stage.ppo_epochs * self.minibatches)
        epoch, minibatch = divmod(inside, self.minibatches)
        if inside == 0:
            self._roll(iteration)
        elif iteration != self.iteration:
            self._restore(iteration)
        rollouts = self.rollouts
        assert rollouts is not None
        if rollouts.stats["ppo/kl"] > self.stage.max_kl > 0:
            return []
        order = list(range(len(rollouts.prompts)))
        if epoch:  # the first pass is packed as the log-probabilities were
            order = torch.randperm(len(order), generator=self._generator(iteration, epoch)).tolist()
        chosen = order[minibatch * self.stage.minibatch : (minibatch + 1) * self.stage.minibatch]
        groups = self._groups(rollouts.prompts, rollouts.completions, chosen)
        return [self._micro(rollouts, group, first=inside == 0) for group in groups]

    def _generator(self, iteration: int, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + iteration * 1009 + epoch) % (2**31 - 1))

    def _groups(self, prompts: list[list[int]], completions: list[list[list[int]]], chosen: Sequence[int]) -> list[list[int]]:
        """Numbers of prompts that are computed at once."""
        lengths = [len(prompts[i]) + sum(map(len, completions[i])) for i in chosen]
        return [[chosen[k] for k in group] for group in split_by_tokens(lengths, MICRO_TOKENS[self.base.device.type])]

    def _micro(self, rollouts: Rollouts, group: Sequence[int], *, first: bool) -> MicroBatch:
        batch = pack_trees(((rollouts.prompts[i], rollouts.completions[i]) for i in group), self.base.device)
        places = rollouts.tokens_of()
        tokens = torch.cat([torch.arange(start, stop) for i in group for start, stop in places[i]])
        flat = (rollouts.old_N, rollouts.advantage_N, rollouts.value_N, rollouts.return_N)
        parts = [x[tokens].to(self.base.device) for x in flat]
        payload = PpoBatch(batch, parts[0], parts[1], parts[2], parts[3], first)
        return MicroBatch(payload, batch.tokens, tuple(f"iteration {self.iteration + 1} prompt {i}" for i in group))

    def _loss(self, micro: MicroBatch, step: Sequence[MicroBatch]) -> LossOutput:
        payload: PpoBatch = micro.payload
        total = sum(len(m.payload.old_N) for m in step)
        logprobs_N = self._logprobs(payload.batch, self.policy)
        tokens = PolicyTokens(logprobs_N, payload.old_N, payload.advantage_N)
        out = policy_loss(tokens, clip=self.stage.clip_range, step_tokens=total)
        if payload.first and float(out.metrics["ppo/approximate_kl"]) != 0:
            raise TrainingError(
                f'stage "{self.stage.name}"', "the policy is not the one that sampled, before the first step of an iteration",
                do="this is a defect of posttrain, or of the machine: two equal computations differ",
            )  # fmt: skip
        loss, metrics = out.loss, {**out.metrics, "tokens": torch.tensor(len(logprobs_N))}
        if self.value is not None:
            values = ValueTokens(self._values(payload.batch), payload.value_N, payload.return_N)
            learned = value_loss(values, clip=self.stage.value_clip, step_tokens=total)
            loss, metrics = loss + self.stage.value_coef * learned.loss, metrics | learned.metrics
        return LossOutput(loss, metrics)

    def _summarise(self, sums: dict[str, float]) -> dict[str, float]:
        assert self.rollouts is not None
        means = {name: value / sums["tokens"] for name, value in sums.items() if name.startswith("ppo/")}
        value = self.stage.value_coef * means.get("ppo/value_loss", 0.0)
        return {"ppo/loss": means["ppo/policy_loss"] + value, **means, **self.rollouts.stats}

    def _logprobs(self, batch: DeviceBatch, adapter: str) -> Tensor:
        """log p of every token of the completions [N] at the stage's temperature."""
        hidden_TD = self.base.hidden(batch.ids_T, batch.positions_T, batch.segments, adapter)
        return self.base.logprobs(hidden_TD[batch.source_N] / self.stage.temperature, batch.target_N, adapter)

    def _values(self, batch: DeviceBatch) -> Tensor:
        """What was to be expected before each token of the completions [N]."""
        assert self.value is not None
        hidden_TD = self.base.hidden(batch.ids_T, batch.positions_T, batch.segments, self.value.name)
        return self.base.scores(hidden_TD[batch.source_N], self.value.name)

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def _roll(self, iteration: int) -> None:
        """Sample, score and judge one iteration, and put it on disk."""
        sampled, answers = self._sample(iteration)
        rollouts = judge_rollouts(sampled, self.stage, self._coefficient(iteration))
        mismatch = rollouts.stats["ppo/mismatch"]
        if mismatch > self.stage.max_mismatch:
            raise TrainingError(
                f'stage "{self.stage.name}"', f"{mismatch:.1%} of the sampled tokens have another probability in training",
                allowed=f"at most {self.stage.max_mismatch:.0%} (max_mismatch)", do='use [base] dtype = "float32"',
            )  # fmt: skip
        save_checkpoint(self._kept, iteration, Checkpoint(*to_tensors(rollouts)))
        self._show(iteration, sampled, answers)
        self.iteration, self.rollouts = iteration, rollouts

    @property
    def _kept(self) -> Path:
        return self.folder / "checkpoints" / "rollouts"

    def _restore(self, iteration: int) -> None:
        saved = load_step(self._kept, iteration)
        if saved is None:
            raise TrainingError(
                f'stage "{self.stage.name}"', f"the rollouts of iteration {iteration + 1} are missing or damaged",
                do="remove the stage's unfinished folder to begin it again",
            )  # fmt: skip
        self.iteration, self.rollouts = iteration, from_tensors(*saved)

    def _coefficient(self, iteration: int) -> float:
        """The KL coefficient: fixed, or moved by how far the iteration before went."""
        stage = self.stage
        if not stage.target_kl or iteration == 0:
            return stage.kl_coef
        if self.iteration != iteration - 1:
            self._restore(iteration - 1)
        before = self.rollouts
        assert before is not None
        completions = self.asked * stage.completions
        kl, target = before.stats["ppo/kl"], stage.target_kl
        return adapted(before.stats["ppo/kl_coef"], kl=kl, target=target, completions=completions, horizon=stage.kl_horizon)

    def _sample(self, iteration: int) -> tuple[Sampled, list[Rollout]]:
        stage, base = self.stage, self.base
        order = torch.randperm(len(self.prompts), generator=self._generator(iteration, 0)).tolist()
        chosen = [self.prompts[i] for i in order[: self.asked]]
        settings = SamplingSettings(stage.max_new_tokens, stage.temperature, 1.0, self.seed * 1009 + iteration)
        asked = [row.ids for row in chosen for _ in range(stage.completions)]
        answers = generate(base, asked, settings, self.policy, advance=self._watch(len(asked), iteration))
        completions = [
            [list(a.completion_ids) for a in answers[k : k + stage.completions]]
            for k in range(0, len(answers), stage.completions)
        ]
        prompts = [row.ids for row in chosen]
        old_N, reference_N, value_N, score_B = self._judged(prompts, completions)
        sampler_N = torch.tensor([p for a in answers for p in a.logprobs])
        ended_B = torch.tensor([a.ended for a in answers])
        return Sampled(prompts, completions, ended_B, score_B, old_N, sampler_N, reference_N, value_N), answers

    def _judged(self, prompts: list[list[int]], completions: list[list[list[int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities under policy and reference, values [N], and scores [B]; packed as the first pass will be."""
        old, reference, value, score = [], [], [], []
        for start in range(0, len(prompts), self.stage.minibatch):
            minibatch = list(range(start, min(start + self.stage.minibatch, len(prompts))))
            for group in self._groups(prompts, completions, minibatch):
                batch = pack_trees(((prompts[i], completions[i]) for i in group), self.base.device)
                with torch.enable_grad():  # the very computation of the first step: its log-probabilities to the last bit
                    old.append(self._logprobs(batch, self.policy).detach().cpu())
                with torch.no_grad():
                    reference.append(self._logprobs(batch, self.reference).cpu())
                    value.append(self._values(batch).cpu() if self.value is not None else torch.zeros(len(old[-1])))
                    score.append(row_scores(self.base, batch, self.reward).cpu())
                if self.stop.asked:
                    raise Interrupted("stopped while sampling; run the same command to go on")
        return torch.cat(old), torch.cat(reference), torch.cat(value), torch.cat(score)

    def _watch(self, total: int, iteration: int) -> Callable[[int, int], None]:
        progress = Progress(f"{self.stage.name} rollouts {iteration + 1}", total)

        def advance(rows: int, tokens: int) -> None:
            progress.update(rows, tokens=tokens)
            if self.stop.asked:
                raise Interrupted("stopped while sampling; run the same command to go on")

        return advance

    def _show(self, iteration: int, sampled: Sampled, answers: list[Rollout]) -> None:
        """The first rollouts of every iteration with their scores; rows of a later one, from before a stop, go."""
        path = self.folder / SAMPLES
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
        kept = [row for row in map(json.loads, lines) if row["iteration"] < iteration + 1]
        shown = [
            {
                "iteration": iteration + 1, "prompt": self.base.chat.decode(list(a.prompt_ids)), "answer": a.text,
                "score": round(score, 4), "ended": a.ended, "tokens": len(a.completion_ids),
            }
            for a, score in zip(answers[:SHOWN], sampled.score_B.tolist(), strict=False)
        ]  # fmt: skip
        write_jsonl(path, [*kept, *shown])
