"""A language model as a judge: a policy of a run, or any base model.

The probability of an option comes from the next-token distribution, so one forward per prompt suffices and nothing is sampled:

    p(A) = exp l_A / (exp l_A + exp l_B)        l: log-probability of the first token in which the replies "A" and "B" differ

If both options together have a probability below MIN_MASS, the model does not answer the question, and the judge abstains.

With reasoning the model samples several replies to every prompt, all in one batch (`judge/reasoning.py`).
"""

from collections.abc import Callable, Sequence
from math import exp
from typing import NamedTuple

import torch

from posttrain.data.packing import Segment, pack, split_by_tokens
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.judge.prompts import COMPARED, GRADED, comparisons, gradings
from posttrain.judge.reasoning import Reasoning, final_answer, grades, share, verdicts
from posttrain.judge.verdict import ComparisonRequest, GradingRequest, Reply, Verdict
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS, WORTH_SHARING, to_device
from posttrain.records import Message

MIN_MASS = 0.05
# Seed of the samples of reasoning.
SEED = 0


class Question(NamedTuple):
    """A prompt as ids up to where the two options differ, and the different token of each option."""

    ids: list[int]
    options: tuple[int, int]


class LocalJudge:
    """`policy` is the name of a policy; `activate` gives the name of its adapter in the base, "base" for none.

    It is called before each use, because full weights replace each other in memory.
    """

    def __init__(
        self, base: BaseModel, policy: str, name: str, *,
        activate: Callable[[str], str] = str, reasoning: Reasoning | None = None,
    ) -> None:  # fmt: skip
        self.base, self.name, self.reasoning = base, name, reasoning
        self._policy, self._activate = policy, activate

    def identity(self) -> dict[str, str]:
        """Kind, name, the hashes of the base, and the hash of the policy's weights."""
        adapter = self._activate(self._policy)
        reasoning = {} if self.reasoning is None else self.reasoning.identity()
        return {"judge": self.name, "kind": "local", "adapter": adapter, **weights_in_use(self.base, adapter), **reasoning}

    def compare(self, requests: Sequence[ComparisonRequest]) -> list[Verdict]:
        """Judge both orders of every request, in packed batches."""
        # All questions about a pair follow each other, because they share its texts.
        order = sorted(range(len(requests)), key=_places(requests).__getitem__)
        prompts = comparisons([requests[n] for n in order], reasoning=self.reasoning is not None)
        # Both orders of a pair alternate: sorted by order, each keeps its texts together.
        alternating = self._option_replies([*prompts[::2], *prompts[1::2]], COMPARED)
        half = len(order)
        replies = [reply for both in zip(alternating[:half], alternating[half:], strict=True) for reply in both]
        found = dict(zip(order, verdicts(replies, self.reasoning), strict=True))
        return [found[n] for n in range(len(requests))]

    def grade(self, requests: Sequence[GradingRequest]) -> list[Reply]:
        """The probability of yes."""
        return grades(self._option_replies(gradings(requests, reasoning=self.reasoning is not None), GRADED), self.reasoning)

    def _option_replies(self, prompts: Sequence[Sequence[Message]], options: tuple[str, str]) -> list[Reply]:
        adapter = self._activate(self._policy)
        if self.reasoning is not None:
            return self._reasoned(prompts, options, adapter, self.reasoning)
        return option_replies(self.base, adapter, prompts, options)

    def _reasoned(
        self, prompts: Sequence[Sequence[Message]], options: tuple[str, str], adapter: str, reasoning: Reasoning
    ) -> list[Reply]:
        """The share of the first option in samples, all of one call of the engine."""
        ids = [self.base.chat.encode_prompt(messages) for messages in prompts]
        replies = [too_long(self.base)] * len(ids)
        fitting = [n for n, prompt in enumerate(ids) if len(prompt) + reasoning.tokens <= self.base.context]
        settings = SamplingSettings(reasoning.tokens, temperature=1.0, seed=SEED, logprobs=False)
        samples = reasoning.samples
        rollouts = generate(self.base, [ids[n] for n in fitting], settings, adapter, completions=samples)
        for place, n in enumerate(fitting):
            own = rollouts[place * samples : (place + 1) * samples]
            replies[n] = share([final_answer(rollout.text, options) for rollout in own])
        return replies


def _places(requests: Sequence[ComparisonRequest]) -> list[int]:
    """For each request the number of its pair, in the order in which pairs first occur."""
    numbers: dict[tuple[str, str, str], int] = {}
    return [numbers.setdefault((request.prompt, request.a, request.b), len(numbers)) for request in requests]


def too_long(base: BaseModel) -> Reply:
    """The reply of a prompt that does not fit."""
    return Reply(None, f"does not fit the context of {base.context} tokens")


