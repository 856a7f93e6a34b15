"""The optimiser step and what surrounds it in every training stage: guards, validation, metrics, checkpoints, stop and resume.

    with TrainingSteps(parameters, settings, steps=…, …).resumed() as training:
        while not training.finished:
            for micro_batch in …:                       # the micro-batches of step `training.step`
                training.backward(loss, row_ids)
            taken = training.optimise(tokens=…)
            training.record(taken, metrics)
    result = training.publish()

A step is either whole or did not happen: a checkpoint holds the state between two steps, and a resumed run repeats the same
numbers bit for bit. A loss or gradient that is not finite stops the run before the weights move. `loop.py` drives it for stages
that learn from rows; `ppo.py` drives it itself.
"""

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple, NoReturn

import torch
from torch import nn

from posttrain.artifacts import write_json
from posttrain.errors import Interrupted, NonFiniteError, TrainingError
from posttrain.losses.output import LossOutput
from posttrain.progress import Metrics, Progress, Tracker
from posttrain.stop import StopSignal
from posttrain.train.checkpoint import CHECKPOINTS, Checkpoint, Owner, load_newest, save_checkpoint, step_name
from posttrain.train.optimiser import Optimiser
from posttrain.train.schedule import LoopSettings
from posttrain.train.validation import BestWeights, Validation

NONFINITE = "nonfinite.json"


class StepTaken(NamedTuple):
    """An optimiser step: the metrics of its losses, summed over its micro-batches, and the figures of the optimiser."""

    sums: dict[str, float]
    figures: dict[str, float]
    tokens: int


class FitResult(NamedTuple):
    """A finished stage: optimiser steps, tokens, seconds, and the metrics of the step whose weights are published."""

    steps: int
    tokens: int
    seconds: float
    metrics: dict[str, float]


