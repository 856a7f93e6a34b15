"""The scorecard: the measures of every policy with intervals, and all changes over the same items.

Input: scores of the base and of each policy stage. Output: `scorecard.json`, from which `report.html` and the terminal table
are made. Changes are paired by item, against the parent stage and against the base.

    verdict = better | worse   if the 95 % interval of the paired change excludes 0,   not shown   otherwise

Not included: a correction for multiple comparisons. Of forty measures without a true change, about two get a verdict.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import read_jsonl
from posttrain.errors import ArtifactError
from posttrain.evaluate import stats
from posttrain.evaluate.damage import answer_figures, signs_of_damage
from posttrain.evaluate.refusal_measure import load_figures
from posttrain.evaluate.suites import Measure, Task, all_measures
from posttrain.evaluate.table import format_table
from posttrain.evaluate.tax import alignment_tax, shown_losses
from posttrain.file_types import scores_of
from posttrain.records import Score

__all__ = ["StageScores", "build_scorecard", "format_table", "load_scores", "measure_values"]

DIGITS = 6
Values = dict[tuple[str, str], float]


class StageScores(NamedTuple):
    """The scores of one policy. `parent` is the policy that its training started from (None for the base)."""

    name: str
    kind: str
    parent: str | None
    scores: Sequence[Score]


def build_scorecard(
    run: str, stages: Sequence[StageScores], tasks: Sequence[Task], gains: Sequence[Mapping[str, Any]] = ()
) -> dict[str, Any]:
    """The content of scorecard.json. The first stage is the base; parents precede their children. `gains` are the gains of
    PPO stages (`evaluate/gain.py`)."""
    measures = all_measures(tasks)
    judged = {task.name for task in tasks if task.scorer == "refusal"}
    answered = {stage.name: stage.scores for stage in stages}
    by_stage = {stage.name: {m.name: measure_values(m, stage.scores) for m in measures} for stage in stages}
    rows = [
        {
            "name": stage.name,
            "kind": stage.kind,
            "parent": stage.parent,
            "measures": {
                m.name: entry
                for m in measures
                if (entry := _entry(m, stage, stages[0].name, by_stage, bool(judged & set(m.tasks)))) is not None
            },
            "answers": answer_figures(
                stage.scores, {name: answered[name] for name in _against(stage, stages[0].name, answered)}
            ),
        }
        for stage in stages
    ]
    return {
        "run": run, "confidence": 0.95, "warnings": signs_of_damage(rows), "stages": rows, "losses": shown_losses(rows),
        "gains": list(gains), "tax": alignment_tax(rows),
    }  # fmt: skip


def load_scores(path: Path) -> list[Score]:
    """The scores of a finished evaluation. Raises ArtifactError for a damaged file."""
    do = f"remove {path.parent} and run the recipe again"
    try:
        rows = list(read_jsonl(path))
    except (ValueError, RecursionError):
        raise ArtifactError(str(path), "not readable as scores", do=do) from None
    return scores_of(rows, str(path), do=do)


def measure_values(measure: Measure, scores: Sequence[Score]) -> Values:
    """The values that a measure averages, by (task, item)."""
    tasks = set(measure.tasks)
    if measure.of == "score":
        return {(s.task, s.item): s.value for s in scores if s.task in tasks}
    return {(s.task, s.item): float(s.detail[measure.of]) for s in scores if s.task in tasks}


def _entry(
    measure: Measure, stage: StageScores, base: str, by_stage: Mapping[str, Mapping[str, Values]], judged: bool
) -> dict[str, Any] | None:
    """One measure of one stage, or None if the stage has no scores for it."""
    values = by_stage[stage.name][measure.name]
    if not values:
        return None
    interval = stats.interval(list(values.values()), measure.unit)
    entry: dict[str, Any] = {
        "value": _round(interval.value), "low": _round(interval.low), "high": _round(interval.high), "n": interval.n,
        "better": measure.better, "unit": measure.unit, "title": measure.title, "role": measure.role,
        "tasks": list(measure.tasks), "of": measure.of,
    }  # fmt: skip
    against = _against(stage, base, by_stage)
    changes = [(name, _change(measure, by_stage[name][measure.name], values)) for name in against]
    entry["changes"] = [{"against": name, **change} for name, change in changes if change is not None]
    if judged and measure.of == "score":
        entry["judge"] = _judge_figures()
    return entry


def _against(stage: StageScores, base: str, available: Iterable[str]) -> list[str]:
    """The policies that a stage is compared with: its parent, then the base."""
    names = [name for name in dict.fromkeys((stage.parent, base)) if name is not None and name != stage.name]
    return [name for name in names if name in available]


def _change(measure: Measure, before: Values, after: Values) -> dict[str, Any] | None:
    """The paired change over the items that both policies answered."""
    shared = [key for key in after if key in before]
    if not shared:
        return None
    interval = stats.difference([before[k] for k in shared], [after[k] for k in shared], measure.unit)
    verdict = stats.verdict(interval, measure.better, measure.unit)
    return {"value": _round(interval.value), "low": _round(interval.low), "high": _round(interval.high), "verdict": verdict}


def _round(value: float) -> float:
    return round(value, DIGITS)


def _judge_figures() -> dict[str, Any]:
    """The accuracy of the refusal rule, on the answers that were not used to develop it."""
    reported = load_figures()["reported"]
    models = {name: figures for name, figures in reported.items() if name != "all"}
    return {
        "sensitivity": reported["all"]["sensitivity"],
        "specificity": reported["all"]["specificity"],
        "lowest_sensitivity": min(figures["sensitivity"]["value"] for figures in models.values()),
        "lowest_specificity": min(figures["specificity"]["value"] for figures in models.values()),
        "answers": reported["all"]["n"],
        "models": len(models),
    }
