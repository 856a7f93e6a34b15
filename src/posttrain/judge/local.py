"""A language model as a judge: a policy of a run, or any base model.

The probability of an option comes from the next-token distribution, so one forward per prompt suffices and nothing is sampled:

    p(A) = exp l_A / (exp l_A + exp l_B)        l: log-probability of the first token in which the replies "A" and "B" differ

If both options together have a probability below MIN_MASS, the model does not answer the question, and the judge abstains.
"""

from collections.abc import Sequence
from math import exp

import torch

from posttrain.data.packing import split_by_tokens
from posttrain.judge.prompts import comparison, grading
from posttrain.judge.verdict import ComparisonRequest, GradingRequest, Reply, Verdict, combine
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, batch_logprobs, pack_trees, sum_by_row
from posttrain.records import Message

MIN_MASS = 0.05
_Tree = tuple[list[int], list[list[int]]]


class LocalJudge:
    """`adapter` is the name of the policy's adapter in the base, "base" for none."""

    def __init__(self, base: BaseModel, adapter: str, name: str) -> None:
        self.base, self.adapter, self.name = base, adapter, name

    def identity(self) -> dict[str, str]:
        """Kind, name and the hashes of the base."""
        return {"judge": self.name, "kind": "local", "adapter": self.adapter, **self.base.identity()}

    def compare(self, requests: Sequence[ComparisonRequest]) -> list[Verdict]:
        """Judge both orders of every request, in packed batches."""
        prompts = [
            comparison(request.question, request.prompt, first, second)
            for request in requests for first, second in ((request.a, request.b), (request.b, request.a))
        ]  # fmt: skip
        replies = self._option_replies(prompts, ("A", "B"))
        return [combine(a_first, b_first) for a_first, b_first in zip(replies[::2], replies[1::2], strict=True)]

    def grade(self, requests: Sequence[GradingRequest]) -> list[Reply]:
        """The probability of yes."""
        return self._option_replies(
            [grading(request.question, request.prompt, request.answer) for request in requests], ("Yes", "No")
        )

    def _option_replies(self, prompts: Sequence[Sequence[Message]], options: tuple[str, str]) -> list[Reply]:
        trees = [self._tree(messages, options) for messages in prompts]
        replies = [Reply(None, f"does not fit the context of {self.base.context} tokens")] * len(trees)
        fitting = [n for n, tree in enumerate(trees) if len(tree[0]) < self.base.context]
        lengths = [len(trees[n][0]) + 2 for n in fitting]
        for group in split_by_tokens(lengths, MICRO_TOKENS[self.base.device.type]):
            for n, reply in zip([fitting[g] for g in group], self._replies([trees[fitting[g]] for g in group]), strict=True):
                replies[n] = reply
        return replies

    def _tree(self, messages: Sequence[Message], options: tuple[str, str]) -> _Tree:
        """The prompt with the common prefix of both options, and for each option its first different token."""
        prompt, replies = self.base.chat.encode_completions(messages, [Message("assistant", option) for option in options])
        shared = 0
        while replies[0][shared] == replies[1][shared]:
            shared += 1
        return [*prompt, *replies[0][:shared]], [[reply[shared]] for reply in replies]

    @torch.no_grad()
    def _replies(self, trees: Sequence[_Tree]) -> list[Reply]:
        batch = pack_trees(trees, self.base.device)
        logprobs = sum_by_row(batch_logprobs(self.base, batch, self.adapter).double(), batch).tolist()
        return [_reply(first, second) for first, second in zip(logprobs[::2], logprobs[1::2], strict=True)]


def _reply(first: float, second: float) -> Reply:
    """Log-probabilities of the two options as a reply."""
    mass = exp(first) + exp(second)
    if not mass >= MIN_MASS:  # also true for NaN
        return Reply(None, "its reply would be neither of the two options")
    return Reply(exp(first) / mass)
