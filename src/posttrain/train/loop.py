"""The one optimiser loop: order of the data, accumulation, AdamW, schedule, clipping, validation, checkpoints, guards.

Which rows step s sees is a pure function of (seed, s), so the position in the data is the step number. A step is either
whole or did not happen: a checkpoint holds the state between two steps, and a resumed run repeats the very same numbers.
A loss or gradient that is not finite stops the run before the optimiser moves. A stage brings its own `TrainTask`.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.artifacts import write_json
from posttrain.errors import Interrupted, NonFiniteError, TrainingError
from posttrain.losses.output import LossOutput
from posttrain.progress import Metrics, Progress, Tracker
from posttrain.stop import StopSignal
from posttrain.train.checkpoint import CHECKPOINTS, Checkpoint, Owner, load_newest, save_checkpoint, step_name
from posttrain.train.schedule import LoopSettings, epochs_seen, learning_rate, step_rows, total_steps, validation_interval

ADAM_EPSILON = 1e-8
NONFINITE = "nonfinite.json"


class MicroBatch(NamedTuple):
    """Part of a step that is computed at once: a stage's own payload, its tokens, and the ids of its rows."""

    payload: Any
    tokens: int
    row_ids: tuple[str, ...]


class TrainTask(NamedTuple):
    """What a stage gives the loop. Metrics of `loss` are sums; `summarise` turns a step's sums into metrics.

    With `by_step`, `rows` counts optimiser steps and `micro_batches` is asked for a step's number instead of its rows; that it
    has none ends the stage before that step. `next_step` is told after every step which would be next, and may leave some out.
    `validate_every` goes before the settings'. `validate_at` takes the place of `validate`: it is told how many steps were
    taken, and asked before the first one too. `higher_is_better` is said of the validation metric. `rates` are what the
    learning rate of some parameters is multiplied by; those of one rate are clipped by a norm of their own.
    """

    rows: int
    parameters: dict[str, nn.Parameter]
    micro_batches: Callable[[Sequence[int]], list[MicroBatch]]
    loss: Callable[[MicroBatch, Sequence[MicroBatch]], LossOutput]
    summarise: Callable[[dict[str, float]], dict[str, float]]
    validate: Callable[[], dict[str, float]] | None
    validation_metric: str
    by_step: bool = False
    next_step: Callable[[int], int] | None = None
    validate_at: Callable[[int], dict[str, float]] | None = None
    validate_every: int = 0
    higher_is_better: bool = False
    rates: Mapping[str, float] = {}


class FitResult(NamedTuple):
    """What a finished loop says of itself; `metrics` are those of the step whose weights are published."""

    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float]


