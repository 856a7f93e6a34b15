"""One policy answers every task: scores out, one an item.

Where it stands: `pipeline.py` calls it for the base and for every policy; the scores go to scores.jsonl and into the
scorecard. Generated tasks go through the chat template for everyone, greedily and in one call of the engine, which
keeps its batch full; choices and prose are plain text without a template (`evaluate/logprobs.py`).

Left out: sampling several answers an item. Greedy answers of one policy to one item are always the same.
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


class _Work:
    """Progress of one evaluation, and the place where it notices that it should stop."""

    def __init__(self, label: str, items: int, stop: StopSignal | None) -> None:
        self._progress, self._stop = Progress(label, items), stop

    def advance(self, items: int, tokens: int) -> None:
        """Say what is done. Raises Interrupted when asked to stop: an evaluation is short and starts again."""
        self._progress.update(items, tokens=tokens)
        if self._stop is not None:
            self._stop.check("evaluating")


def evaluate_policy(
    base: BaseModel, adapter: str, policy: str, tasks: Sequence[Task], *, max_new_tokens: int, seed: int, label: str,
    stop: StopSignal | None = None,
) -> list[Score]:  # fmt: skip
    """Scores of one policy, in the order of the tasks and their items.

    `adapter` is what the base computes with, `policy` the name the scores carry. A prompt that leaves no room for
    `max_new_tokens` in the model's context is a ModelError; Interrupted is raised when `stop` asks.
    """
    progress = _Work(label, sum(len(task.items) for task in tasks), stop)
    written = _generate(base, adapter, tasks, SamplingSettings(max_new_tokens, seed=seed, logprobs=False), progress)
    scores: list[Score] = []
    for task in tasks:
        if task.answer == "generate":
            scores += [_written(task, item, policy, written.pop(0)) for item in task.items]
        elif task.answer == "choices":
            scores += _choose(base, adapter, task, policy, progress)
        else:
            scores += _read(base, adapter, task, policy, progress)
    return scores


def answer_samples(
    base: BaseModel, adapter: str, prompts: Sequence[str], *, seed: int, max_new_tokens: int
) -> list[dict[str, Any]]:
    """Greedy answers to prompts, in their order, for the report: rows {"prompt", "answer", "ended", "tokens"}."""
    ids = [base.chat.encode_prompt([Message("user", prompt)]) for prompt in prompts]
    rollouts = generate(base, ids, SamplingSettings(max_new_tokens, seed=seed, logprobs=False), adapter)
    return [
        {"prompt": prompt, "answer": rollout.text, "ended": rollout.ended, "tokens": answer_length(rollout)}
        for prompt, rollout in zip(prompts, rollouts, strict=True)
    ]


def write_scores(path: Path, scores: Sequence[Score]) -> None:
    """One row an item; `evaluate.scorecard.load_scores` reads them."""
    write_jsonl(path, (asdict(score) for score in scores))


def answer_length(rollout: Rollout) -> int:
    """Tokens of an answer without the one that ended it."""
    return len(rollout.completion_ids) - (1 if rollout.ended else 0)


def _generate(
    base: BaseModel, adapter: str, tasks: Sequence[Task], settings: SamplingSettings, progress: _Work
) -> list[Rollout]:
    """Answers to the prompts of all generated tasks, in their order."""
    prompts = [item["prompt"] for task in tasks if task.answer == "generate" for item in task.items]
    ids = [base.chat.encode_prompt([Message("user", prompt)]) for prompt in prompts]
    return generate(base, ids, settings, adapter, advance=progress.advance)


def _written(task: Task, item: Item, policy: str, rollout: Rollout) -> Score:
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


def _choose(base: BaseModel, adapter: str, task: Task, policy: str, progress: _Work) -> list[Score]:
    """Questions: the choice with the highest summed log-probability is the answer; the first of equals."""
    questions = [(item["question"], item["choices"]) for item in task.items]
    scores = []
    for item, found in zip(task.items, choice_logprobs(base, adapter, questions), strict=True):
        scores.append(_chosen(task, item, policy, found))
        progress.advance(1, sum(choice.tokens for choice in found))
    return scores


def _chosen(task: Task, item: Item, policy: str, found: list[TextLogprob]) -> Score:
    sums = [choice.logprob for choice in found]
    best = sums.index(max(sums))
    rival = max(value for index, value in enumerate(sums) if index != item["answer"])
    detail: dict[str, float | str | bool] = {"chosen": float(best), "margin": sums[item["answer"]] - rival}
    value = float(best == item["answer"])
    return Score(item["id"], task.name, task.name, policy, value, item["choices"][best], item["question"], detail)


def _read(base: BaseModel, adapter: str, task: Task, policy: str, progress: _Work) -> list[Score]:
    """Prose: nats a token of each text."""
    scores = []
    for item, found in zip(task.items, text_logprobs(base, adapter, [item["text"] for item in task.items]), strict=True):
        detail: dict[str, float | str | bool] = {"nats": -found.logprob, "tokens": float(found.tokens)}
        value = -found.logprob / max(1, found.tokens)
        scores.append(Score(item["id"], task.name, task.name, policy, value, "", item["text"], detail))
        progress.advance(1, found.tokens)
    return scores
