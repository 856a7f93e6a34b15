"""The score of a completion: reward models, ensembles of them, functions of the user, and weighted sums of all three.

    score = sum over parts of weight * s_part
    s_part = f(prompt, completion), or of an ensemble's scores r_1 .. r_M:   mean r,   min r,   mean r - variance_weight * var r

(Coste et al. 2024: worst case and uncertainty-weighted optimisation; var is that of the members, divided by M.)

The ppo stage scores an iteration's rollouts with a `RewardScorer`; `gold.py` scores the answers to held-out prompts with two.
Models are adapters on the one base, so their scores come batch by batch. A function gets all completions at once.

M: models, B: completions.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from posttrain.judge.functions import FunctionWorker
from posttrain.models.adapter_files import Policies
from posttrain.models.batches import DeviceBatch, row_scores
from posttrain.stages.reward_parts import RewardPart, part_name
from posttrain.stop import StopSignal


class CompletionTexts(NamedTuple):
    """Prompts and completions as texts, as a reward function gets them; one of each a row [B]."""

    prompts: list[str]
    completions: list[str]


class RewardScores(NamedTuple):
    """Scores [B], the mean of each part by its name, and the standard deviation among the members of each ensemble."""

    score_B: Tensor
    parts: dict[str, float]
    spread: dict[str, float]

    def metrics(self) -> dict[str, float]:
        """Means of the parts where there are several, and the spread of ensembles."""
        parts = {f"ppo/score/{name}": value for name, value in self.parts.items()} if len(self.parts) > 1 else {}
        return parts | {f"ppo/ensemble_spread/{name}": value for name, value in self.spread.items()}


class RewardScorer:
    """The parts of a reward, ready to score. Functions run in processes from the first score until `close`."""

    def __init__(
        self, parts: Sequence[RewardPart], policies: Policies, *, where: str, stop: StopSignal, sources: Mapping[str, str] = {}
    ) -> None:
        """`sources` has the planned hash of each function's source. Raises AdapterError where a reward model was trained on
        another base.
        """
        self.policies, self.parts, self.where = policies, parts, where
        self.stop, self.sources = stop, sources
        self.models = [name for part in parts for name in part.models]
        for name in self.models:
            policies.activate(name)
        self._workers: dict[str, FunctionWorker] = {}

    @torch.no_grad()
    def model_scores(self, batches: Sequence[DeviceBatch]) -> Tensor:
        """Scores of packed batches by every model [M, B], on the CPU. Raises Interrupted when asked to stop."""
        scores = []
        for model in self.models:
            with self.policies.instead(model) as name:
                scores.append(torch.cat([self._model_scores(batch, name) for batch in batches]))
        return torch.stack(scores) if scores else torch.empty(0, sum(batch.rows for batch in batches))

    def _model_scores(self, batch: DeviceBatch, adapter: str) -> Tensor:
        self.stop.check("scoring")
        return row_scores(self.policies.base, batch, adapter).cpu()

    def score(self, model_MB: Tensor, texts: CompletionTexts, *, when: str) -> RewardScores:
        """The score of every completion. Raises TrainingError naming `when` where a function fails."""
        total_B = torch.zeros(len(texts.completions))
        parts, spread = {}, {}
        first = 0
        for part in self.parts:
            name = part_name(part)
            if part.function:
                score_B = torch.tensor(self._worker(part).score(*texts, where=f"{self.where}, {when}"))
            else:
                member_MB = model_MB[first : first + len(part.models)]
                score_B, first = combine(member_MB, part), first + len(part.models)
                if len(part.models) > 1:
                    spread[name] = float(member_MB.std(0, correction=0).mean())
            parts[name] = float(score_B.mean())
            total_B += part.weight * score_B
        return RewardScores(total_B, parts, spread)

    def score_batches(self, batches: Sequence[DeviceBatch], texts: CompletionTexts, *, when: str) -> RewardScores:
        """The score of every completion of packed batches, whose texts are in the same order. Raises as `score` does."""
        return self.score(self.model_scores(batches), texts, when=when)

    def _worker(self, part: RewardPart) -> FunctionWorker:
        if part.function not in self._workers:
            planned = self.sources.get(part.function)
            worker = FunctionWorker(part.function, timeout=part.timeout, where=self.where, stop=self.stop, planned=planned)
            self._workers[part.function] = worker
        return self._workers[part.function]

    def close(self) -> None:
        """End the functions' processes."""
        for worker in self._workers.values():
            worker.close()
        self._workers.clear()


def combine(member_MB: Tensor, part: RewardPart) -> Tensor:
    """An ensemble's scores as one [B]. The scores of a single model are unchanged."""
    if part.combine == "min":
        return member_MB.amin(0)
    mean_B = member_MB.mean(0)
    return mean_B - part.variance_weight * member_MB.var(0, correction=0) if part.combine == "mean_minus_variance" else mean_B
