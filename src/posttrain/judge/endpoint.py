"""A model behind an OpenAI-compatible server as a judge. It gets the prompts of a local judge.

    p(A) = exp l_A / (exp l_A + exp l_B)        l: log-probability of the option, from the likeliest first tokens of the reply

A server that gives no log-probabilities is asked for SAMPLES replies at temperature 1, and p(A) is the share of those that
choose A. An option that is not among the likeliest tokens gets the largest probability that it can have, so the judge is as
uncertain as the reply allows. With reasoning, replies are sampled from every server.
"""

from collections.abc import Callable, Sequence
from math import exp

from posttrain.generate.chat_reply import RemoteReply
from posttrain.generate.remote import Remote, RemoteRequest
from posttrain.judge.local import MIN_MASS, SEED
from posttrain.judge.prompts import COMPARED, GRADED, comparisons, gradings
from posttrain.judge.reasoning import Reasoning, final_answer, first_word, grades, share, verdicts
from posttrain.judge.verdict import ComparisonRequest, GradingRequest, Reply, Verdict
from posttrain.records import Message

# The likeliest first tokens that are asked for: what OpenAI, vLLM and `posttrain serve` allow.
TOP_LOGPROBS = 20
# Replies to a prompt if the server gives no log-probabilities, and their longest in tokens.
SAMPLES, SAMPLE_TOKENS = 8, 8
# Replies that one request asks for.
COMPLETIONS = 8
TOO_LONG = "does not fit the context of the server"


class EndpointJudge:
    """A judge behind `remote`, which the caller closes."""

    def __init__(self, remote: Remote, name: str, *, reasoning: Reasoning | None = None) -> None:
        self.name, self.reasoning = name, reasoning
        self._remote = remote
        # Whether the server gives log-probabilities; None until it has answered once.
        self._has_logprobs: bool | None = None

    def identity(self) -> dict[str, str]:
        """Kind, name, address and model. A server does not say which weights it has."""
        reasoning = {} if self.reasoning is None else self.reasoning.identity()
        return {"judge": self.name, "kind": "endpoint", **self._remote.identity(), **reasoning}

    def compare(self, requests: Sequence[ComparisonRequest]) -> list[Verdict]:
        """Judge both orders of every request. Raises EndpointError if the server cannot answer."""
        prompts = comparisons(requests, reasoning=self.reasoning is not None)
        return verdicts(self._option_replies(prompts, COMPARED), self.reasoning)

    def grade(self, requests: Sequence[GradingRequest]) -> list[Reply]:
        """The probability of yes. Raises EndpointError if the server cannot answer."""
        return grades(self._option_replies(gradings(requests, reasoning=self.reasoning is not None), GRADED), self.reasoning)

    def _option_replies(self, prompts: Sequence[Sequence[Message]], options: tuple[str, str]) -> list[Reply]:
        if self.reasoning is not None:
            return self._sampled(prompts, options, self.reasoning.samples, self.reasoning.tokens, final_answer)
        asked = [RemoteRequest(tuple(messages), 1, top_logprobs=TOP_LOGPROBS) for messages in prompts]
        # The first request alone shows whether the server gives log-probabilities.
        answered = self._ask(asked[:1]) if self._has_logprobs is None else []
        if self._has_logprobs is not False:
            answered += self._ask(asked[len(answered) :])
        answered += [None] * (len(asked) - len(answered))
        replies = [None if reply is None else _read(reply, options) for reply in answered]
        unread = [n for n, reply in enumerate(replies) if reply is None]
        sampled = self._sampled([prompts[n] for n in unread], options, SAMPLES, SAMPLE_TOKENS, first_word)
        found = dict(zip(unread, sampled, strict=True))
        return [found[n] if reply is None else reply for n, reply in enumerate(replies)]

    def _ask(self, requests: Sequence[RemoteRequest]) -> list[RemoteReply | None]:
        """Replies with log-probabilities; None for one that must be sampled instead."""
        replies: list[RemoteReply | None] = []
        for reply in self._remote.ask(requests):
            usable = reply.too_long or (not reply.refused and reply.choices[0].first is not None)
            if self._has_logprobs is None and not reply.too_long:
                self._has_logprobs = usable
            if reply.refused and not reply.too_long and self._has_logprobs:
                raise self._remote.refusal(reply)
            replies.append(reply if usable else None)
        return replies

    def _sampled(
        self, prompts: Sequence[Sequence[Message]], options: tuple[str, str], samples: int, tokens: int,
        read: Callable[[str, tuple[str, str]], int | None],
    ) -> list[Reply]:  # fmt: skip
        """The share of the first option in samples. Raises EndpointError if the server refuses a prompt for another reason
        than its length.
        """
        texts: list[list[str]] = [[] for _ in prompts]
        too_long: set[int] = set()
        # A server may give fewer replies than a request asks for; every round asks for what is missing.
        for number in range(samples):
            due = [n for n in range(len(prompts)) if len(texts[n]) < samples and n not in too_long]
            requests = [
                RemoteRequest(tuple(prompts[n]), tokens, 1.0, min(COMPLETIONS, samples - len(texts[n])), SEED + number)
                for n in due
            ]  # fmt: skip
            for n, reply in zip(due, self._remote.ask(requests) if due else [], strict=True):
                if reply.refused and not reply.too_long:
                    raise self._remote.refusal(reply)
                if reply.too_long:
                    too_long.add(n)
                texts[n] += [choice.text for choice in reply.choices]
        return [
            Reply(None, TOO_LONG) if n in too_long else share([read(text, options) for text in own[:samples]])
            for n, own in enumerate(texts)
        ]


def _read(reply: RemoteReply, options: tuple[str, str]) -> Reply:
    """The normalised probability of the first option among the likeliest first tokens.

    A token counts for the option that it equals, apart from white space around it. If neither option is a single token, it
    counts for the option that it begins.
    """
    if reply.too_long:
        return Reply(None, TOO_LONG)
    listed = [(token.strip(), exp(logprob)) for token, logprob in reply.choices[0].first or ()]
    masses = [sum(p for token, p in listed if token == option) for option in options]
    if not any(masses):
        begun = [[n for n, option in enumerate(options) if token and option.startswith(token)] for token, _ in listed]
        masses = [sum(p for (_, p), numbers in zip(listed, begun, strict=True) if numbers == [n]) for n in range(2)]
    if not sum(masses) >= MIN_MASS:
        return Reply(None, "its reply would be neither of the two options")
    # A token that is not listed is at most as likely as the least likely one that is, and as all that are not together.
    most = min(min(p for _, p in listed), max(0.0, 1 - sum(p for _, p in listed)))
    first, second = (mass or most for mass in masses)
    return Reply(first / (first + second))
