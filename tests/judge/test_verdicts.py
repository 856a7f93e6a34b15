"""Two orders make one verdict; a model's reply is read off its next-token distribution."""

from math import exp
from pathlib import Path

import pytest
import torch

from posttrain.judge.local import MIN_MASS, LocalJudge
from posttrain.judge.open import JudgeContext, open_judge
from posttrain.judge.prompts import comparison, grading
from posttrain.judge.scorer import RewardJudge
from posttrain.judge.verdict import ComparisonRequest, GradingRequest, Reply, combine
from posttrain.models.adapter_files import Policies, save_adapter
from posttrain.models.base_model import BaseModel
from posttrain.models.heads import new_head
from posttrain.models.lora import LoraSettings
from posttrain.models.segments import Segments, Span
from posttrain.records import Message
from posttrain.stages.judge_settings import JudgeSettings

ASKED = [
    ComparisonRequest("Name a colour.", "Red.", "A colour is a property of light that people see.", "Which answer is shorter?"),
    ComparisonRequest("What is 2 + 2?", "4", "5", "Which answer is right?"),
    ComparisonRequest("Say hi.", "Hi!", "Hi!", "Which answer is friendlier?"),
]


@pytest.mark.parametrize(
    ("a_first", "b_first", "probability", "why"),
    [
        (0.8, 0.3, 0.75, ""),  # A is preferred in both orders: 0.8 and 1 - 0.3
        (0.1, 0.6, 0.25, ""),
        (0.9, 0.9, None, "the orders contradict each other"),  # the one shown first, whichever it is
        (0.2, 0.1, None, "the orders contradict each other"),  # the one shown second
        (0.5, 0.3, 0.6, ""),  # a tie contradicts nothing
        (None, 0.3, None, "unread"),
        (0.7, None, None, "unread"),
    ],
)
def test_orders_are_averaged_and_contradictions_abstain(a_first, b_first, probability, why: str):
    verdict = combine(*(Reply(p, "" if p is not None else "unread") for p in (a_first, b_first)))
    assert verdict.probability == (None if probability is None else pytest.approx(probability))
    assert verdict.why == why
    shown = [p for p in (a_first, b_first) if p is not None]
    assert verdict.shown_first == pytest.approx(shown)


def next_logits(base: BaseModel, ids: list[int]) -> torch.Tensor:
    """The logits after a prompt that is computed by itself."""
    segments = Segments((Span(0, len(ids), ()),))
    hidden = base.hidden(torch.tensor(ids), torch.arange(len(ids)), segments, "base")
    return base.logits(hidden[-1:], "base")[0].double()


