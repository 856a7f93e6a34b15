"""`fit`: the optimiser loop of the stages that learn from rows (sft, dpo, reward). A stage brings its `TrainTask`.

Which rows step s sees is a pure function of (seed, s), so the position in the data is the step number. `step.py` has what
surrounds a step; the ppo stage uses it without `fit`.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from posttrain.losses.output import LossOutput
from posttrain.progress import Tracker
from posttrain.stop import StopSignal
from posttrain.train.checkpoint import Owner
from posttrain.train.schedule import LoopSettings, epochs_seen, step_rows, total_steps, validation_interval
from posttrain.train.step import FitResult, TrainingSteps
from posttrain.train.validation import Validation


class MicroBatch(NamedTuple):
    """Part of a step that is computed at once: a stage's own payload, its tokens, and the ids of its rows."""

    payload: Any
    tokens: int
    row_ids: tuple[str, ...]


class TrainTask(NamedTuple):
    """What a stage learns from rows.

    `micro_batches` packs the rows of a step, given by their indices. `loss` gets a micro-batch and all micro-batches of its
    step, over which it takes its mean; its metrics are sums. `summarise` turns the sums of a step into metrics, `<stage>/loss`
    among them. `validate` measures the held-out rows, if there are any; the lowest `validation_metric` is the best.
    """

    rows: int
    parameters: dict[str, nn.Parameter]
    micro_batches: Callable[[Sequence[int]], list[MicroBatch]]
    loss: Callable[[MicroBatch, Sequence[MicroBatch]], LossOutput]
    summarise: Callable[[dict[str, float]], dict[str, float]]
    validate: Callable[[], dict[str, float]] | None
    validation_metric: str


def fit(
    task: TrainTask,
    settings: LoopSettings,
    folder: Path,
    *,
    label: str,
    stop: StopSignal,
    trackers: tuple[Tracker, ...] = (),
    owner: Owner | None = None,
) -> FitResult:
    """Train `task.parameters` in place, resuming from `folder`/checkpoints where there are any.

    Raises NonFiniteError before a bad step or after a validation that is not finite, Interrupted after a checkpoint
    when asked to stop.
    """
    training = TrainingSteps(
        task.parameters, settings, folder, steps=total_steps(task.rows, settings), label=label, stop=stop, trackers=trackers,
        owner=owner, validation=_validation(task, settings),
    )  # fmt: skip
    with training.resumed():
        while not training.finished:
            micro_batches = task.micro_batches(step_rows(training.step, task.rows, settings))
            for micro_batch in micro_batches:
                training.backward(task.loss(micro_batch, micro_batches), micro_batch.row_ids)
            taken = training.optimise(tokens=sum(m.tokens for m in micro_batches))
            epoch = epochs_seen(training.step + 1, task.rows, settings)
            training.record(taken, {**task.summarise(taken.sums), "train/epoch": epoch})
    return training.publish()


def _validation(task: TrainTask, settings: LoopSettings) -> Validation | None:
    if task.validate is None:
        return None
    validate = task.validate
    return Validation(lambda _: validate(), task.validation_metric, every=validation_interval(task.rows, settings))
