"""Verdicts after reasoning: what is read, shares, limits, and a local model that samples in one call."""

from pathlib import Path

import pytest

from posttrain.errors import RecipeError
from posttrain.judge import local as local_file
from posttrain.judge.local import LocalJudge
from posttrain.judge.open import JudgeContext, open_judge
from posttrain.judge.prompts import comparison, grading
from posttrain.judge.reasoning import Reasoning, final_answer, first_word, grades, share, verdicts
from posttrain.judge.verdict import ComparisonRequest, GradingRequest, Reply
from posttrain.models.adapter_files import Policies
from posttrain.models.base_model import BaseModel
from posttrain.records import Rollout
from posttrain.stages.judge_settings import JudgeSettings

PAIRS = [ComparisonRequest("Say hi.", "Hi!", "Go away.", "Which answer is kinder?")] * 2


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("It is kinder.\nAnswer: A", 0), ("answer: b.", 1), ("**Answer:** `B`", 1), ("Answer: (A)", 0), ("Answer: [B]", 1),
        ("Answer: A? No.\nAnswer: B", 1), ("Answer: Apples", None), ("A", None), ("The answer is unclear.", None), ("", None),
        ("Answer A is longer, so the answer: B", 1),
    ],
)  # fmt: skip
def test_the_last_answer_counts(text: str, chosen: int | None) -> None:
    assert final_answer(text, ("A", "B")) == chosen


@pytest.mark.parametrize(
    ("text", "chosen"),
    [
        ("Yes", 0),
        (" no.", 1),
        ('"Yes"', 0),
        ("Answer: No", 1),
        ("Nobody", None),
        ("Well, yes", None),
        ("", None),
        ("**No**", 1),
    ],
)
def test_the_first_word_counts_where_there_is_no_reasoning(text: str, chosen: int | None) -> None:
    assert first_word(text, ("Yes", "No")) == chosen


def test_shares_of_readable_samples_are_averaged_over_orders_and_only_then_limited() -> None:
    assert share([0, 1, None, 0]) == Reply(2 / 3)
    unread = share([None, None])
    assert (unread.probability, unread.why) == (None, "no sample ends in one of the two options")
    replies = [Reply(1.0), Reply(0.5), Reply(0.55), Reply(0.5), Reply(1.0), Reply(1.0), Reply(0.0), unread]
    limited = verdicts(replies, Reasoning(4, 64, 0.4))
    assert [v.probability for v in limited] == [0.6, pytest.approx(0.525), None, None]
    assert (limited[0].first, limited[0].second) == (1.0, 0.5), "the orders are not limited"
    assert limited[2].why == "the orders contradict each other"
    assert limited[3].why == unread.why
    assert [v.probability for v in verdicts(replies, None)] == [0.75, pytest.approx(0.525), None, None]
    assert [v.probability for v in verdicts(replies[:2], Reasoning(4, 64, 0.2))] == [0.75]
    assert grades([Reply(1.0), unread], Reasoning(4, 64, 0.4)) == [Reply(0.6), unread]
    assert grades([Reply(1.0)], None) == [Reply(1.0)]


def test_a_prompt_asks_for_reasoning_only_then() -> None:
    assert comparison("Q?", "p", "a", "b")[-1].content.endswith("Q?\nReply with A or B alone.")
    asked = comparison("Q?", "p", "a", "b", reasoning=True)[-1].content
    assert asked.endswith("Q?\nThink step by step. Then end with `Answer: A` or `Answer: B`.")
    assert grading("Q?", "p", "a", reasoning=True)[-1].content.endswith("`Answer: Yes` or `Answer: No`.")


def test_a_local_model_samples_all_prompts_in_one_call(base: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    """Random weights say nothing readable. The engine is called once, for all samples of all prompts that fit."""
    calls: list[tuple[int, int]] = []
    generate = local_file.generate

    def counted(base: BaseModel, prompts: list[list[int]], *arguments: object, completions: int) -> list[Rollout]:
        calls.append((len(prompts), completions))
        return generate(base, prompts, *arguments, completions=completions)  # type: ignore[arg-type]

    monkeypatch.setattr(local_file, "generate", counted)
    judge = LocalJudge(base, "base", "tiny", reasoning=Reasoning(3, 4, 0.4))
    found = judge.compare([*PAIRS, PAIRS[0]._replace(a="long " * base.context)])
    assert calls == [(4, 3)]
    assert [v.probability for v in found] == [None] * 3
    assert [v.why for v in found][:2] == ["no sample ends in one of the two options"] * 2
    assert "does not fit the context" in found[2].why
    assert judge.grade([GradingRequest("p", "a", "q")])[0].probability is None
    assert judge.identity()["reasoning"] == "3 samples of at most 4 tokens, limited by 0.4"
    assert "reasoning" not in LocalJudge(base, "base", "tiny").identity()


def test_a_judge_of_the_run_s_own_base_is_not_loaded_again(base: BaseModel, tmp_path: Path) -> None:
    context = JudgeContext(base, Policies(base, tmp_path), tmp_path)
    for name in (base.source.model, "policy:base"):
        with open_judge(JudgeSettings(name=name, reasoning=2), context) as judge:
            assert isinstance(judge, LocalJudge)
            assert judge.base is base
            assert judge.reasoning == Reasoning(2, 256, 0.4)
    with pytest.raises(RecipeError, match="outside of a run"):
        with open_judge(JudgeSettings(name="policy:sft"), JudgeContext(None, None, tmp_path)):
            pass
