"""Answers and scores of a policy: packed log-probabilities are the model's own, the same call gives the same scores."""

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
import transformers

from posttrain.errors import ArtifactError, Interrupted, ModelError
from posttrain.evaluate.logprobs import choice_logprobs, text_logprobs
from posttrain.evaluate.run import answer_samples, evaluate_policy, write_scores
from posttrain.evaluate.scorecard import StageScores, build_scorecard, load_scores
from posttrain.evaluate.suites import load_suites, sample_prompts
from posttrain.models.base_model import BaseModel, load_base
from posttrain.stop import StopSignal

TASKS = load_suites(("starter",), limit=2)
QUESTIONS = [
    ("17 + 5 =", [" 32", " 22", " 24", " 2"]),
    ("", ["The keys on the table are mine.", "The keys on the table is mine."]),
    ("A long question that has to be read before it can be answered is this one:", [" yes", " no, not at all"]),
]


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return load_base("random:tiny", template="gemma", dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def plain(base: BaseModel) -> transformers.PreTrainedModel:
    """The same weights in transformers as it comes, with its own attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(base.source.folder, dtype=torch.float32, local_files_only=True)


def whole_ids(base: BaseModel, text: str) -> list[int]:
    """The tiny tokenizer adds no BOS, so the token that ends texts stands in front."""
    assert base.chat.eos_id is not None
    return [base.chat.eos_id, *base.chat.encode_text(text)]


def full_forward(model: transformers.PreTrainedModel, ids: Sequence[int]) -> torch.Tensor:
    """log p of each token after the first [T - 1]."""
    with torch.no_grad():
        logits = model(torch.tensor([ids])).logits[0, :-1]
    return torch.log_softmax(logits.double(), -1).gather(1, torch.tensor(ids[1:])[:, None])[:, 0]


def test_choices_differ_by_what_a_full_forward_says(base: BaseModel, plain: transformers.PreTrainedModel):
    """Sums over the shared beginning cancel, so differences between choices are compared."""
    for (question, choices), found in zip(QUESTIONS, choice_logprobs(base, "base", QUESTIONS), strict=True):
        whole = [float(full_forward(plain, whole_ids(base, question + choice)).sum()) for choice in choices]
        for one, reference in zip(found, whole, strict=True):
            assert abs((one.logprob - found[0].logprob) - (reference - whole[0])) < 1e-5


def test_choices_are_scored_on_their_own_tokens_only(base: BaseModel):
    (found,) = choice_logprobs(base, "base", [("17 + 5 =", [" 32", " 22"])])
    assert [choice.tokens for choice in found] == [2, 2]  # bytes: the space is shared


def test_prose_is_what_a_full_forward_says(base: BaseModel, plain: transformers.PreTrainedModel):
    texts = ["The heron stood in the shallow water.", "Salt.", "It rained for a week, and then the sun came out."]
    for text, found in zip(texts, text_logprobs(base, "base", texts), strict=True):
        reference = full_forward(plain, whole_ids(base, text))
        assert found.tokens == len(reference) == len(text.encode())
        assert abs(found.logprob - float(reference.sum())) < 1e-4 * len(reference)


def test_neighbours_in_a_batch_change_nothing(base: BaseModel):
    together = list(choice_logprobs(base, "base", QUESTIONS))
    alone = [next(choice_logprobs(base, "base", [question])) for question in QUESTIONS]
    for first, second in zip(together, alone, strict=True):
        assert [c.tokens for c in first] == [c.tokens for c in second]
        assert all(abs(a.logprob - b.logprob) < 1e-5 for a, b in zip(first, second, strict=True))


def test_a_text_beyond_the_context_is_refused(base: BaseModel):
    with pytest.raises(ModelError, match="a text of 3001 tokens · at most 2048"):
        list(text_logprobs(base, "base", ["a" * 3000]))


def test_evaluation_is_deterministic_and_ordered(base: BaseModel):
    settings = {"max_new_tokens": 6, "seed": 0, "label": "evaluate base"}
    first = evaluate_policy(base, "base", "base", TASKS, **settings)
    assert first == evaluate_policy(base, "base", "base", TASKS, **settings)
    assert [(s.task, s.item) for s in first] == [(t.name, item["id"]) for t in TASKS for item in t.items]


def test_every_score_can_be_read_by_itself(base: BaseModel):
    for score in evaluate_policy(base, "base", "mine", TASKS, max_new_tokens=6, seed=0, label="evaluate mine"):
        assert (score.policy, score.measure) == ("mine", score.task)
        if score.task in ("starter/instruction_following", "starter/refusal", "starter/over_refusal"):
            assert score.detail["tokens"] <= 6
            assert score.detail["ended"] is False or score.detail["tokens"] < 6
        elif score.task == "starter/prose":
            assert score.value == pytest.approx(score.detail["nats"] / score.detail["tokens"])
        else:
            assert score.value == float(score.detail["margin"] > 0)


def test_scores_come_back_from_disk_and_make_the_same_scorecard(base: BaseModel, tmp_path: Path):
    scores = evaluate_policy(base, "base", "base", TASKS, max_new_tokens=4, seed=0, label="evaluate base")
    write_scores(tmp_path / "scores.jsonl", scores)
    loaded = load_scores(tmp_path / "scores.jsonl")
    assert loaded == scores
    cards = [build_scorecard("run", [StageScores("base", "base", None, found)], TASKS) for found in (scores, loaded)]
    assert cards[0] == cards[1]


def test_a_damaged_scores_file_is_named(tmp_path: Path):
    (tmp_path / "scores.jsonl").write_text('{"item": "a"}\n', encoding="utf-8")
    with pytest.raises(ArtifactError, match=r"scores\.jsonl · not readable as scores"):
        load_scores(tmp_path / "scores.jsonl")


def test_a_stop_ends_the_evaluation(base: BaseModel):
    stop = StopSignal()
    stop.asked = True
    with pytest.raises(Interrupted, match="while evaluating"):
        evaluate_policy(base, "base", "base", TASKS, max_new_tokens=4, seed=0, label="evaluate base", stop=stop)


def test_samples_answer_each_prompt_in_order(base: BaseModel):
    prompts = sample_prompts(TASKS)
    rows = answer_samples(base, "base", prompts, seed=0, max_new_tokens=3)
    assert [row["prompt"] for row in rows] == list(prompts)
    assert all(row["tokens"] <= 3 for row in rows)