@torch.no_grad()
def test_a_verdict_is_the_normalised_probability_of_the_two_options(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("posttrain.judge.local.MIN_MASS", 0.0)  # random weights answer nothing
    verdicts = LocalJudge(base, "base", "tiny").compare(ASKED)
    options = [base.chat.encode_text(letter)[-1] for letter in "AB"]
    for one, verdict in zip(ASKED, verdicts, strict=True):
        for pair, found in (((one.a, one.b), verdict.first), ((one.b, one.a), 1 - verdict.second)):
            logits = next_logits(base, base.chat.encode_prompt(comparison(one.question, one.prompt, *pair)))
            assert found == pytest.approx(torch.softmax(logits[options], 0)[0].item(), abs=1e-5)
    # Identical answers make identical prompts: only the order can decide, so there is no verdict.
    assert verdicts[2].first == pytest.approx(1 - verdicts[2].second)
    assert verdicts[2].probability is None
    replies = LocalJudge(base, "base", "tiny").grade([GradingRequest(one.prompt, one.a, "Is it right?") for one in ASKED])
    words = [base.chat.encode_text(word)[0] for word in ("Yes", "No")]
    for one, reply in zip(ASKED, replies, strict=True):
        logits = next_logits(base, base.chat.encode_prompt(grading("Is it right?", one.prompt, one.a)))
        assert reply.probability == pytest.approx(torch.softmax(logits[words], 0)[0].item(), abs=1e-5)


def test_a_model_that_does_not_answer_abstains(base: BaseModel):
    verdicts = LocalJudge(base, "base", "tiny").compare(ASKED)
    assert MIN_MASS == 0.05
    assert [verdict.probability for verdict in verdicts] == [None] * 3
    assert all("neither of the two options" in verdict.why for verdict in verdicts)


def test_what_does_not_fit_the_context_abstains_and_the_others_are_judged(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("posttrain.judge.local.MIN_MASS", 0.0)
    judge = LocalJudge(base, "base", "tiny")
    long = ASKED[1]._replace(a="4 " * base.context)
    verdicts = judge.compare([ASKED[0], long, ASKED[1]])
    assert "does not fit the context" in verdicts[1].why
    alone = judge.compare([ASKED[0], ASKED[1]])
    assert [verdicts[0].first, verdicts[2].first] == pytest.approx([v.first for v in alone], abs=1e-5)


def test_a_reward_model_judges_by_the_difference_of_its_scores(base: BaseModel):
    adapter = base.adapters.create("rm", LoraSettings(4, 8.0, 0.0, "all", "standard"), seed=0)
    adapter.head = new_head(base.model.config.hidden_size, seed=0, device=base.device)
    judge = RewardJudge(base, adapter.name, "rm")
    verdicts = judge.compare(ASKED)
    scores = judge._scores([(one.prompt, answer) for one in ASKED for answer in (one.a, one.b)])
    for n, verdict in enumerate(verdicts):
        wanted = 1 / (1 + exp(scores[2 * n + 1] - scores[2 * n]))
        assert (verdict.probability, verdict.first, verdict.second) == pytest.approx((wanted,) * 3)
    assert verdicts[2].probability == pytest.approx(0.5, abs=1e-6)
    assert judge.grade([GradingRequest("p", "a", "q")])[0].probability is None
    swapped = judge.compare([one._replace(a=one.b, b=one.a) for one in ASKED])
    assert [v.probability for v in swapped] == pytest.approx([1 - v.probability for v in verdicts], abs=1e-6)


@torch.no_grad()
def test_a_policy_of_the_run_judges_with_its_own_adapter(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`policy:NAME` and `reward:NAME` are loaded from the run, and activated before each use."""
    monkeypatch.setattr("posttrain.judge.local.MIN_MASS", 0.0)
    for name in ("sft", "rm"):
        adapter = base.adapters.create(name, LoraSettings(4, 8.0, 0.0, "all", "standard"), seed=0)
        for n, (_, b) in enumerate(adapter.weights.values()):
            b.copy_(torch.randn(b.shape, generator=torch.Generator().manual_seed(n)) * 0.1)
        if name == "rm":
            adapter.head = new_head(base.model.config.hidden_size, seed=0, device=base.device)
        (tmp_path / name).mkdir()
        save_adapter(tmp_path / name, adapter, base)
    wanted = {"policy:sft": LocalJudge(base, "sft", "").compare(ASKED), "reward:rm": RewardJudge(base, "rm", "").compare(ASKED)}
    for name in ("sft", "rm"):
        base.adapters.remove(name)
    context = JudgeContext(base, Policies(base, tmp_path), tmp_path)
    plain = LocalJudge(base, "base", "").compare(ASKED)
    for name, verdicts in wanted.items():
        with open_judge(JudgeSettings(name=name), context) as judge:
            assert judge.name == name
            assert [v.first for v in judge.compare(ASKED)] == pytest.approx([v.first for v in verdicts], abs=1e-6)
            assert [v.first for v in verdicts] != pytest.approx([v.first for v in plain], abs=1e-3)
            assert len(judge.identity()["policy_hash"]) == 64
    used: list[str] = []
    judge = LocalJudge(base, "sft", "", activate=lambda policy: used.append(policy) or "base")
    assert judge.compare(ASKED) == plain
    judge.grade([GradingRequest("p", "a", "q")])
    assert used == ["sft", "sft"], "full weights may have been replaced in between"


def test_a_conversation_ends_where_the_judge_begins(base: BaseModel):
    messages = comparison("Which?", "p", "a", "b")
    prompt, replies = base.chat.encode_completions(messages, [Message("assistant", "A"), Message("assistant", "B")])
    assert prompt == base.chat.encode_prompt(messages)
    assert replies[0][0] != replies[1][0]
