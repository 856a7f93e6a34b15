"""AdamW over the trained parameters, in groups of one learning rate each.

    rate_g(s) = rates_g · rate(s)                     rate(s) as in `schedule.py`
    gradient_g ← gradient_g · min(1, clip / ‖gradient_g‖)     each group is clipped by its own norm

`step.py` calls it between the backward passes of a step and the checkpoint. Its moments are part of the checkpoint.
"""

import math
from collections.abc import Iterable, Mapping

import torch
from torch import Tensor, nn

from posttrain.train.schedule import LoopSettings, learning_rate

ADAM_EPSILON = 1e-8


class Optimiser:
    """The optimiser of a stage of `steps` steps. `rates` has factors of the learning rate by parameter name, else 1."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], settings: LoopSettings, *, steps: int, rates: Mapping[str, float]
    ) -> None:
        self.parameters, self.settings, self.steps = parameters, settings, steps
        self._groups: dict[float, list[nn.Parameter]] = {}
        for name, parameter in parameters.items():
            self._groups.setdefault(rates.get(name, 1.0), []).append(parameter)
        self._adamw = torch.optim.AdamW(
            [{"params": group} for group in self._groups.values()],
            lr=settings.learning_rate,
            weight_decay=settings.weight_decay,
            eps=ADAM_EPSILON,
            fused=all(p.is_cuda for p in parameters.values()) or None,
        )
        self._adamw.zero_grad(set_to_none=True)

    def gradient_norm(self) -> float:
        """Euclidean norm of the gradient of all groups together, before clipping."""
        return _norm(self.parameters.values())

    def step(self, step: int) -> float:
        """Clip each group, move the weights and clear the gradients. Returns the learning rate of `step` (counted from 0)."""
        rate = learning_rate(step, self.steps, self.settings)
        for (factor, parameters), group in zip(self._groups.items(), self._adamw.param_groups, strict=True):
            group["lr"] = rate * factor
            if self.settings.clip:
                _clip(parameters, self.settings.clip)
        self._adamw.step()
        self._adamw.zero_grad(set_to_none=True)
        return rate

    def tensors(self) -> dict[str, Tensor]:
        """AdamW's state for a checkpoint: `adam/<key>/<parameter>`."""
        return {
            f"adam/{key}/{name}": value.detach().cpu()
            for name, parameter in self.parameters.items()
            for key, value in self._adamw.state[parameter].items()
        }

    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Put back what `tensors` returned."""
        # AdamW keeps its step count on the CPU, the fused one beside the weights; the moments lie where the weights do.
        fused = self._adamw.defaults["fused"]
        for name, parameter in self.parameters.items():
            state = {
                key.split("/")[1]: value
                for key, value in tensors.items()
                if key.startswith("adam/") and key.split("/", 2)[2] == name
            }
            self._adamw.state[parameter] = {
                key: value if key == "step" and not fused else value.to(parameter.device) for key, value in state.items()
            }


def _clip(parameters: list[nn.Parameter], limit: float) -> None:
    norm = _norm(parameters)
    if norm > limit:
        for parameter in parameters:
            if parameter.grad is not None:
                parameter.grad.mul_(limit / norm)


def _norm(parameters: Iterable[nn.Parameter]) -> float:
    """Euclidean norm of the gradient of the parameters, summed in float64 in a fixed order."""
    squares = [p.grad.double().square().sum() for p in parameters if p.grad is not None]
    return math.sqrt(float(torch.stack(squares).sum())) if squares else 0.0
