"""Evaluate one policy on all tasks: one score per item.

`pipeline.py` calls this for the base and for every policy; the scores go to scores.jsonl and into the scorecard. Generated
tasks use the chat template for every policy and greedy decoding, in one call of the engine, which keeps its batch full. Choices
and prose are plain text without a template (`evaluate/logprobs.py`).

Not included: several sampled answers per item. Greedy answers are deterministic.
"""

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from posttrain.artifacts import write_jsonl
from posttrain.evaluate import checks, refusal
from posttrain.evaluate.logprobs import TextLogprob, choice_logprobs, text_logprobs
from posttrain.evaluate.suites import Item, Task
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.models.base_model import BaseModel
from posttrain.progress import Progress
from posttrain.records import Message, Rollout, Score
from posttrain.stop import StopSignal


class _EvaluationProgress:
    """Progress of one evaluation, with a check for a stop request."""

    def __init__(self, label: str, items: int, stop: StopSignal | None) -> None:
        self._progress, self._stop = Progress(label, items), stop

    def advance(self, items: int, tokens: int) -> None:
        """Report progress. Raises Interrupted if a stop is requested; an interrupted evaluation restarts from the beginning."""
        self._progress.update(items, tokens=tokens)
        if self._stop is not None:
            self._stop.check("evaluating")


def evaluate_policy(
    base: BaseModel, adapter: str, policy: str, tasks: Sequence[Task], *, max_new_tokens: int, seed: int, label: str,
    stop: StopSignal | None = None,
) -> list[Score]:  # fmt: skip
    """Scores of one policy, in the order of the tasks and their items.

    `adapter` is the name of the adapter in the base, `policy` the name in the scores. Raises ModelError for a prompt that
    leaves no room for `max_new_tokens` in the context, and Interrupted if a stop is requested.
    """
    progress = _EvaluationProgress(label, sum(len(task.items) for task in tasks), stop)
    rollouts = _generate(base, adapter, tasks, SamplingSettings(max_new_tokens, seed=seed, logprobs=False), progress)
    scores: list[Score] = []
    for task in tasks:
        if task.answer == "generate":
            scores += [_generated_score(task, item, policy, rollouts.pop(0)) for item in task.items]
        elif task.answer == "choices":
            scores += _choice_scores(base, adapter, task, policy, progress)
        else:
            scores += _prose_scores(base, adapter, task, policy, progress)
    return scores


def answer_samples(
    base: BaseModel, adapter: str, prompts: Sequence[str], *, seed: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers to prompts, in order, for the report: rows {"prompt", "answer", "ended", "tokens"}."""
    ids = [base.chat.encode_prompt([Message("user", prompt)]) for prompt in prompts]
    rollouts = generate(base, ids, SamplingSettings(max_new_tokens, seed=seed, logprobs=False), adapter)
    return [
        {"prompt": prompt, "answer": rollout.text, "ended": rollout.ended, "tokens": answer_length(rollout)}
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """Write one row per item. `evaluate.scorecard.load_scores` reads them."""
    write_jsonl(path, (asdict(score) for score in scores))


def answer_length(rollout: Rollout) -> int:
    """The number of tokens of an answer, without its end token."""
    return len(rollout.completion_ids) - (1 if rollout.ended else 0)


def _generate(
    base: BaseModel, adapter: str, tasks: Sequence[Task], settings: SamplingSettings, progress: _EvaluationProgress
) -> list[Rollout]:
    """Answers to the prompts of all generated tasks, in order."""
    prompts = [item["prompt"] for task in tasks if task.answer == "generate" for item in task.items]
    ids = [base.chat.encode_prompt([Message("user", prompt)]) for prompt in prompts]
    return generate(base, ids, settings, adapter, advance=progress.advance)


def _generated_score(task: Task, item: Item, policy: str, rollout: Rollout) -> Score:
    """Score a generated answer."""
    detail: dict[str, float | str | bool] = {"ended": rollout.ended, "tokens": float(answer_length(rollout))}
    if task.scorer == "checks":
        passed = [checks.check(check, rollout.text) for check in item["checks"]]
        value = float(all(passed))
        detail |= {"checks": float(len(passed)), "passed": float(sum(passed))}
        detail |= {"failed": ", ".join(c["kind"] for c, ok in zip(item["checks"], passed, strict=True) if not ok)}
    else:
        verdict = refusal.judge(rollout.text)
        value = float(verdict.refused)
        detail |= {"why": verdict.why, "degenerate": refusal.is_degenerate(rollout.text)}
    return Score(item["id"], task.name, task.name, policy, value, rollout.text, item["prompt"], detail)


def _choice_scores(base: BaseModel, adapter: str, task: Task, policy: str, progress: _EvaluationProgress) -> list[Score]:
    """Scores of questions. The answer is the choice with the highest summed log-probability; ties go to the first."""
    questions = [(item["question"], item["choices"]) for item in task.items]
    scores = []
    for item, logprobs in zip(task.items, choice_logprobs(base, adapter, questions), strict=True):
        scores.append(_choice_score(task, item, policy, logprobs))
        progress.advance(1, sum(choice.tokens for choice in logprobs))
    return scores


def _choice_score(task: Task, item: Item, policy: str, logprobs: list[TextLogprob]) -> Score:
    sums = [choice.logprob for choice in logprobs]
    best = sums.index(max(sums))
    rival = max(value for index, value in enumerate(sums) if index != item["answer"])
    detail: dict[str, float | str | bool] = {"chosen": float(best), "margin": sums[item["answer"]] - rival}
    value = float(best == item["answer"])
    return Score(item["id"], task.name, task.name, policy, value, item["choices"][best], item["question"], detail)


def _prose_scores(base: BaseModel, adapter: str, task: Task, policy: str, progress: _EvaluationProgress) -> list[Score]:
    """Scores of prose: nats per token of each text."""
    scores = []
    for item, logprob in zip(task.items, text_logprobs(base, adapter, [item["text"] for item in task.items]), strict=True):
        detail: dict[str, float | str | bool] = {"nats": -logprob.logprob, "tokens": float(logprob.tokens)}
        value = -logprob.logprob / max(1, logprob.tokens)
        scores.append(Score(item["id"], task.name, task.name, policy, value, "", item["text"], detail))
        progress.advance(1, logprob.tokens)
    return scores
