"""Mixed precision of full fine-tuning: float32 weights that a forward pass casts to bfloat16.

The optimiser updates float32 weights, so that small steps are not lost to rounding; products run in bfloat16. The cast is part
of the forward, so gradients reach the float32 weights without separate copies to synchronise (Micikevicius et al. 2018).
"""

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.cache import new_address


class NarrowWeights:
    """Calls a module with its weights in another dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype
        self._cast: dict[str, Tensor] = {}
        self._versions: list[int] = []
        self._address = new_address()

    @property
    def address(self) -> int:
        """A unique number of the cast weights of forwards without gradients. It changes after an update of a weight."""
        self._weights()
        return self._address

    def __call__(self, **inputs: Any) -> Any:
        """The module's output."""
        return torch.func.functional_call(self._module, self._weights(), (), inputs)

    def _weights(self) -> dict[str, Tensor]:
        wide = dict(self._module.named_parameters())
        if torch.is_grad_enabled():
            self._cast = {}
            return {name: weight.to(self._dtype) for name, weight in wide.items()}
        # Without gradients, as in decoding, the cast weights are cached until a weight is updated.
        versions = [weight._version for weight in wide.values()]
        if not self._cast or versions != self._versions:
            with torch.inference_mode(False), torch.no_grad():
                self._cast = {name: weight.to(self._dtype) for name, weight in wide.items()}
            self._versions, self._address = versions, new_address()
        return self._cast
