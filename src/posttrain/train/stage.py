"""What all training stages share: the policy at its start, the frame around its training, and the files of the stage."""

from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
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
from posttrain.recipe import Recipe
from posttrain.stages.kind import Preparation
from posttrain.stages.shared_settings import OptimisedSettings, TrainingSettings, own_seed
from posttrain.stop import StopSignal
from posttrain.train.checkpoint import Owner
from posttrain.train.loop import TrainTask, fit
from posttrain.train.schedule import LoopSettings
from posttrain.train.step import FitResult


class StageContext(NamedTuple):
    """What a training stage may use."""

    base: BaseModel
    policies: Policies
    recipe: Recipe
    folder: Path
    stop: StopSignal
    trackers: tuple[Tracker, ...] = ()
    evaluation_prompts: Collection[str] = ()
    # The stage that the checkpoints belong to.
    owner: Owner | None = None
    # The hash of the source of each reward function when the run was planned.
    sources: Mapping[str, str] = {}
    # sha256 of every data file when the run was planned.
    data: Mapping[str, str] = {}

    @property
    def preparation(self) -> Preparation:
        """How the data of the stage is rendered."""
        return Preparation(self.recipe.seed, self.evaluation_prompts, self.base.context)


class StageResult(NamedTuple):
    """A finished stage, for its manifest."""

    fit: FitResult
    data_report: dict[str, Any]
    warnings: tuple[str, ...] = ()

    @property
    def manifest(self) -> dict[str, Any]:
        """What the manifest says of the training: steps, tokens, seconds, the last metrics."""
        fit = self.fit
        return {"steps": fit.steps, "tokens": fit.tokens, "train_seconds": round(fit.seconds, 1), "metrics": fit.metrics}


class TrainedPolicy(NamedTuple):
    """The policy in training: its name for routing, its trained parameters, and how it is saved."""

    routing: str
    parameters: dict[str, nn.Parameter]
    save: Callable[[Path], None]


def lora_settings(recipe: Recipe) -> LoraSettings:
    """The adapter's shape from the recipe."""
    adapter = recipe.adapter
    return LoraSettings(adapter.rank, adapter.alpha, adapter.dropout, adapter.targets, adapter.scaling)


def seed_of(stage: OptimisedSettings, recipe: Recipe) -> int:
    """The stage's own seed, as members of an ensemble and repetitions have; else the recipe's, which always reads the data."""
    return own_seed(stage, recipe.seed)


def start_policy(context: StageContext, stage: OptimisedSettings) -> TrainedPolicy:
    """The init policy, ready to train: a new adapter, a copy of an adapter, or the full weights in place."""
    base = context.base
    if context.recipe.adapter.kind == "full":
        context.policies.activate(stage.init)
        base.model.requires_grad_(True)
        return TrainedPolicy("base", full_state(base), lambda folder: save_full(folder, base))
    adapter = start_adapter(context, stage.init, f"{stage.name} in training", seed=seed_of(stage, context.recipe))
    adapter.requires_grad_(True)
    return TrainedPolicy(adapter.name, adapter.parameters(), lambda folder: save_adapter(folder, adapter, base))


def start_adapter(context: StageContext, init: str, name: str, *, seed: int) -> LoraAdapter:
    """A new adapter, or a copy of a policy's adapter, under the given name."""
    base, recipe = context.base, context.recipe
    if init == "base":
        ids = token_ids(base, recipe.adapter.train_tokens)
        return base.adapters.create(name, lora_settings(recipe), seed=seed, token_ids=ids)
    adapter = base.adapters.copy(context.policies.activate(init), name)
    adapter.settings = adapter.settings._replace(dropout=recipe.adapter.dropout)
    return adapter


@contextmanager
def training_stage(context: StageContext, policy: TrainedPolicy, report: dict[str, Any]) -> Iterator[None]:
    """Train the policy inside; at the end it is written into the stage's folder, and the base is frozen again.

    Raises DataError where the rows that `report` is about were read from other bytes than the run was planned with.
    """
    refuse_changed(hashes_in(report), context.data)
    write_json(context.folder / "data_report.json", report)
    try:
        with recomputed(context.base, context.recipe.base.recompute):
            yield
        policy.save(context.folder)
    finally:
        context.base.model.requires_grad_(False)
        context.policies.forget(policy.routing)
        if context.recipe.adapter.kind == "full":
            context.policies.forget("base")


def fit_stage(
    context: StageContext, stage: OptimisedSettings, policy: TrainedPolicy, task: TrainTask, settings: LoopSettings,
    report: dict[str, Any], check: Callable[[dict[str, float]], tuple[str, ...]] | None = None,
) -> StageResult:  # fmt: skip
    """Train on rows, then write the policy into the stage's folder. `check` may turn the final metrics into warnings.

    Raises DataError where the rows that `report` is about were read from other bytes than the run was planned with.
    """
    with training_stage(context, policy, report):
        result = fit(
            task, settings, context.folder, label=stage.name, stop=context.stop, trackers=context.trackers, owner=context.owner
        )
    warnings = check(result.metrics) if check else ()
    return StageResult(result, report, (*report["warnings"], *warnings, *_without_validation(task, settings)))


def _without_validation(task: TrainTask, settings: LoopSettings) -> tuple[str, ...]:
    """A warning of settings that need held-out rows where there are none."""
    if task.validate is not None or not (settings.patience or settings.keep == "best"):
        return ()
    return ('no row is held out for validation, so keep = "best" and patience did nothing; raise validation',)


def loop_settings(stage: TrainingSettings, seed: int) -> LoopSettings:
    """The optimiser's settings of a stage that learns from rows."""
    return LoopSettings(
        epochs=stage.epochs, batch=stage.batch, learning_rate=stage.learning_rate, schedule=stage.schedule,
        warmup=stage.warmup, weight_decay=stage.weight_decay, clip=stage.clip, keep=stage.keep, patience=stage.patience,
        validate_every=stage.validate_every, checkpoint_every=stage.checkpoint_every,
        checkpoint_minutes=stage.checkpoint_minutes, seed=seed,
    )  # fmt: skip
