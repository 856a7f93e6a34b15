"""The rollouts of PPO's iterations: sampled, judged, kept on disk before the first step on them, and found there again.

What an iteration draws is a function of (seed, iteration), and what it learns from lies on disk: a stage that was stopped in
the middle of an iteration goes on with the very same tokens.

N: tokens, B: completions, M: reward models.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch import Tensor

from posttrain.artifacts import read_jsonl, write_jsonl
from posttrain.data.packing import split_by_tokens
from posttrain.data.prompts import PromptRow
from posttrain.errors import TrainingError
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.losses.kl import adapted
from posttrain.models.batches import MICRO_TOKENS, DeviceBatch, pack_trees
from posttrain.progress import Progress
from posttrain.records import Rollout
from posttrain.settings import PpoStage
from posttrain.train.checkpoint import CHECKPOINTS, Checkpoint, load_newest, load_step, oldest_step, save_checkpoint
from posttrain.train.guards import check_figures, check_sampled, check_sampler
from posttrain.train.memory import cache_memory, packed_memory
from posttrain.train.rewards import CompletionTexts, RewardScores
from posttrain.train.roles import Roles
from posttrain.train.rollouts import Rollouts, Sampled, from_tensors, judge_rollouts, to_tensors
from posttrain.train.stage import StageContext, seed_of

SAMPLES = "samples.jsonl"
# Rollouts of an iteration that are kept as samples.
SHOWN = 5


class Iterations:
    """The iteration in hand, and those on disk."""

    def __init__(self, context: StageContext, stage: PpoStage, prompts: Sequence[PromptRow], roles: Roles) -> None:
        self.base, self.policies, self.stage, self.roles = context.base, context.policies, stage, roles
        self.folder, self.stop, self.seed, self.prompts = context.folder, context.stop, seed_of(stage, context.recipe), prompts
        self.owner = context.owner
        self.count = min(stage.prompts, len(prompts))
        self.minibatches = -(-self.count // stage.minibatch)
        self.steps = stage.ppo_epochs * self.minibatches  # of an iteration
        self.number = -1
        self.rollouts: Rollouts | None = None

    def generator(self, iteration: int, epoch: int) -> torch.Generator:
        return torch.Generator().manual_seed((self.seed * 1_000_003 + iteration * 1009 + epoch) % (2**31 - 1))

    def groups(self, prompts: list[list[int]], completions: list[list[list[int]]], chosen: Sequence[int]) -> list[list[int]]:
        """Numbers of prompts that are computed at once."""
        lengths = [len(prompts[i]) + sum(map(len, completions[i])) for i in chosen]
        return [[chosen[k] for k in group] for group in split_by_tokens(lengths, MICRO_TOKENS[self.base.device.type])]

    def roll(self, iteration: int) -> None:
        """Sample, score and judge one iteration, and put it on disk."""
        started = time.monotonic()
        sampled, answers, judged = self._sample(iteration)
        names = [row.id for row in self.asked(iteration) for _ in range(self.stage.completions)]
        where = f'stage "{self.stage.name}" · iteration {iteration + 1}'
        check_sampled(sampled, names, where=where)
        rollouts = judge_rollouts(sampled, self.stage, self._coefficient(iteration))
        check_figures(rollouts.stats, where=where)
        check_sampler(rollouts.stats["ppo/mismatch"], self.stage)
        seconds = time.monotonic() - started
        speed = {"time/rollout": seconds, "time/rollout_tokens_per_second": len(rollouts.old_N) / seconds}
        room = {"memory/cache": cache_memory(self.base, sampled.prompts, self.stage), "memory/packed": packed_memory(self.base)}
        rollouts = rollouts._replace(stats={**rollouts.stats, **judged.metrics(), **room, **speed})
        # As far back as the oldest checkpoint goes, and the iteration before it, whose KL moves the coefficient.
        oldest = oldest_step(self.folder / CHECKPOINTS) // self.steps
        tensors, state = to_tensors(rollouts)
        kept = Checkpoint(tensors, {**state, "iteration": iteration})
        save_checkpoint(self._kept, iteration, kept, keep=iteration - oldest + 2, owner=self.owner)
        self._show(iteration, sampled, answers)
        self.number, self.rollouts = iteration, rollouts

    def asked(self, iteration: int) -> list[PromptRow]:
        """The prompts of an iteration, in order."""
        order = torch.randperm(len(self.prompts), generator=self.generator(iteration, 0)).tolist()
        return [self.prompts[i] for i in order[: self.count]]

    @property
    def _kept(self) -> Path:
        return self.folder / CHECKPOINTS / "rollouts"

    def at(self, iteration: int) -> Rollouts:
        """The rollouts of an iteration that was begun, from memory or from disk. Raises TrainingError."""
        if self.rollouts is not None and self.number == iteration:
            return self.rollouts
        saved = load_step(self._kept, iteration, self.owner)
        if saved is None:
            raise TrainingError(
                f'stage "{self.stage.name}"', f"the rollouts of iteration {iteration + 1} are missing or damaged",
                do="remove the stage's unfinished folder to begin it again",
            )  # fmt: skip
        self.number, self.rollouts = iteration, from_tensors(*saved)
        return self.rollouts

    def newest(self) -> Rollouts:
        """The rollouts of the last iteration that was begun, whose number is then `number`."""
        if self.rollouts is None:
            found = load_newest(self._kept, self.owner)
            assert found is not None, "a stage that has begun has rollouts"
            self.number, self.rollouts = int(found.state["iteration"]), from_tensors(*found)
        return self.rollouts

    def _coefficient(self, iteration: int) -> float:
        """The KL coefficient: fixed, or moved by how far the iteration before went."""
        stage = self.stage
        if not stage.target_kl or iteration == 0:
            return stage.kl_coef
        before = self.at(iteration - 1)
        completions = self.count * stage.completions
        kl, target = before.stats["ppo/kl"], stage.target_kl
        return adapted(before.stats["ppo/kl_coef"], kl=kl, target=target, completions=completions, horizon=stage.kl_horizon)

    def _sample(self, iteration: int) -> tuple[Sampled, list[Rollout], RewardScores]:
        stage, base = self.stage, self.base
        chosen = self.asked(iteration)
        settings = SamplingSettings(stage.max_new_tokens, stage.temperature, 1.0, self.seed * 1009 + iteration)
        prompts = [row.ids for row in chosen]
        watch = self._watch(len(prompts) * stage.completions, iteration)
        answers = generate(base, prompts, settings, self.roles.policy, completions=stage.completions, advance=watch)
        completions = [
            [list(a.completion_ids) for a in answers[k : k + stage.completions]]
            for k in range(0, len(answers), stage.completions)
        ]
        old_N, reference_N, value_N, model_MB = self._judged(prompts, completions)
        texts = CompletionTexts([row.text for row in chosen for _ in range(stage.completions)], [a.text for a in answers])
        judged = self.roles.judge.judge(model_MB, texts, when=f"iteration {iteration + 1}")
        sampler_N = torch.tensor([p for a in answers for p in a.logprobs])
        ended_B = torch.tensor([a.ended for a in answers])
        sampled = Sampled(prompts, completions, ended_B, judged.score_B, old_N, sampler_N, reference_N, value_N)
        return sampled, answers, judged

    def _judged(self, prompts: list[list[int]], completions: list[list[list[int]]]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Log-probabilities under policy and reference, values [N], scores by each model [M, B]; packed as the first pass."""
        batches = []
        for start in range(0, len(prompts), self.stage.minibatch):
            minibatch = list(range(start, min(start + self.stage.minibatch, len(prompts))))
            for group in self.groups(prompts, completions, minibatch):
                batches.append(pack_trees(((prompts[i], completions[i]) for i in group), self.base.device))
        old, value = [], []
        for batch in self._unless_stopped(batches):
            with torch.enable_grad():  # the very computation of the first step: its log-probabilities to the last bit
                logprobs_N, value_N = self.roles.outputs(batch)
            old.append(logprobs_N.detach().cpu())
            if value_N is None:
                with torch.no_grad():
                    value_N = self.roles.own_values(batch) if self.roles.value is not None else torch.zeros_like(logprobs_N)
            value.append(value_N.detach().cpu())
            del logprobs_N, value_N  # with what a gradient would need
        with torch.no_grad(), self.policies.instead(self.roles.reference) as name:
            reference = [self.roles.logprobs(batch, name).cpu() for batch in self._unless_stopped(batches)]
        return torch.cat(old), torch.cat(reference), torch.cat(value), self.roles.judge.model_scores(batches)

    def _unless_stopped(self, batches: Sequence[DeviceBatch]) -> Iterator[DeviceBatch]:
        for batch in batches:
            yield batch
            self.stop.check("sampling")

    def _watch(self, total: int, iteration: int) -> Callable[[int, int], None]:
        progress = Progress(f"{self.stage.name} rollouts {iteration + 1}", total)

        def advance(rows: int, tokens: int) -> None:
            progress.update(rows, tokens=tokens)
            self.stop.check("sampling")

        return advance

    def _show(self, iteration: int, sampled: Sampled, answers: list[Rollout]) -> None:
        """Some rollouts of every iteration with their scores, evenly spread: a prompt's stand side by side. Rows of a later
        iteration, from before a stop, go.
        """
        path = self.folder / SAMPLES
        kept = [row for row in read_jsonl(path) if row["iteration"] < iteration + 1]
        count, score_B = min(SHOWN, len(answers)), sampled.score_B.tolist()
        chosen = [k * len(answers) // count for k in range(count)]
        shown = [
            {
                "iteration": iteration + 1, "prompt": self.base.chat.decode(list(answers[k].prompt_ids), middle=False),
                "answer": answers[k].text, "score": round(score_B[k], 4), "ended": answers[k].ended,
                "tokens": len(answers[k].completion_ids),
            }
            for k in chosen
        ]  # fmt: skip
        write_jsonl(path, [*kept, *shown])