def option_replies(
    base: BaseModel, adapter: str, prompts: Sequence[Sequence[Message]], options: tuple[str, str]
) -> list[Reply]:
    """The probability of the first option as the reply to each prompt, normalised over both. Texts that neighbouring prompts
    share are computed once."""
    encoded = [_question(base, messages, options) for messages in prompts]
    # Two orders of equal answers are the same question.
    places = {tuple(question.ids): question for question in encoded}
    questions = list(places.values())
    replies = [too_long(base)] * len(questions)
    fitting = [n for n, question in enumerate(questions) if len(question.ids) < base.context]
    groups = _sharing([questions[n].ids for n in fitting], MICRO_TOKENS[base.device.type])
    lengths = [_tokens([questions[fitting[g]].ids for g in group]) for group in groups]
    for batch in split_by_tokens(lengths, MICRO_TOKENS[base.device.type]):
        numbers = [[fitting[g] for g in groups[index]] for index in batch]
        found = _replies(base, adapter, [[questions[n] for n in group] for group in numbers])
        for n, reply in zip([n for group in numbers for n in group], found, strict=True):
            replies[n] = reply
    found_by_ids = dict(zip(places, replies, strict=True))
    return [found_by_ids[tuple(question.ids)] for question in encoded]


def _question(base: BaseModel, messages: Sequence[Message], options: tuple[str, str]) -> Question:
    prompt, replies = base.chat.encode_completions(messages, [Message("assistant", option) for option in options])
    shared = 0
    while replies[0][shared] == replies[1][shared]:
        shared += 1
    return Question([*prompt, *replies[0][:shared]], (replies[0][shared], replies[1][shared]))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Length of the common prefix. Each keeps at least its last token."""
    limit = min(len(a), len(b)) - 1
    return next((i for i in range(limit) if a[i] != b[i]), limit)


def _tokens(group: Sequence[Sequence[int]]) -> int:
    """Tokens of a forward over prompts that share their common prefix."""
    trunk = min(_common(group[0], ids) for ids in group) if len(group) > 1 else 0
    return trunk + sum(len(ids) - trunk for ids in group)


def _sharing(prompts: Sequence[Sequence[int]], budget: int) -> list[list[int]]:
    """Neighbouring prompts in groups that share at least half of their tokens, of at most `budget` tokens each."""
    groups: list[list[int]] = []
    for n, ids in enumerate(prompts):
        group = groups[-1] if groups else []
        shared = _common(prompts[group[0]], ids) if group else 0
        worth = shared >= WORTH_SHARING and 2 * shared >= max(len(ids), len(prompts[group[0]])) if group else False
        if worth and _tokens([*(prompts[g] for g in group), ids]) <= budget:
            group.append(n)
        else:
            groups.append([n])
    return groups


@torch.no_grad()
def _replies(base: BaseModel, adapter: str, groups: Sequence[Sequence[Question]]) -> list[Reply]:
    """One forward over groups of questions; each group's common prefix is a segment that its questions continue."""
    segments: list[Segment] = []
    rows = 0
    for group in groups:
        trunk = min(_common(group[0].ids, question.ids) for question in group) if len(group) > 1 else 0
        parent = len(segments) if trunk else None
        if trunk:
            segments.append(Segment(tuple(group[0].ids[:trunk]), None, (False,) * trunk, -1))
        for question in group:
            rest = tuple(question.ids[trunk:])
            segments.append(Segment(rest, parent, (False,) * len(rest), rows))
            rows += 1
    batch = to_device(pack(segments, rows), base.device)
    hidden_TD = base.hidden(batch.ids_T, batch.positions_T, batch.segments, adapter)
    options = torch.tensor([question.options for group in groups for question in group], device=base.device)
    logprobs = base.logprobs(hidden_TD[batch.last_B].repeat_interleave(2, 0), options.flatten(), adapter).double().tolist()
    return [option_reply(first, second) for first, second in zip(logprobs[::2], logprobs[1::2], strict=True)]


def option_reply(first: float, second: float) -> Reply:
    """Log-probabilities of the two options as a reply."""
    mass = exp(first) + exp(second)
    if not mass >= MIN_MASS:  # also true for NaN
        return Reply(None, "its reply would be neither of the two options")
    return Reply(exp(first) / mass)


def weights_in_use(base: BaseModel, adapter: str) -> dict[str, str]:
    """The identity of a base, with the hash of an adapter's files, or of full weights that replace the base's."""
    policy_hash = base.weights_hash if adapter == "base" else base.adapters.get(adapter).fingerprint
    return {**base.identity(), **({"policy_hash": policy_hash} if policy_hash else {})}
