"""Mixed precision of full fine-tuning: float32 weights that a forward pass sees in bfloat16.

The optimiser moves float32 weights, so that small steps are not rounded away; products run in bfloat16. The narrow weights are
functions of the wide ones, so gradients reach these in float32 and nothing has to be kept in step (Micikevicius et al. 2018).
"""

from typing import Any

import torch
from torch import Tensor, nn

from posttrain.models.cache import new_address


class NarrowWeights:
    """Calls a module with its weights in another dtype."""

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self._module, self._dtype = module, dtype
        self._kept: dict[str, Tensor] = {}
        self._versions: list[int] = []
        self._address = new_address()

    @property
    def address(self) -> int:
        """A number of the weights that a forward without gradients sees; another one once a weight has moved."""
        self._weights()
        return self._address

    def __call__(self, **inputs: Any) -> Any:
        """The module's output."""
        return torch.func.functional_call(self._module, self._weights(), (), inputs)

    def _weights(self) -> dict[str, Tensor]:
        wide = dict(self._module.named_parameters())
        if torch.is_grad_enabled():
            self._kept = {}
            return {name: weight.to(self._dtype) for name, weight in wide.items()}
        # Without gradients, as in decoding, they are made once for as long as no weight moves.
        versions = [weight._version for weight in wide.values()]
        if not self._kept or versions != self._versions:
            with torch.inference_mode(False), torch.no_grad():
                self._kept = {name: weight.to(self._dtype) for name, weight in wide.items()}
            self._versions, self._address = versions, new_address()
        return self._kept
