"""A reward model as a judge. It scores each answer separately, so the order does not matter. It ignores the question.

p(A) = sigmoid(score(A) - score(B))        (Bradley and Terry 1952)
"""

from collections.abc import Callable, Sequence
from math import exp

import torch

from posttrain.data.packing import split_by_tokens
from posttrain.judge.local import weights_in_use
from posttrain.judge.verdict import ComparisonRequest, GradingRequest, Reply, Verdict
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, pack_trees, row_scores
from posttrain.records import Message


class RewardJudge:
    """`stage` is the name of a reward model; `activate` gives the name of its adapter in the base, and is called before each
    use, because full weights replace each other in memory. The question of a request is ignored.
    """

    def __init__(self, base: BaseModel, stage: str, name: str, *, activate: Callable[[str], str] = str) -> None:
        self.base, self.name = base, name
        self._stage, self._activate = stage, activate

    def identity(self) -> dict[str, str]:
        """Kind, name, the hashes of the base, and the hash of the reward model's weights."""
        adapter = self._activate(self._stage)
        return {"judge": self.name, "kind": "reward", "adapter": adapter, **weights_in_use(self.base, adapter)}

    def compare(self, requests: Sequence[ComparisonRequest]) -> list[Verdict]:
        """The sigmoid of the difference of scores, the same for both orders."""
        scores = self._scores([(request.prompt, answer) for request in requests for answer in (request.a, request.b)])
        verdicts = []
        for a, b in zip(scores[::2], scores[1::2], strict=True):
            if a is None or b is None:
                verdicts.append(Verdict(None, None, None, f"does not fit the context of {self.base.context} tokens"))
            else:
                p = 1 / (1 + exp(min(b - a, 700.0)))
                verdicts.append(Verdict(p, p, p))
        return verdicts

    def grade(self, requests: Sequence[GradingRequest]) -> list[Reply]:
        """Abstain: a score alone does not say yes or no."""
        return [Reply(None, "a reward model cannot grade single answers") for _ in requests]

    @torch.no_grad()
    def _scores(self, answers: Sequence[tuple[str, str]]) -> list[float | None]:
        trees = []
        for prompt, answer in answers:
            ids, replies = self.base.chat.encode_completions([Message("user", prompt)], [Message("assistant", answer)])
            trees.append((ids, replies))
        lengths = [len(prompt) + len(replies[0]) for prompt, replies in trees]
        fitting = [n for n, length in enumerate(lengths) if length <= self.base.context]
        adapter = self._activate(self._stage)
        scores: list[float | None] = [None] * len(trees)
        for group in split_by_tokens([lengths[n] for n in fitting], MICRO_TOKENS[self.base.device.type]):
            batch = pack_trees([trees[fitting[g]] for g in group], self.base.device)
            for g, score in zip(group, row_scores(self.base, batch, adapter).tolist(), strict=True):
                scores[fitting[g]] = score
        return scores
