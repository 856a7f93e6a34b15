"""The first half of an iteration of PPO: the policy samples completions, and policy, reference, value function and reward score
them.

What is drawn is a function of (seed, iteration). Batches are packed as those of the first pass of the update, and the policy's
log-probabilities come from the same computation: before the first step of an iteration the ratio is 1 exactly.

N: tokens of all completions, B: completions.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.artifacts import read_jsonl, write_jsonl
from posttrain.data.prompts import PromptRow
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.models.batches import DeviceBatch
from posttrain.progress import Progress
from posttrain.records import Rollout
from posttrain.stages.ppo import PpoStage
from posttrain.train.guards import check_sampled
from posttrain.train.ppo_schedule import PpoSchedule
from posttrain.train.rewards import CompletionTexts, RewardScores
from posttrain.train.roles import Roles
from posttrain.train.rollouts import ScoredSamples, pack_prompts
from posttrain.train.stage import StageContext

SAMPLES = "samples.jsonl"
# Rollouts of an iteration that are kept as samples.
SHOWN = 5


class Samples(NamedTuple):
    """The prompts of an iteration and their completions, one prompt after the other; when sampling started, in seconds."""

    iteration: int
    started: float
    prompts: list[PromptRow]
    answers: list[Rollout]


class JudgedSamples(NamedTuple):
    """The completions with all that scores them, and the parts of their reward."""

    samples: ScoredSamples
    scores: RewardScores


class PpoSampler:
    """Samples and scores the iterations of a stage."""

    def __init__(self, context: StageContext, stage: PpoStage, schedule: PpoSchedule, roles: Roles, seed: int) -> None:
        self.base, self.policies, self.stop, self.path = context.base, context.policies, context.stop, context.folder / SAMPLES
        self.stage, self.schedule, self.roles, self.seed = stage, schedule, roles, seed

    def sample(self, iteration: int) -> Samples:
        """Completions of the iteration's prompts by the policy as it is. Raises Interrupted when asked to stop."""
        started, stage, prompts = time.monotonic(), self.stage, self.schedule.prompts_of(iteration)
        settings = SamplingSettings(stage.max_new_tokens, stage.temperature, 1.0, self.seed * 1009 + iteration)
        advance = self._advance(len(prompts) * stage.completions, iteration)
        ids = [row.ids for row in prompts]
        answers = generate(self.base, ids, settings, self.roles.policy, completions=stage.completions, advance=advance)
        return Samples(iteration, started, prompts, answers)

    def judge(self, samples: Samples) -> JudgedSamples:
        """Score the completions. Raises NonFiniteError where a number is not finite, TrainingError where a function fails."""
        stage, answers, number = self.stage, samples.answers, samples.iteration + 1
        prompts, count = [row.ids for row in samples.prompts], stage.completions
        completions = [
            [list(a.completion_ids) for a in answers[k : k + count]] for k in range(0, len(answers), count)
        ]  # fmt: skip
        batches = [
            packed.batch
            for minibatch in self.schedule.minibatches_of(samples.iteration, 0)
            for packed in pack_prompts(prompts, completions, minibatch, self.base.device)
        ]
        old_N, value_N = self._policy_scores(batches)
        reference_N = self._reference_scores(batches)
        row_B = [row for row in samples.prompts for _ in range(count)]
        texts = CompletionTexts([row.text for row in row_B], [a.text for a in answers])
        scores = self.roles.scorer.score_batches(batches, texts, when=f"iteration {number}")
        sampler_N = torch.tensor([p for a in answers for p in a.logprobs])
        ended_B = torch.tensor([a.ended for a in answers])
        scored = ScoredSamples(prompts, completions, ended_B, scores.score_B, old_N, sampler_N, reference_N, value_N)
        check_sampled(scored, [row.id for row in row_B], where=f'stage "{stage.name}" · iteration {number}')
        return JudgedSamples(scored, scores)

    def _policy_scores(self, batches: Sequence[DeviceBatch]) -> tuple[Tensor, Tensor]:
        """Log-probabilities under the policy and values [N], on the CPU; values are 0 for estimators without them."""
        old, value = [], []
        for batch in self._unless_stopped(batches):
            with torch.enable_grad():  # the computation of the first step: its log-probabilities to the last bit
                logprobs_N, value_N = self.roles.outputs(batch)
            old.append(logprobs_N.detach().cpu())
            if value_N is None:
                with torch.no_grad():
                    value_N = self.roles.own_values(batch) if self.roles.value is not None else torch.zeros_like(logprobs_N)
            value.append(value_N.detach().cpu())
            del logprobs_N, value_N  # frees what a backward pass would need
        return torch.cat(old), torch.cat(value)

    @torch.no_grad()
    def _reference_scores(self, batches: Sequence[DeviceBatch]) -> Tensor:
        """Log-probabilities under the reference [N], on the CPU."""
        with self.policies.instead(self.roles.reference) as name:
            return torch.cat([self.roles.logprobs(batch, name).cpu() for batch in self._unless_stopped(batches)])

    def _unless_stopped(self, batches: Sequence[DeviceBatch]) -> Iterator[DeviceBatch]:
        for batch in batches:
            yield batch
            self.stop.check("sampling")

    def _advance(self, total: int, iteration: int) -> Callable[[int, int], None]:
        progress = Progress(f"{self.stage.name} rollouts {iteration + 1}", total)

        def advance(rows: int, tokens: int) -> None:
            progress.update(rows, tokens=tokens)
            self.stop.check("sampling")

        return advance

    def write_samples(self, samples: Samples, score_B: Tensor) -> None:
        """Add some rollouts of an iteration to samples.jsonl, evenly spread over its prompts.

        Rows of this and later iterations, from before a stop, are replaced.
        """
        answers, number = samples.answers, samples.iteration + 1
        earlier = [row for row in read_jsonl(self.path) if row["iteration"] < number]
        count, scores = min(SHOWN, len(answers)), score_B.tolist()
        rows = [
            {
                "iteration": number, "prompt": self.base.chat.decode(list(answers[k].prompt_ids), middle=False),
                "answer": answers[k].text, "score": round(scores[k], 4), "ended": answers[k].ended,
                "tokens": len(answers[k].completion_ids),
            }
            for k in (position * len(answers) // count for position in range(count))
        ]  # fmt: skip
        write_jsonl(self.path, [*earlier, *rows])