class TrainingSteps:
    """The optimiser steps of one stage. What is not a constructor argument is in the checkpoint."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: LoopSettings, folder: Path, *, steps: int, label: str,
        stop: StopSignal, trackers: tuple[Tracker, ...] = (), owner: Owner | None = None, validation: Validation | None = None,
        rates: Mapping[str, float] = {},
    ) -> None:  # fmt: skip
        """`steps`: optimiser steps of the whole stage. `rates`: factors of the learning rate by parameter name, else 1."""
        self.parameters, self.settings, self.folder, self.steps = parameters, settings, folder, steps
        self.label, self.stop, self.trackers, self.owner, self.validation = label, stop, trackers, owner, validation
        self.checkpoints = folder / CHECKPOINTS
        self.optimiser = Optimiser(parameters, settings, steps=steps, rates=rates)
        self.best = BestWeights(parameters, keep=settings.keep == "best")
        # `step` counts the steps that were left out, `taken` does not.
        self.step, self.taken, self.tokens, self.seconds = 0, 0, 0, 0.0
        self.metrics: dict[str, float] = {}
        self.finished = False
        self._sums: dict[str, float] = {}
        self._row_ids: list[str] = []
        self._log: Metrics
        self._progress: Progress
        self._step_started = self._saved_at = 0.0

    @contextmanager
    def resumed(self) -> Iterator["TrainingSteps"]:
        """Steps can be taken inside, from the newest checkpoint on or from the start."""
        self.checkpoints.mkdir(parents=True, exist_ok=True)
        (self.folder / NONFINITE).unlink(missing_ok=True)
        torch.manual_seed(self.settings.seed)
        saved = load_newest(self.checkpoints, self.owner)
        unvalidated = saved is not None and self._restore(saved)
        done = self.step - unvalidated
        self._log = Metrics(self.folder / "metrics.jsonl", resume_step=done, trackers=self.trackers)
        self._progress = Progress(self.label, self.steps, done=done)
        self._step_started = self._saved_at = time.monotonic()
        try:
            if saved is None:
                self._validate_start()
            if unvalidated:
                self._complete(self.metrics, tokens=0, passed=1)
            yield self
        finally:
            self._log.close()

    def backward(self, loss: LossOutput, row_ids: Sequence[str]) -> None:
        """Add a micro-batch's gradient and metrics to the step. Raises NonFiniteError naming its rows."""
        if not math.isfinite(float(loss.loss.detach())):
            self._refuse("the loss", row_ids)
        loss.loss.backward()  # type: ignore[no-untyped-call]
        self._row_ids += row_ids
        for name, value in loss.metrics.items():
            self._sums[name] = self._sums.get(name, 0.0) + float(value)

    def optimise(self, *, tokens: int) -> StepTaken:
        """Move the weights by the gradient of the step's micro-batches. Raises NonFiniteError naming the rows of the step."""
        norm = self.optimiser.gradient_norm()
        if not math.isfinite(norm):
            self._refuse("the gradient", self._row_ids)
        rate = self.optimiser.step(self.step)
        seconds = time.monotonic() - self._step_started
        self.tokens += tokens
        self.seconds += seconds
        figures = {
            "train/learning_rate": rate, "train/grad_norm": norm,
            "time/step": seconds, "time/tokens_per_second": tokens / seconds,
        }  # fmt: skip
        taken = StepTaken(self._sums, figures, tokens)
        self._sums, self._row_ids = {}, []
        return taken

    def record(self, taken: StepTaken, metrics: Mapping[str, float], *, left_out: int = 0) -> None:
        """Count the step, and `left_out` steps after it that are not taken; validate, log and save where it is due.

        Raises Interrupted after a checkpoint when asked to stop.
        """
        self.step += 1 + left_out
        self.taken += 1
        self._complete({**metrics, **taken.figures}, tokens=taken.tokens, passed=1 + left_out)

    def finish(self) -> None:
        """End the stage before its last step."""
        self.finished = True
        self._save()

    def publish(self) -> FitResult:
        """Leave the weights in the parameters that the stage publishes: the best or the last."""
        metrics = self.best.metrics if self.best.publish() else self.metrics
        return FitResult(self.taken, self.tokens, self.seconds, metrics)

    @contextmanager
    def saved_on_failure(self, *, unvalidated: bool = False) -> Iterator[None]:
        """Save the steps so far where the work inside is stopped or fails, as the call of a reward function may."""
        try:
            yield
        except (Interrupted, TrainingError):
            if self.step and not (self.checkpoints / step_name(self.step)).exists():
                self._save(unvalidated=unvalidated)
            raise

    def _complete(self, metrics: dict[str, float], *, tokens: int, passed: int) -> None:
        """Validate where it is due, log, save where it is due, and stop when asked to. `passed` counts left out steps too."""
        self.metrics = _finite(metrics)
        with self.saved_on_failure(unvalidated=True):
            self.finished = self._validate_where_due(metrics)
        self.metrics = _finite(metrics)
        if self.best.step == self.step:
            self.best.metrics = self.metrics
        self._log.log(self.step, metrics)
        loss = next(value for name, value in metrics.items() if name.endswith("/loss"))
        self._progress.update(passed, tokens=tokens, loss=loss)
        settings = self.settings
        due = time.monotonic() - self._saved_at > settings.checkpoint_minutes * 60
        due |= settings.checkpoint_every > 0 and self.step % settings.checkpoint_every == 0
        if due or self.stop.asked or self.finished:
            self._save()
        if self.stop.asked and not self.finished:
            stopped = f"{self.label}: stopped after step {self.step} of {self.steps}"
            raise Interrupted(f"{stopped}; run the same command to go on")
        self._step_started = time.monotonic()

    def _validate_where_due(self, metrics: dict[str, float]) -> bool:
        """Validate the weights; `metrics` gets the figures. True when the stage is over: the last step, or patience."""
        over = self.step >= self.steps
        if self.validation is None or not (over or self.validation.due(self.step)):
            return over
        metrics |= self.validation.measure(self.step)
        self.best.compare(self.validation, metrics, self.step)
        patience = self.settings.patience
        return over or bool(patience and self.best.validations_since >= patience)

    def _validate_start(self) -> None:
        """Validate the weights before the first step, where the validation asks for it."""
        if self.validation is not None and self.validation.at_start:
            self.best.metrics = self.validation.measure(0)
            self.best.compare(self.validation, self.best.metrics, 0)
            self._step_started = time.monotonic()

    def _refuse(self, what: str, row_ids: Sequence[str]) -> NoReturn:
        write_json(self.folder / NONFINITE, {"step": self.step + 1, "what": what, "rows": list(row_ids)})
        shown = ", ".join(row_ids[:8]) + (f" and {len(row_ids) - 8} more" if len(row_ids) > 8 else "")
        raise NonFiniteError(
            f"step {self.step + 1}", f"{what} is not finite; the step was not taken", allowed=f"rows of this batch: {shown}",
            do="look at these rows, or lower learning_rate; the last checkpoint is whole",
        )  # fmt: skip

    def _save(self, *, unvalidated: bool = False) -> None:
        """Write a checkpoint. `unvalidated`: the validation of the last step failed and is done again after a resume."""
        tensors = {f"weight/{n}": p.detach().cpu() for n, p in self.parameters.items()}
        tensors |= self.optimiser.tensors() | self.best.tensors() | {"random/torch": torch.get_rng_state()}
        if torch.cuda.is_available():
            tensors["random/cuda"] = torch.cuda.get_rng_state()
        state = {
            "step": self.step, "skipped": self.step - self.taken, "tokens": self.tokens, "seconds": self.seconds,
            "metrics": self.metrics, "finished": self.finished, "unvalidated": unvalidated, **self.best.state(),
        }  # fmt: skip
        save_checkpoint(self.checkpoints, self.step, Checkpoint(tensors, state), owner=self.owner)
        self._saved_at = time.monotonic()

    def _restore(self, saved: Checkpoint) -> bool:
        """Go back to a checkpoint. True where the validation of its last step is still to be done."""
        tensors, state = saved
        with torch.no_grad():
            for name, parameter in self.parameters.items():
                parameter.copy_(tensors[f"weight/{name}"])
        self.optimiser.restore(tensors)
        self.best.restore(tensors, state)
        torch.set_rng_state(tensors["random/torch"])
        if "random/cuda" in tensors and torch.cuda.is_available():
            torch.cuda.set_rng_state(tensors["random/cuda"])
        self.step, self.tokens, self.seconds = int(state["step"]), int(state["tokens"]), float(state["seconds"])
        self.taken = self.step - int(state.get("skipped", 0))
        self.metrics, self.finished = dict(state["metrics"]), bool(state["finished"])
        return bool(state.get("unvalidated", False))


def _finite(metrics: Mapping[str, float]) -> dict[str, float]:
    """The metrics that JSON can hold."""
    return {name: value for name, value in metrics.items() if math.isfinite(value)}
