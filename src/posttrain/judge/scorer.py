"""A reward model as a judge: it scores each answer by itself, so orders cannot matter. It knows one question, its own.

p(A) = sigmoid(score(A) - score(B))        (Bradley and Terry 1952)
"""

from collections.abc import Sequence
from math import exp

import torch

from posttrain.data.packing import split_by_tokens
from posttrain.judge.verdict import Comparison, Grading, Reply, Verdict
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, pack_trees, row_scores
from posttrain.records import Message


class RewardJudge:
    """`adapter` is the reward model's name on the base. The question of a comparison is ignored."""

    def __init__(self, base: BaseModel, adapter: str, name: str) -> None:
        self.base, self.adapter, self.name = base, adapter, name

    def identity(self) -> dict[str, str]:
        """Kind, name and the hashes of the base."""
        return {"judge": self.name, "kind": "reward", "adapter": self.adapter, **self.base.identity()}

    def compare(self, asked: Sequence[Comparison]) -> list[Verdict]:
        """Sigmoid of the difference of scores; both orders are the same number."""
        scores = self._scores([(one.prompt, answer) for one in asked for answer in (one.a, one.b)])
        verdicts = []
        for a, b in zip(scores[::2], scores[1::2], strict=True):
            if a is None or b is None:
                verdicts.append(Verdict(None, None, None, f"does not fit the context of {self.base.context} tokens"))
            else:
                p = 1 / (1 + exp(min(b - a, 700.0)))
                verdicts.append(Verdict(p, p, p))
        return verdicts

    def grade(self, asked: Sequence[Grading]) -> list[Reply]:
        """A score has no yes: every grading is an abstention."""
        return [Reply(None, "a reward model compares and does not grade") for _ in asked]

    @torch.no_grad()
    def _scores(self, asked: Sequence[tuple[str, str]]) -> list[float | None]:
        trees = []
        for prompt, answer in asked:
            ids, replies = self.base.chat.encode_completions([Message("user", prompt)], [Message("assistant", answer)])
            trees.append((ids, replies))
        lengths = [len(prompt) + len(replies[0]) for prompt, replies in trees]
        fitting = [n for n, length in enumerate(lengths) if length <= self.base.context]
        scores: list[float | None] = [None] * len(trees)
        for group in split_by_tokens([lengths[n] for n in fitting], MICRO_TOKENS[self.base.device.type]):
            batch = pack_trees([trees[fitting[g]] for g in group], self.base.device)
            for g, score in zip(group, row_scores(self.base, batch, self.adapter).tolist(), strict=True):
                scores[fitting[g]] = score
        return scores
