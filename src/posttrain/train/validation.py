"""Validation while a stage trains, and the best weights by it."""

import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.errors import NonFiniteError


class Validation(NamedTuple):
    """What is measured, how often, and which metric compares weights.

    `measure` gets the number of steps taken. It is called after every `every` steps and after the last one; 0 means after the
    last one only. `at_start` asks for a call before the first step too.
    """

    measure: Callable[[int], dict[str, float]]
    metric: str
    every: int = 0
    higher_is_better: bool = False
    at_start: bool = False

    def due(self, step: int) -> bool:
        """Whether the weights are validated after so many steps, the last one aside."""
        return bool(self.every) and step % self.every == 0


class BestWeights:
    """The best validation so far, and a copy of its weights where `keep` asks for one."""

    def __init__(self, parameters: Mapping[str, nn.Parameter], *, keep: bool) -> None:
        self.parameters, self.keep = parameters, keep
        self.loss, self.step, self.validations_since = math.inf, -1, 0
        self.metrics: dict[str, float] = {}
        self.weights: dict[str, Tensor] = {}

    def compare(self, validation: Validation, metrics: Mapping[str, float], step: int) -> None:
        """Compare the weights after `step` with the best. Raises NonFiniteError where their metric is not finite."""
        value = metrics[validation.metric]
        if not math.isfinite(value):
            raise NonFiniteError(
                f"validation after step {step}", f"{validation.metric} is not finite", do="lower learning_rate"
            )
        loss = -value if validation.higher_is_better else value
        if loss >= self.loss:
            self.validations_since += 1
            return
        self.loss, self.step, self.validations_since = loss, step, 0
        if self.keep:
            self.weights = {n: p.detach().cpu().clone() for n, p in self.parameters.items()}

    def publish(self) -> bool:
        """Put the best weights into the parameters. False where none are kept, and the last weights are published."""
        with torch.no_grad():
            for name, weight in self.weights.items():
                self.parameters[name].copy_(weight)
        return bool(self.weights)

    def tensors(self) -> dict[str, Tensor]:
        """The best weights for a checkpoint: `best/<parameter>`."""
        return {f"best/{name}": weight for name, weight in self.weights.items()}

    def state(self) -> dict[str, Any]:
        """The counters for a checkpoint."""
        return {
            "best": None if math.isinf(self.loss) else self.loss, "best_step": self.step,
            "since_best": self.validations_since, "best_metrics": self.metrics,
        }  # fmt: skip

    def restore(self, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Put back what `tensors` and `state` returned."""
        self.weights = {name.removeprefix("best/"): t for name, t in tensors.items() if name.startswith("best/")}
        self.loss = math.inf if state["best"] is None else float(state["best"])
        self.step, self.validations_since = int(state.get("best_step", -1)), int(state["since_best"])
        self.metrics = dict(state.get("best_metrics", {}))
