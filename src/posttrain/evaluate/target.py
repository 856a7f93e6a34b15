"""`posttrain evaluate`: evaluate a model or a stage of a run outside a recipe.

A stage is evaluated together with its base, so the table shows the changes over the same items. A reward stage is measured on a
file of pairs, optionally against another one. Best-of-n of a policy uses a file of prompts.
"""

from pathlib import Path
from typing import Any

from posttrain.artifacts import disk_error, write_json, write_jsonl
from posttrain.data.formats import read_preferences
from posttrain.data.prepare import prepare_pairs
from posttrain.data.prompts import prepare_prompts
from posttrain.data.rankings import rank_prompts
from posttrain.errors import ArtifactError, RecipeError
from posttrain.evaluate import best_of
from posttrain.evaluate.pairs import agreement, describe, describe_agreement, table
from posttrain.evaluate.reward_model import Measured, measure_reward_model, write_measured
from posttrain.evaluate.run import evaluate_policy, write_scores
from posttrain.evaluate.scorecard import StageScores, build_scorecard, format_table
from posttrain.evaluate.suites import load_suites
from posttrain.generate.engine import SamplingSettings
from posttrain.models.target import RewardTarget, Target, open_reward_model, reward_model_on


def evaluate_pairs(
    target: RewardTarget, file: str, *, limit: int, out: Path | None, against: str | None = None
) -> tuple[dict[str, Any], str]:
    """Measure a reward model on the pairs of a file. Returns the measures and a text. `against` names another reward stage,
    whose agreement on the same pairs is measured.

    Raises DataError for a file without pairs within the stage's limits.
    """
    measured, dropped = _measured_on(target, file, limit)
    dropped_note = f" ({dropped} dropped)" if dropped else ""
    result, lines = measured.found, [f"{file}{dropped_note}: {describe(measured.found)}", table(measured.found)]
    if against is not None:
        against_measured, _ = _measured_on(open_reward_model(against), file, limit)
        shared = agreement(measured.pairs, against_measured.pairs)
        result = result | {"against": {"name": against, "agreement": shared, **against_measured.found}}
        lines += [f"{against}: {describe(against_measured.found)}", describe_agreement(shared, against)]
    if out is not None:
        _make_folder(out)
        write_measured(out, Measured(result, measured.pairs))
    return result, "\n".join(lines)


def _measured_on(target: RewardTarget, file: str, limit: int) -> tuple[Measured, int]:
    """Measure a reward model on the pairs of a file. Also returns how many pairs were dropped."""
    read = read_preferences(file, seed=target.recipe.seed, margins=True, probabilities=True)
    prepared = prepare_pairs(
        read, target.base.chat, max_tokens=target.stage.max_tokens, validation=0.0, allow_dropped=1.0, evaluation_prompts=(),
        context=target.base.context,
    )  # fmt: skip
    rows = prepared.train[:limit] if limit else prepared.train
    measured = measure_reward_model(target.base, target.adapter, rank_prompts(rows), label="pairs")
    return measured, sum(prepared.report["dropped"].values())


def evaluate_best_of(
    target: Target, reward: str, file: str, settings: SamplingSettings, *, samples: int, gold: str | None, limit: int,
    out: Path | None,
) -> tuple[dict[str, Any], str]:  # fmt: skip
    """Best-of-n of a policy with the reward model RUN/STAGE on the prompts of a file. Returns the result and a table. `gold`
    names another reward stage that scores the same completions.

    Raises ArtifactError for a policy with full weights, AdapterError for a reward model of another base, and DataError for a
    file without prompts.
    """
    base = target.base
    policy = target.policies.activate(target.policy)
    if policy == "base" and target.policy != "base":
        raise ArtifactError(
            target.policy,
            "has full weights, but a reward model is an adapter on the base",
            do="name a policy that is an adapter",
        )
    if settings.temperature <= 0:
        raise RecipeError("--temperature", "0 samples the same completion every time", allowed="above 0")
    scorers = [reward_model_on(base, name) for name in (reward, gold) if name is not None]
    prepared = prepare_prompts(
        file, base.chat, seed=settings.seed, max_prompt_tokens=base.context - settings.max_new_tokens, evaluation_prompts=(),
    )  # fmt: skip
    prompts = prepared.train[:limit] if limit else prepared.train
    sampled = best_of.sample_candidates(base, policy, scorers[0], [row.ids for row in prompts], settings, samples=samples)
    gold_PN = best_of.scores_of(base, scorers[1], sampled.rollouts) if gold is not None else None
    result = {"policy": target.policy, "reward": reward, "gold": gold, "prompts_file": file, **settings._asdict()}
    result |= best_of.measure_best_of(sampled.score_PN, gold_PN)
    if out is not None:
        _make_folder(out)
        write_json(out / "best_of.json", result)
        write_jsonl(out / "candidates.jsonl", best_of.rows([row.id for row in prompts], sampled._replace(gold_PN=gold_PN)))
    return result, best_of.table(result)


def evaluate_target(
    target: Target, suites: tuple[str, ...], *, limit: int, max_new_tokens: int, seed: int, out: Path | None, width: int = 120
) -> tuple[dict[str, Any], str]:
    """The scorecard and its table of `width` columns. With `out`, also write scores.jsonl and scorecard.json into that folder.

    Raises RecipeError for unknown suites and ArtifactError if `out` cannot be written.
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
