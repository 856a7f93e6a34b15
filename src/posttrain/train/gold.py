"""Gold: what the policy should be good at, measured on held-out prompts while it is trained on another score.

It is the validation of the ppo stage: it is measured before the first step and after every `gold_every` iterations, and the
weights of the highest gold are published. Each evaluation is a row of `gold.jsonl`, with the KL to the init policy, the score
and the gold of every prompt. The rule of `evaluate/overoptimisation.py` reads these rows, so a resumed run stops where an
uninterrupted one would. All evaluations sample the same prompts with the same random numbers and are compared pair by pair.

The highest of several gold values is too high on average. The start and the published policy therefore answer the prompts again
with other random numbers (`gold_published.jsonl`), and the report uses these answers.

N: tokens, B: prompts.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from posttrain.artifacts import read_jsonl, write_jsonl
from posttrain.data.packing import split_by_tokens
from posttrain.data.prompts import PromptRow
from posttrain.errors import DataError, TrainingError
from posttrain.evaluate.gain import GOLD, PUBLISHED
from posttrain.evaluate.overoptimisation import Fallen, overoptimised, table
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.losses.kl import k1
from posttrain.models.batches import MICRO_TOKENS, DeviceBatch, pack_trees, sum_by_row
from posttrain.progress import Progress
from posttrain.stages.ppo import PpoStage, gold_that_pays
from posttrain.stages.reward_parts import reward_parts
from posttrain.train.rewards import CompletionTexts, RewardScorer
from posttrain.train.stage import StageContext

# Added to the seed of the evaluations that choose the weights, for the answers that are reported.
FRESH = 500_000_003
Logprobs = Callable[[DeviceBatch, str], Tensor]


def open_gold(
    context: StageContext, stage: PpoStage, prompts: Sequence[PromptRow], reward_scorer: RewardScorer
) -> "GoldMeasure":
    """Gold of a stage. Raises DataError where fewer than two prompts are held out."""
    if len(prompts) < 2:
        raise DataError(
            f'stage "{stage.name}"', f"{len(prompts)} prompts held out for gold", allowed="at least 2",
            do="raise validation, or give more prompts",
        )  # fmt: skip
    gold_scorer = RewardScorer(
        reward_parts(stage.gold), context.policies, where=reward_scorer.where, stop=context.stop, sources=context.sources
    )
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(context.recipe.seed)).tolist()
    return GoldMeasure(context, stage, [prompts[i] for i in sorted(order[: stage.gold_prompts])], reward_scorer, gold_scorer)


class GoldMeasure:
    """The held-out prompts, and what scores the answers to them."""

    def __init__(
        self,
        context: StageContext,
        stage: PpoStage,
        prompts: Sequence[PromptRow],
        reward_scorer: RewardScorer,
        gold_scorer: RewardScorer,
    ) -> None:
        self.base, self.policies, self.stage, self.stop = context.base, context.policies, stage, context.stop
        self.prompts, self.reward_scorer, self.gold_scorer = prompts, reward_scorer, gold_scorer
        self.path, self.seed = context.folder / GOLD, context.recipe.seed * 1009 + 1008
        self.due = sorted({*range(0, stage.iterations + 1, stage.gold_every), stage.iterations})

    def measure(self, policy: str, iteration: int, logprobs: Logprobs) -> dict[str, float]:
        """Evaluate the policy after so many iterations. Rows of this and later iterations, from before a stop, are replaced."""
        rows = [row for row in self._rows() if row["iteration"] < iteration]
        row = self._row(self.stage.name, policy, iteration, logprobs, seed=self.seed)
        for name in self.stage.gold_compare if iteration == 0 else ():
            with self.policies.instead(name) as compared:
                rows.append(self._row(name, compared, 0, logprobs, seed=self.seed))
        write_jsonl(self.path, [*rows, row])
        return _metrics(row)

    def measure_published(self, policy: str, logprobs: Logprobs) -> dict[str, float]:
        """Evaluate the start and the policy that the evaluations chose, on fresh answers; returns the metrics of the latter."""
        rows = [row for row in self._rows() if row["policy"] == self.stage.name]
        best = max(rows, key=lambda row: float(row["gold"]))["iteration"]
        with self.policies.instead(self.stage.init) as init:
            start = self._row(self.stage.init, init, 0, logprobs, seed=self.seed + FRESH)
        published = self._row(self.stage.name, policy, best, logprobs, seed=self.seed + FRESH)
        write_jsonl(self.path.with_name(PUBLISHED), [start, published])
        return _metrics(published)

    @torch.no_grad()
    def _row(self, name: str, policy: str, iteration: int, logprobs: Logprobs, *, seed: int) -> dict[str, Any]:
        stage, when = self.stage, f"evaluation after iteration {iteration}"
        settings = SamplingSettings(stage.max_new_tokens, stage.temperature, 1.0, seed, logprobs=False)
        progress = Progress(f"{stage.name} gold {iteration}", len(self.prompts))
        answers = generate(self.base, [p.ids for p in self.prompts], settings, policy, advance=self._advance(progress))
        lengths = [len(p.ids) + len(a.completion_ids) for p, a in zip(self.prompts, answers, strict=True)]
        trees = [(p.ids, [list(a.completion_ids)]) for p, a in zip(self.prompts, answers, strict=True)]
        groups = split_by_tokens(lengths, MICRO_TOKENS[self.base.device.type])
        batches = [pack_trees((trees[i] for i in group), self.base.device) for group in groups]
        policy_logprobs = [logprobs(batch, policy) for batch in batches]
        with self.policies.instead(stage.init) as init:
            kl = [
                sum_by_row(k1(policy_N, logprobs(batch, init)), batch).cpu()
                for policy_N, batch in zip(policy_logprobs, batches, strict=True)
            ]
        texts = CompletionTexts([p.text for p in self.prompts], [a.text for a in answers])
        figures = {
            "kl": torch.cat(kl), "score": self.reward_scorer.score_batches(batches, texts, when=when).score_B,
            "gold": self.gold_scorer.score_batches(batches, texts, when=when).score_B,
        }  # fmt: skip
        row: dict[str, Any] = {"policy": name, "iteration": iteration}
        for key, value_B in figures.items():
            row |= {key: float(value_B.double().mean()), f"{key}_se": _standard_error(value_B)}
        return row | {f"{key}_B": value_B.tolist() for key, value_B in figures.items()}

    def _advance(self, progress: Progress) -> Callable[[int, int], None]:
        def advance(rows: int, tokens: int) -> None:
            progress.update(rows, tokens=tokens)
            self.stop.check("measuring gold")

        return advance

    def stops(self, iteration: int) -> bool:
        """Whether the over-optimisation rule ends the run before this iteration."""
        fall = self._fall(iteration)
        return fall is not None and fall.stop

    def _fall(self, iteration: int) -> Fallen | None:
        rows = [r for r in self._rows() if r["policy"] == self.stage.name and r["iteration"] <= iteration]
        if [row["iteration"] for row in rows] != [due for due in self.due if due <= iteration]:
            raise TrainingError(
                self.reward_scorer.where,
                f"rows of {self.path.name} are missing",
                do="remove the stage's unfinished folder to begin it again",
            )
        gold_EB, score_EB = table(rows, "gold_B"), table(rows, "score_B")
        return overoptimised(gold_EB, score_EB, patience=self.stage.gold_patience, planned=len(self.due))

    def warnings(self) -> tuple[str, ...]:
        """Warnings of gold that is part of the reward, and of over-optimisation, also where the run ended before the rule."""
        pays, rows = gold_that_pays(self.stage), [row for row in self._rows() if row["policy"] == self.stage.name]
        if not rows:
            return pays
        fall = self._fall(rows[-1]["iteration"])
        if fall is None or not fall.stop:
            return pays
        gold, score, last = fall.gold, fall.score, rows[-1]["iteration"]
        stopped = f"stopped after iteration {last}" if last < self.stage.iterations else "at the end"
        return (
            *pays,
            f"over-optimisation: gold fell by {-gold[0]:.3g} ± {gold[1]:.2g} while the score rose by {score[0]:.3g} ± "
            f"{score[1]:.2g}; {stopped}, published is the policy after iteration {rows[fall.best]['iteration']}",
        )

    def _rows(self) -> list[dict[str, Any]]:
        try:
            return list(read_jsonl(self.path))
        except json.JSONDecodeError:
            return []


def _metrics(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        "ppo/gold": row["gold"], "ppo/gold_se": row["gold_se"], "ppo/gold_score": row["score"],
        "ppo/gold_score_se": row["score_se"], "ppo/gold_kl": row["kl"],
    }  # fmt: skip


def _standard_error(value_B: Tensor) -> float:
    return float(value_B.double().std()) / math.sqrt(len(value_B))
