"""A language model in memory as a judge: a policy of a run, or any base model.

The probability of an option is read off the next-token distribution, so one forward a prompt is enough and nothing is sampled:

    p(A) = exp l_A / (exp l_A + exp l_B)        l: log-probability of the first token in which the replies "A" and "B" differ

Where both options together have less than MIN_MASS of the probability, the model was not answering the question: it abstains.
"""

from collections.abc import Sequence
from math import exp

import torch

from posttrain.data.packing import split_by_tokens
from posttrain.judge.prompts import comparison, grading
from posttrain.judge.verdict import Comparison, Grading, Reply, Verdict, combine
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, batch_logprobs, pack_trees, sum_by_row
from posttrain.records import Message

MIN_MASS = 0.05
_Tree = tuple[list[int], list[list[int]]]


class LocalJudge:
    """`adapter` is the policy's name on the base, "base" for none."""

    def __init__(self, base: BaseModel, adapter: str, name: str) -> None:
        self.base, self.adapter, self.name = base, adapter, name

    def identity(self) -> dict[str, str]:
        """Kind, name and the hashes of the base."""
        return {"judge": self.name, "kind": "local", "adapter": self.adapter, **self.base.identity()}

    def compare(self, asked: Sequence[Comparison]) -> list[Verdict]:
        """Both orders of every comparison in packed batches."""
        prompts = [
            comparison(one.question, one.prompt, *pair) for one in asked for pair in ((one.a, one.b), (one.b, one.a))
        ]  # fmt: skip
        replies = self._read(prompts, ("A", "B"))
        return [combine(a_first, b_first) for a_first, b_first in zip(replies[::2], replies[1::2], strict=True)]

    def grade(self, asked: Sequence[Grading]) -> list[Reply]:
        """The probability of yes."""
        return self._read([grading(one.question, one.prompt, one.answer) for one in asked], ("Yes", "No"))

    def _read(self, prompts: Sequence[Sequence[Message]], options: tuple[str, str]) -> list[Reply]:
        trees = [self._tree(messages, options) for messages in prompts]
        replies = [Reply(None, f"does not fit the context of {self.base.context} tokens")] * len(trees)
        fitting = [n for n, tree in enumerate(trees) if len(tree[0]) < self.base.context]
        lengths = [len(trees[n][0]) + 2 for n in fitting]
        for group in split_by_tokens(lengths, MICRO_TOKENS[self.base.device.type]):
            for n, reply in zip([fitting[g] for g in group], self._replies([trees[fitting[g]] for g in group]), strict=True):
                replies[n] = reply
        return replies

    def _tree(self, messages: Sequence[Message], options: tuple[str, str]) -> _Tree:
        """The prompt with what both options begin with, and below it the first token in which they differ."""
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
    if not mass >= MIN_MASS:  # also where it is no number
        return Reply(None, "it would reply neither of the two options")
    return Reply(exp(first) / mass)