class _Run:
    """State of one loop between steps; everything here is in the checkpoint."""

    def __init__(self, task: TrainTask, settings: LoopSettings, owner: Owner | None) -> None:
        self.task, self.settings, self.owner = task, settings, owner
        self.steps = total_steps(task.rows, settings)
        self.groups: dict[float, dict[str, nn.Parameter]] = {}
        for name, parameter in task.parameters.items():
            self.groups.setdefault(task.rates.get(name, 1.0), {})[name] = parameter
        self.optimiser = torch.optim.AdamW(
            [{"params": list(group.values())} for group in self.groups.values()],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            eps=ADAM_EPSILON,
            fused=all(p.is_cuda for p in task.parameters.values()) or None,
        )
        self.step, self.skipped, self.tokens, self.seconds = 0, 0, 0, 0.0
        self.best, self.best_step, self.since_best = math.inf, -1, 0
        self.best_weights: dict[str, Tensor] = {}
        self.finished = False
        # A step was taken and its validation, which may fail or be stopped, not yet done.
        self.unvalidated = False
        self.last_metrics: dict[str, float] = {}
        self.best_metrics: dict[str, float] = {}

    def checkpoint(self) -> Checkpoint:
        tensors = {f"weight/{n}": p.detach().cpu() for n, p in self.task.parameters.items()}
        for name, parameter in self.task.parameters.items():
            for key, value in self.optimiser.state[parameter].items():
                tensors[f"adam/{key}/{name}"] = value.detach().cpu()
        tensors |= {f"best/{n}": t for n, t in self.best_weights.items()}
        tensors["random/torch"] = torch.get_rng_state()
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        state = {
            "step": self.step, "skipped": self.skipped, "tokens": self.tokens, "seconds": self.seconds,
            "metrics": self.last_metrics, "best_metrics": self.best_metrics,
            "best": None if math.isinf(self.best) else self.best, "best_step": self.best_step,
            "since_best": self.since_best, "finished": self.finished, "unvalidated": self.unvalidated,
        }  # fmt: skip
        return Checkpoint(tensors, state)

    def restore(self, saved: Checkpoint) -> None:
        with torch.no_grad():
            for name, parameter in self.task.parameters.items():
                parameter.copy_(saved.tensors[f"weight/{name}"])
        for name, parameter in self.task.parameters.items():
            found = {
                k.split("/")[1]: t for k, t in saved.tensors.items() if k.startswith("adam/") and k.split("/", 2)[2] == name
            }
            # AdamW keeps its step count on the CPU, the fused one beside the weights; the moments lie where the weights do.
            fused = self.optimiser.defaults["fused"]
            self.optimiser.state[parameter] = {
                k: t if k == "step" and not fused else t.to(parameter.device) for k, t in found.items()
            }
        self.best_weights = {n[5:]: t for n, t in saved.tensors.items() if n.startswith("best/")}
        torch.set_rng_state(saved.tensors["random/torch"])
        if "random/cuda" in saved.tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(saved.tensors["random/cuda"])
        state = saved.state
        self.step, self.tokens, self.seconds = int(state["step"]), int(state["tokens"]), float(state["seconds"])
        self.skipped = int(state.get("skipped", 0))
        self.best = math.inf if state["best"] is None else float(state["best"])
        self.best_step = int(state.get("best_step", -1))
        self.since_best, self.finished = int(state["since_best"]), bool(state["finished"])
        self.unvalidated = bool(state.get("unvalidated", False))
        self.last_metrics, self.best_metrics = dict(state["metrics"]), dict(state.get("best_metrics", {}))


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
    run = _Run(task, settings, owner)
    checkpoints = folder / CHECKPOINTS
    checkpoints.mkdir(parents=True, exist_ok=True)
    (folder / NONFINITE).unlink(missing_ok=True)
    torch.manual_seed(settings.seed)
    saved = load_newest(checkpoints, owner)
    if saved is not None:
        run.restore(saved)
    metrics = Metrics(folder / "metrics.jsonl", resume_step=run.step - run.unvalidated, trackers=trackers)
    progress = Progress(label, run.steps, done=run.step - run.unvalidated)
    last_save = time.monotonic()
    try:
        if saved is None and task.validate_at is not None:
            _validate(run, run.best_metrics)
        while not run.finished:
            taken = _take_step(run, folder, checkpoints)
            if taken is None:
                run.finished = True
                save_checkpoint(checkpoints, run.step, run.checkpoint(), owner=run.owner)
                break
            shown, step_tokens, passed = taken
            with _saved_where_it_fails(run, checkpoints):
                run.finished = _validate_if_due(run, shown)
            run.unvalidated = False
            run.last_metrics = _finite(shown)
            if run.best_step == run.step:
                run.best_metrics = run.last_metrics
            metrics.log(run.step, shown)
            headline = next(k for k in shown if k.endswith("/loss"))
            progress.update(passed, tokens=step_tokens, loss=shown[headline])
            due = time.monotonic() - last_save > settings.checkpoint_minutes * 60
            due |= settings.checkpoint_every > 0 and run.step % settings.checkpoint_every == 0
            if due or stop.asked or run.finished:
                save_checkpoint(checkpoints, run.step, run.checkpoint(), owner=run.owner)
                last_save = time.monotonic()
            if stop.asked and not run.finished:
                raise Interrupted(f"{label}: stopped after step {run.step} of {run.steps}; run the same command to go on")
    finally:
        metrics.close()
    published = _publish_choice(run)
    return FitResult(run.step - run.skipped, run.tokens, run.seconds, published)


def _go_on(run: _Run) -> int:
    """Count the step that was taken, and those after it that are left out; returns how many they are together."""
    after = run.step + 1
    wanted = run.task.next_step(after) if run.task.next_step is not None else after
    passed = wanted - run.step
    run.step, run.skipped = wanted, run.skipped + passed - 1
    return passed


def _take_step(run: _Run, folder: Path, checkpoints: Path) -> tuple[dict[str, float], int, int] | None:
    """The next step, or the one that still wants its validation: metrics, tokens, and how many steps it counts for with those
    that it leaves out; None where the stage ends before it.
    """
    if run.unvalidated:
        return dict(run.last_metrics), 0, 1
    started = time.monotonic()
    with _saved_where_it_fails(run, checkpoints):
        micros = _micro_batches(run)
    if not micros:
        return None
    shown, tokens = _one_step(run, folder, micros, started)
    run.last_metrics = _finite(shown)
    passed = _go_on(run)
    run.unvalidated = True
    return shown, tokens, passed


def _finite(metrics: dict[str, float]) -> dict[str, float]:
    return {name: value for name, value in metrics.items() if math.isfinite(value)}


@contextmanager
def _saved_where_it_fails(run: _Run, checkpoints: Path) -> Iterator[None]:
    """Work of a stage that takes minutes and may be stopped or fail, as a reward function may: the steps before it are kept."""
    try:
        yield
    except (Interrupted, TrainingError):
        if run.step and run.task.by_step and not (checkpoints / step_name(run.step)).exists():
            save_checkpoint(checkpoints, run.step, run.checkpoint(), owner=run.owner)
        raise


