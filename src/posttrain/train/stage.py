"""What all training stages share: where the policy starts, how it is trained, and what is left on disk."""

from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from posttrain.artifacts import write_json
from posttrain.data.sources import hashes_in, refuse_changed
from posttrain.models.adapter_files import Policies, full_state, save_adapter, save_full
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter, LoraSettings
from posttrain.models.recompute import recomputed
from posttrain.models.untrained_tokens import token_ids
from posttrain.progress import Tracker
from posttrain.settings import PpoStage, Recipe, Stage
from posttrain.stop import StopSignal
from posttrain.train.checkpoint import Owner
from posttrain.train.loop import FitResult, TrainTask, fit
from posttrain.train.schedule import LoopSettings


class StageContext(NamedTuple):
    """All that a training stage may touch."""

    base: BaseModel
    policies: Policies
    recipe: Recipe
    folder: Path
    stop: StopSignal
    trackers: tuple[Tracker, ...] = ()
    evaluation_prompts: Collection[str] = ()
    # Whose the checkpoints are.
    owner: Owner | None = None
    # Of each reward function the hash of its source when the run was planned.
    sources: Mapping[str, str] = {}
    # sha256 of every source of the run, as it was planned.
    data: Mapping[str, str] = {}


class StageResult(NamedTuple):
    """What the manifest says of a finished stage."""

    fit: FitResult
    data_report: dict[str, Any]
    warnings: tuple[str, ...] = ()


class TrainedPolicy(NamedTuple):
    """The policy in training: the name to route to, its parameters, and how it is written."""

    routing: str
    parameters: dict[str, nn.Parameter]
    save: Callable[[Path], None]


def lora_settings(recipe: Recipe) -> LoraSettings:
    """The adapter's shape from the recipe."""
    adapter = recipe.adapter
    return LoraSettings(adapter.rank, adapter.alpha, adapter.dropout, adapter.targets, adapter.scaling)


def seed_of(stage: Stage, recipe: Recipe) -> int:
    """The stage's own seed, so that several make an ensemble or repetitions; else the recipe's, which also reads the data."""
    return recipe.seed if stage.seed is None else stage.seed


def start_policy(context: StageContext, stage: Stage) -> TrainedPolicy:
    """The init policy as something to train: a fresh adapter, a copy of one, or the whole model in place."""
    base = context.base
    if context.recipe.adapter.kind == "full":
        context.policies.activate(stage.init)
        base.model.requires_grad_(True)
        return TrainedPolicy("base", full_state(base), lambda folder: save_full(folder, base))
    adapter = start_adapter(context, stage.init, f"{stage.name} in training", seed=seed_of(stage, context.recipe))
    adapter.requires_grad_(True)
    return TrainedPolicy(adapter.name, adapter.parameters(), lambda folder: save_adapter(folder, adapter, base))


def start_adapter(context: StageContext, init: str, name: str, *, seed: int) -> LoraAdapter:
    """A new adapter, or a copy of a policy's, under a name of its own."""
    base, recipe = context.base, context.recipe
    if init == "base":
        ids = token_ids(base, recipe.adapter.train_tokens)
        return base.adapters.create(name, lora_settings(recipe), seed=seed, token_ids=ids)
    adapter = base.adapters.copy(context.policies.activate(init), name)
    adapter.settings = adapter.settings._replace(dropout=recipe.adapter.dropout)
    return adapter


def fit_stage(
    context: StageContext, stage: Stage, policy: TrainedPolicy, task: TrainTask, report: dict[str, Any],
    check: Callable[[dict[str, float]], tuple[str, ...]] | None = None,
) -> StageResult:  # fmt: skip
    """Train, then write the policy into the stage's folder. `check` may turn the final metrics into warnings.

    Raises DataError where the rows that `report` is about were read from other bytes than the run was planned with.
    """
    refuse_changed(hashes_in(report), context.data)
    write_json(context.folder / "data_report.json", report)
    try:
        with recomputed(context.base, context.recipe.base.recompute):
            result = fit(
                task,
                loop_settings(stage, seed_of(stage, context.recipe)),
                context.folder,
                label=stage.name,
                stop=context.stop,
                trackers=context.trackers,
                owner=context.owner,
            )
        policy.save(context.folder)
    finally:
        context.base.model.requires_grad_(False)
        context.policies.forget(policy.routing)
        if context.recipe.adapter.kind == "full":
            context.policies.forget("base")
    warnings = check(result.metrics) if check else ()
    return StageResult(result, report, (*report["warnings"], *warnings, *_without_validation(stage, task)))


def _without_validation(stage: Stage, task: TrainTask) -> tuple[str, ...]:
    """Settings that a stage without held-out rows cannot follow."""
    if task.validate is not None or isinstance(stage, PpoStage) or not (stage.patience or stage.keep == "best"):
        return ()
    return ('no row is held out for validation, so keep = "best" and patience did nothing; raise validation',)


def loop_settings(stage: Stage, seed: int) -> LoopSettings:
    """The loop's settings from a stage's. The rows of a ppo stage are its steps, each seen once."""
    if isinstance(stage, PpoStage):
        return LoopSettings(
            epochs=1, batch=1, learning_rate=stage.learning_rate, schedule=stage.schedule, warmup=stage.warmup,
            weight_decay=stage.weight_decay, clip=stage.clip, keep="best" if stage.gold else "last", patience=0,
            validate_every=0, checkpoint_every=stage.checkpoint_every, checkpoint_minutes=stage.checkpoint_minutes, seed=seed,
        )  # fmt: skip
    return LoopSettings(
        epochs=stage.epochs, batch=stage.batch, learning_rate=stage.learning_rate, schedule=stage.schedule,
        warmup=stage.warmup, weight_decay=stage.weight_decay, clip=stage.clip, keep=stage.keep, patience=stage.patience,
        validate_every=stage.validate_every, checkpoint_every=stage.checkpoint_every,
        checkpoint_minutes=stage.checkpoint_minutes, seed=seed,
    )  # fmt: skip
