"""`posttrain evaluate`: a model, or a stage of a run, scored on suites outside of a recipe.

A stage of a run is scored beside its base, so that the table says what the stage changed on the same items.
"""

from pathlib import Path
from typing import Any

from posttrain.artifacts import disk_error, write_json
from posttrain.evaluate.run import evaluate_policy, write_scores
from posttrain.evaluate.scorecard import StageScores, build_scorecard, format_table
from posttrain.evaluate.suites import load_suites
from posttrain.models.target import Target


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
        try:
            out.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise disk_error(out, error) from error
        write_scores(out / "scores.jsonl", [score for stage in stages for score in stage.scores])
        write_json(out / "scorecard.json", scorecard)
    return scorecard, format_table(scorecard, width=width)