def _micro_batches(run: _Run) -> list[MicroBatch]:
    """The micro-batches of the step to come: a pure function of its number."""
    task = run.task
    return task.micro_batches([run.step] if task.by_step else step_rows(run.step, task.rows, run.settings))


def _one_step(run: _Run, folder: Path, micros: list[MicroBatch], started: float) -> tuple[dict[str, float], int]:
    """One optimiser step over its micro-batches; returns its metrics and tokens. Its time runs from `started`."""
    task, settings = run.task, run.settings
    sums: dict[str, float] = {}
    run.optimiser.zero_grad(set_to_none=True)
    for micro in micros:
        out = task.loss(micro, micros)
        if not math.isfinite(float(out.loss.detach())):
            _refuse_step(run, folder, "the loss", micro.row_ids)
        out.loss.backward()  # type: ignore[no-untyped-call]
        for name, value in out.metrics.items():
            sums[name] = sums.get(name, 0.0) + float(value)
    norm = _gradient_norm(task.parameters)
    if not math.isfinite(norm):
        _refuse_step(run, folder, "the gradient", tuple(i for m in micros for i in m.row_ids))
    rate = learning_rate(run.step, run.steps, settings)
    for (factor, parameters), group in zip(run.groups.items(), run.optimiser.param_groups, strict=True):
        group["lr"] = rate * factor
        if settings.clip:
            _clip(parameters, settings.clip)
    run.optimiser.step()
    tokens = sum(m.tokens for m in micros)
    seconds = time.monotonic() - started
    run.tokens += tokens
    run.seconds += seconds
    shown = task.summarise(sums)
    shown |= {
        "train/learning_rate": rate,
        "train/grad_norm": norm,
        "train/epoch": epochs_seen(run.step + 1, task.rows, settings),
    }
    shown |= {"time/step": seconds, "time/tokens_per_second": tokens / seconds}
    return shown, tokens


def _clip(parameters: dict[str, nn.Parameter], limit: float) -> None:
    norm = _gradient_norm(parameters)
    if norm > limit:
        for parameter in parameters.values():
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm)


def _gradient_norm(parameters: dict[str, nn.Parameter]) -> float:
    """Euclidean norm of the whole gradient, summed in float64 in a fixed order."""
    squares = [p.grad.double().square().sum() for p in parameters.values() if p.grad is not None]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0


def _refuse_step(run: _Run, folder: Path, what: str, row_ids: tuple[str, ...]) -> None:
    write_json(folder / NONFINITE, {"step": run.step + 1, "what": what, "rows": list(row_ids)})
    shown = ", ".join(row_ids[:8]) + (f" and {len(row_ids) - 8} more" if len(row_ids) > 8 else "")
    raise NonFiniteError(
        f"step {run.step + 1}", f"{what} is not finite; the step was not taken", allowed=f"rows of this batch: {shown}",
        do="look at these rows, or lower learning_rate; the last checkpoint is whole",
    )  # fmt: skip


def _validate_if_due(run: _Run, shown: dict[str, float]) -> bool:
    """Validate where it is due, remember the best; True when the run is over (last step or patience)."""
    task, over = run.task, run.step >= run.steps
    every = task.validate_every or validation_interval(task.rows, run.settings)
    if (task.validate is None and task.validate_at is None) or not (over or (every and run.step % every == 0)):
        return over
    _validate(run, shown)
    return over or bool(run.settings.patience and run.since_best >= run.settings.patience)


def _validate(run: _Run, shown: dict[str, float]) -> None:
    """Validate the weights as they are; `shown` gets what was found."""
    task = run.task
    if task.validate_at is not None:
        found = task.validate_at(run.step)
    else:
        assert task.validate is not None
        found = task.validate()
    shown |= found
    value = found[task.validation_metric]
    if not math.isfinite(value):
        raise NonFiniteError(
            f"validation after step {run.step}", f"{task.validation_metric} is not finite", do="lower learning_rate",
        )  # fmt: skip
    loss = -value if task.higher_is_better else value
    if loss < run.best:
        run.best, run.best_step, run.since_best = loss, run.step, 0
        if run.settings.keep == "best":
            run.best_weights = {n: p.detach().cpu().clone() for n, p in task.parameters.items()}
    else:
        run.since_best += 1


def _publish_choice(run: _Run) -> dict[str, float]:
    """Leave in the parameters what the stage publishes, the best weights or the last; returns the metrics of their step."""
    if run.settings.keep != "best" or not run.best_weights:
        return run.last_metrics
    with torch.no_grad():
        for name, parameter in run.task.parameters.items():
            parameter.copy_(run.best_weights[name])
    return run.best_metrics
