"""`posttrain evaluate`: a model, or a stage of a run, scored on suites outside of a recipe.

A stage of a run is scored beside its base, so that the table says what the stage changed on the same items. A reward stage is
measured on a file of pairs.
"""

from pathlib import Path
from typing import Any

from posttrain.artifacts import disk_error, write_json
from posttrain.data.formats import read_preferences
from posttrain.data.prepare import prepare_pairs
from posttrain.data.rankings import rank_prompts
from posttrain.evaluate.reward_model import describe, measure_reward_model, write_measured
from posttrain.evaluate.run import evaluate_policy, write_scores
from posttrain.evaluate.scorecard import StageScores, build_scorecard, format_table
from posttrain.evaluate.suites import load_suites
from posttrain.models.target import RewardTarget, Target


def evaluate_pairs(target: RewardTarget, file: str, *, limit: int, out: Path | None) -> tuple[dict[str, Any], str]:
    """Measure a reward model on the pairs of a file; returns what was found and a line about it.

    Raises DataError for a file without pairs that fit the stage's limits.
    """
    base, stage = target.base, target.stage
    prepared = prepare_pairs(
        read_preferences(file, seed=target.recipe.seed), base.chat, max_tokens=stage.max_tokens, validation=0.0,
        allow_dropped=1.0, evaluation_prompts=(),
    )  # fmt: skip
    rows = prepared.train[:limit] if limit else prepared.train
    measured = measure_reward_model(base, target.adapter, rank_prompts(rows), label="pairs")
    if out is not None:
        _make_folder(out)
        write_measured(out, measured)
    dropped = sum(prepared.report["dropped"].values())
    left_out = f" ({dropped} dropped)" if dropped else ""
    return measured.found, f"{file}{left_out}: {describe(measured.found)}"


def evaluate_target(
    target: Target, suites: tuple[str, ...], *, limit: int, max_new_tokens: int, seed: int, out: Path | None, width: int = 120
) -> tuple[dict[str, Any], str]:
    """Scorecard and its table of `width` columns; with `out` also scores.jsonl of the target and scorecard.json in that folder.

    Raises RecipeError for unknown suites and ArtifactError where `out` cannot be written.
    """
    tasks = load_suites(suites, limit=limit)
    stages = []
    for name in dict.fromkeys(("base", target.policy)):
        adapter = target.policies.activate(name)
        scores = evaluate_policy(
            target.base, adapter, name, tasks, max_new_tokens=max_new_tokens, seed=seed, label=f"evaluate {name}"
        )
        stages.append(StageScores(name, "base" if name == "base" else "policy", None if name == "base" else "base", scores))
    run = target.recipe.name if target.recipe is not None else target.base.source.model
    scorecard = build_scorecard(run, stages, tasks)
    if out is not None:
        _make_folder(out)
        write_scores(out / "scores.jsonl", [score for stage in stages for score in stage.scores])
        write_json(out / "scorecard.json", scorecard)
    return scorecard, format_table(scorecard, width=width)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise disk_error(out, error) from error
