"""The ppo stage: a policy samples, reward models or functions score, and the policy moves towards what scored more.

An iteration samples completions of prompts with the policy as it stands, scores them, and takes `ppo_epochs` passes over them
in minibatches. Policy, reference, reward model and value function are adapters on one base. An iteration's rollouts lie on disk
before its first step, so a stage that is stopped in the middle of an iteration goes on with the very same tokens. Everything an
iteration draws is a function of (seed, iteration).

Before the first step of an iteration policy and sampler are the same: ratio 1 and approximate KL 0 exactly, or the stage ends.

N: tokens, B: completions.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from posttrain.artifacts import write_jsonl
from posttrain.data.packing import split_by_tokens
from posttrain.data.prepare import TrainRow
from posttrain.data.prompts import PromptRow, check_room, prepare_prompts
from posttrain.data.ptx import prepare_ptx
from posttrain.errors import Interrupted, TrainingError
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.losses.kl import adapted, k3
from posttrain.losses.output import LossOutput
from posttrain.losses.ppo import PolicyTokens, ValueTokens, policy_loss, value_loss
from posttrain.models.batches import MICRO_TOKENS, DeviceBatch, pack_trees
from posttrain.progress import Progress
from posttrain.records import Rollout
from posttrain.settings import PpoStage, reward_parts
from posttrain.train.checkpoint import Checkpoint, load_newest, load_step, oldest_step, save_checkpoint
from posttrain.train.gold import GoldMeasure, open_gold
from posttrain.train.guards import check_sampled, check_sampler, why_ended
from posttrain.train.loop import MicroBatch, TrainTask
from posttrain.train.ptx import PtxBatch, ptx_batches, ptx_loss
from posttrain.train.rewards import Judge, Judged, Texts
from posttrain.train.rollouts import Rollouts, Sampled, from_tensors, judge_rollouts, to_tensors
from posttrain.train.stage import StageContext, StageResult, TrainedPolicy, fit_stage, start_policy
from posttrain.train.value import ValueFunction, start_value, value_name

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
    # For a value function with an adapter of its own, so that the activations of both are never there at once.
    own_value: bool = False


class Roles(NamedTuple):
    """Who samples (an adapter), who it is held to (a stage), who scores, who says what to expect, and who knows better."""

    policy: str
    reference: str
    judge: Judge
    value: ValueFunction | None
    gold: GoldMeasure | None


class Rows(NamedTuple):
    """Prompts to answer, and rows of the pretraining mix."""

    prompts: Sequence[PromptRow]
    ptx: Sequence[TrainRow]


def train_ppo(context: StageContext, stage: PpoStage) -> StageResult:
    """Train towards what scores. Raises DataError for prompts that cannot be used, TrainingError where PPO cannot go on."""
    base, seed = context.base, context.recipe.seed
    prepared = prepare_prompts(
        stage.data, base.chat, seed=seed, max_prompt_tokens=stage.max_prompt_tokens,
        evaluation_prompts=context.evaluation_prompts, validation=stage.validation if stage.gold else 0.0,
    )  # fmt: skip
    where = f'stage "{stage.name}"'
    check_room([*prepared.train, *prepared.validation], max_new_tokens=stage.max_new_tokens, context=base.context, where=where)
    report, ptx = prepared.report, []
    if stage.ptx_data:
        found = prepare_ptx(stage, base.chat, seed=seed, evaluation_prompts=context.evaluation_prompts)
        report, ptx = {**report, "ptx": found.report}, found.train
    reference = stage.init if stage.reference == "init" else stage.reference
    context.policies.activate(reference)  # one that cannot be read is told before anything is sampled
    judge = Judge(reward_parts(stage.reward), context.policies, where=where, stop=context.stop)
    gold = open_gold(context, stage, prepared.validation, judge) if stage.gold else None
    policy = start_policy(context, stage)
    if policy.routing != "base":
        base.adapters.get(policy.routing).without_dropout()
    value = start_value(context, stage, policy.routing)
    run = _PpoRun(context, stage, Rows(prepared.train, ptx), Roles(policy.routing, reference, judge, value, gold))
    trained = TrainedPolicy(policy.routing, policy.parameters | (value.parameters if value else {}), policy.save)
    try:
        return fit_stage(context, stage, trained, run.task(trained.parameters), report, check=run.warnings)
    finally:
        base.adapters.remove(value_name(stage))
        judge.close()
        if gold is not None:
            gold.judge.close()


class _PpoRun:
    """The iteration in hand; all of its state is on disk or a function of the step."""

    def __init__(self, context: StageContext, stage: PpoStage, rows: Rows, roles: Roles) -> None:
        self.base, self.stage, self.folder, self.stop = context.base, stage, context.folder, context.stop
        self.policies = context.policies
        self.seed, self.prompts, self.ptx = context.recipe.seed, rows.prompts, rows.ptx
        self.policy, self.reference, self.judge, self.value, self.gold = roles
        self.asked = min(stage.prompts, len(self.prompts))
        self.minibatches = -(-self.asked // stage.minibatch)
        self.steps = stage.ppo_epochs * self.minibatches  # of an iteration
        self.iteration = -1
        self.rollouts: Rollouts | None = None
        self.begun, self.tokens = 0.0, 0  # of the step in hand

    def task(self, parameters: dict[str, nn.Parameter]) -> TrainTask:
        """PPO as the loop sees it; a row is an optimiser step."""
        steps = self.stage.iterations * self.steps
        task = TrainTask(
            steps, parameters, self.batches_at, self._loss, self._summarise, None, "ppo/score", by_step=True,
            next_step=self.next_step if self.stage.max_update_kl else None,
        )  # fmt: skip
        if self.gold is None:
            return task
        return task._replace(
            validate_at=lambda step: self._measure(step // self.steps), validate_every=self.steps * self.stage.gold_every,
            validation_metric="ppo/gold", higher_is_better=True,
        )  # fmt: skip

    def warnings(self, _: dict[str, float]) -> tuple[str, ...]:
        """Why the stage ended before its last iteration, where it did."""
        if self.rollouts is None:
            found = load_newest(self._kept)
            assert found is not None, "a finished stage has rollouts"
            self.iteration, self.rollouts = int(found.state["iteration"]), from_tensors(*found)
        why = why_ended(self.rollouts.stats, self.stage)
        after = f"ended after {self.iteration} of {self.stage.iterations} iterations"
        ended = (f"{after}: {why}; lower learning_rate or raise kl_coef",) if why else ()
        return ended + (self.gold.warnings() if self.gold is not None else ())

    def next_step(self, step: int) -> int:
        """The step itself, or the first of the next iteration where the passes so far moved the policy by `max_update_kl`."""
        iteration, inside = divmod(step, self.steps)
        if inside % self.minibatches or not inside:
            return step
        return (iteration + 1) * self.steps if self._moved(self._at(iteration)) > self.stage.max_update_kl else step

    @torch.no_grad()
    def _moved(self, rollouts: Rollouts) -> float:
        """Approximate KL from the policy that sampled to the policy now, over all of the iteration's tokens, nats a token."""
        total, start = 0.0, 0
        for group in self._groups(rollouts.prompts, rollouts.completions, range(len(rollouts.prompts))):
            batch = pack_trees(((rollouts.prompts[i], rollouts.completions[i]) for i in group), self.base.device)
            logprobs_N = self._logprobs(batch, self.policy).cpu()
            total += float(k3(rollouts.old_N[start : start + len(logprobs_N)], logprobs_N).double().sum())
            start += len(logprobs_N)
        return total / start

    def batches_at(self, steps: Sequence[int]) -> list[MicroBatch]:
        """The micro-batches of one step; none where the KL ceiling was passed, which ends the stage."""
        (step,) = steps
        iteration, inside = divmod(step, self.steps)
        epoch, minibatch = divmod(inside, self.minibatches)
        if inside == 0:
            if self.gold is not None and self.gold.stops(iteration):
                return []
            self._roll(iteration)
        rollouts = self._at(iteration)
        if why_ended(rollouts.stats, self.stage):
            return []
        order = list(range(len(rollouts.prompts)))
        if epoch:  # the first pass is packed as the log-probabilities were
            order = torch.randperm(len(order), generator=self._generator(iteration, epoch)).tolist()
        chosen = order[minibatch * self.stage.minibatch : (minibatch + 1) * self.stage.minibatch]
        groups = self._groups(rollouts.prompts, rollouts.completions, chosen)
        micros = [self._micro(rollouts, group, first=inside == 0) for group in groups]
        if self.value is not None and not self.shared:
            micros += [MicroBatch(m.payload._replace(own_value=True), 0, m.row_ids) for m in micros]
        micros += ptx_batches(self.base, self.ptx, step, size=self.stage.minibatch, seed=self.seed)
        self.begun, self.tokens = time.monotonic(), sum(m.tokens for m in micros)
        return micros

    def _measure(self, iteration: int) -> dict[str, float]:
        assert self.gold is not None
        return self.gold.measure(self.policy, iteration, self._logprobs)

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
        asked = self._asked(self.iteration)
        return MicroBatch(payload, batch.tokens, tuple(f"{asked[i].id} (iteration {self.iteration + 1})" for i in group))

    def _loss(self, micro: MicroBatch, step: Sequence[MicroBatch]) -> LossOutput:
        if isinstance(micro.payload, PtxBatch):
            return ptx_loss(self.base, self.policy, micro, step, coef=self.stage.ptx_coef)
        payload: PpoBatch = micro.payload
        total = sum(len(m.payload.old_N) for m in step if isinstance(m.payload, PpoBatch) and not m.payload.own_value)
        if payload.own_value:
            return self._value_loss(payload, self._own_values(payload.batch), total)
        logprobs_N, value_N = self._outputs(payload.batch)
        tokens = PolicyTokens(logprobs_N, payload.old_N, payload.advantage_N)
        out = policy_loss(tokens, clip=self.stage.clip_range, step_tokens=total)
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
        assert self.rollouts is not None
        means = {name: value / sums["tokens"] for name, value in sums.items() if name.startswith("ppo/")}
        loss = means["ppo/policy_loss"] + self.stage.value_coef * means.get("ppo/value_loss", 0.0)
        if "ptx/nll" in sums:
            means["ppo/ptx_loss"] = sums["ptx/nll"] / sums["ptx/targets"]
            loss += self.stage.ptx_coef * means["ppo/ptx_loss"]
        speed = {"time/update_tokens_per_second": self.tokens / (time.monotonic() - self.begun)}
        return {"ppo/loss": loss, **means, **self.rollouts.stats, **speed}

    def _hidden(self, batch: DeviceBatch, adapter: str) -> Tensor:
        """What each token of the completions is predicted from [N, D]."""
        return self.base.hidden(batch.ids_T, batch.positions_T, batch.segments, adapter)[batch.source_N]

    def _logprobs(self, batch: DeviceBatch, adapter: str) -> Tensor:
        """log p of every token of the completions [N] at the stage's temperature."""
        return self._predict(self._hidden(batch, adapter), batch, adapter)

    def _predict(self, hidden_ND: Tensor, batch: DeviceBatch, adapter: str) -> Tensor:
        return self.base.logprobs(hidden_ND / self.stage.temperature, batch.target_N, adapter)

    def _outputs(self, batch: DeviceBatch) -> tuple[Tensor, Tensor | None]:
        """Of every token of the completions [N]: its log p under the policy, and the value by a head on the policy, if any."""
        hidden_ND = self._hidden(batch, self.policy)
        logprobs_N = self._predict(hidden_ND, batch, self.policy)
        return logprobs_N, self.value.head.score(hidden_ND) if self.value is not None and self.shared else None

    @property
    def shared(self) -> bool:
        """Whether the value function is a head on the policy's adapter."""
        return self.value is not None and self.value.adapter == self.policy

    def _own_values(self, batch: DeviceBatch) -> Tensor:
        """The value before every token of the completions [N], by an adapter of its own."""
        assert self.value is not None
        return self.value.head.score(self._hidden(batch, self.value.adapter))

    # --- rollouts -----------------------------------------------------------------------------------------------------

    def _roll(self, iteration: int) -> None:
        """Sample, score and judge one iteration, and put it on disk."""
        started = time.monotonic()
        sampled, answers, judged = self._sample(iteration)
        names = [row.id for row in self._asked(iteration) for _ in range(self.stage.completions)]
        check_sampled(sampled, names, where=f'stage "{self.stage.name}" · iteration {iteration + 1}')
        rollouts = judge_rollouts(sampled, self.stage, self._coefficient(iteration))
        check_sampler(rollouts.stats["ppo/mismatch"], self.stage)
        seconds = time.monotonic() - started
        speed = {"time/rollout": seconds, "time/rollout_tokens_per_second": len(rollouts.old_N) / seconds}
        rollouts = rollouts._replace(stats={**rollouts.stats, **judged.metrics(), **speed})
        # As far back as the oldest checkpoint goes, and the iteration before it, whose KL moves the coefficient.
        oldest = oldest_step(self.folder / "checkpoints") // self.steps
        tensors, state = to_tensors(rollouts)
        kept = Checkpoint(tensors, {**state, "iteration": iteration})
        save_checkpoint(self._kept, iteration, kept, keep=iteration - oldest + 2)
        self._show(iteration, sampled, answers)
        self.iteration, self.rollouts = iteration, rollouts

    def _asked(self, iteration: int) -> list[PromptRow]:
        """The prompts of an iteration, in order."""
        order = torch.randperm(len(self.prompts), generator=self._generator(iteration, 0)).tolist()
        return [self.prompts[i] for i in order[: self.asked]]

    @property
    def _kept(self) -> Path:
        return self.folder / "checkpoints" / "rollouts"

    def _at(self, iteration: int) -> Rollouts:
        """The rollouts of an iteration that was begun, from memory or from disk. Raises TrainingError."""
        if self.rollouts is not None and self.iteration == iteration:
            return self.rollouts
        saved = load_step(self._kept, iteration)
        if saved is None:
            raise TrainingError(
                f'stage "{self.stage.name}"', f"the rollouts of iteration {iteration + 1} are missing or damaged",
                do="remove the stage's unfinished folder to begin it again",
            )  # fmt: skip
        self.iteration, self.rollouts = iteration, from_tensors(*saved)
        return self.rollouts

    def _coefficient(self, iteration: int) -> float:
        """The KL coefficient: fixed, or moved by how far the iteration before went."""
        stage = self.stage
        if not stage.target_kl or iteration == 0:
            return stage.kl_coef
        before = self._at(iteration - 1)
        completions = self.asked * stage.completions
        kl, target = before.stats["ppo/kl"], stage.target_kl
        return adapted(before.stats["ppo/kl_coef"], kl=kl, target=target, completions=completions, horizon=stage.kl_horizon)

    def _sample(self, iteration: int) -> tuple[Sampled, list[Rollout], Judged]:
        stage, base = self.stage, self.base
        chosen = self._asked(iteration)
        settings = SamplingSettings(stage.max_new_tokens, stage.temperature, 1.0, self.seed * 1009 + iteration)
        prompts = [row.ids for row in chosen]
        watch = self._watch(len(prompts) * stage.completions, iteration)
        answers = generate(base, prompts, settings, self.policy, completions=stage.completions, advance=watch)
        completions = [
            [list(a.completion_ids) for a in answers[k : k + stage.completions]]
            for k in range(0, len(answers), stage.completions)
        ]
        old_N, reference_N, value_N, model_MB = self._judged(prompts, completions)
        texts = Texts([row.text for row in chosen for _ in range(stage.completions)], [a.text for a in answers])
        judged = self.judge.judge(model_MB, texts, when=f"iteration {iteration + 1}")
        sampler_N = torch.tensor([p for a in answers for p in a.logprobs])
        ended_B = torch.tensor([a.ended for a in answers])
        sampled = Sampled(prompts, completions, ended_B, judged.score_B, old_N, sampler_N, reference_N, value_N)
        return sampled, answers, judged

    def _judged(self, prompts: list[list[int]], completions: list[list[list[int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities under policy and reference, values [N], scores by each model [M, B]; packed as the first pass."""
        batches = []
        for start in range(0, len(prompts), self.stage.minibatch):
            minibatch = list(range(start, min(start + self.stage.minibatch, len(prompts))))
            for group in self._groups(prompts, completions, minibatch):
                batches.append(pack_trees(((prompts[i], completions[i]) for i in group), self.base.device))
        old, value = [], []
        for batch in self._unless_stopped(batches):
            with torch.enable_grad():  # the very computation of the first step: its log-probabilities to the last bit
                logprobs_N, value_N = self._outputs(batch)
            old.append(logprobs_N.detach().cpu())
            if value_N is None:
                with torch.no_grad():
                    value_N = self._own_values(batch) if self.value is not None else torch.zeros_like(logprobs_N)
            value.append(value_N.detach().cpu())
            del logprobs_N, value_N  # with what a gradient would need
        with torch.no_grad(), self.policies.instead(self.reference) as name:
            reference = [self._logprobs(batch, name).cpu() for batch in self._unless_stopped(batches)]
        return torch.cat(old), torch.cat(reference), torch.cat(value), self.judge.model_scores(batches)

    def _unless_stopped(self, batches: Sequence[DeviceBatch]) -> Iterator[DeviceBatch]:
        for batch in batches:
            yield batch
            if self.stop.asked:
                raise Interrupted("stopped while sampling; run the same command to go on")

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
