"""Activation recomputation: decoder layers save only their input and run their forward again in backward (Chen et al. 2016).

A training step saves one hidden state per layer instead of all activations, at the cost of a second forward of the layers.
The same operations run on the same numbers, so gradients are equal to the last bit if the operations are deterministic.

`train/stage.py` turns it on around the optimiser loop of every stage. Forwards that record no gradients (sampling, references,
evaluation) are unchanged. Not recomputed: the head, the embedding, the last norm, and the cast weights of mixed precision.

T: packed tokens, D: width.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from posttrain.errors import ModelError
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import Routing


@contextmanager
def recomputed(base: BaseModel, on: bool = True) -> Iterator[None]:
    """Inside the context, a forward of the base that records gradients saves only the inputs of its layers, unless `on` is
    False.

    The backward may run outside of the context. Raises ModelError for an architecture whose layers are unknown.
    """
    layers = decoder_layers(base.model) if on else []
    if on and not layers:
        raise ModelError(
            "[base] recompute = true", f"the layers of {type(base.model).__name__} are not known", do="leave recompute out"
        )
    for layer in layers:
        layer.forward = _Recomputed(layer, base.adapters.routing).keep_input
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # uncovers the method of the class


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost layers of a model that transformers marks for gradient checkpointing, in order."""
    layers: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(f"{outer}.") for outer in layers):
            layers[name] = module
    return list(layers.values())


class _Recomputed(nn.Module):
    """Wraps a layer, so that `functional_call` can run its original forward with substituted weights."""

    def __init__(self, layer: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.layer, self._routing = layer, routing
        self._original: Callable[..., Any] = layer.forward

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """The output of the layer."""
        return self._original(*inputs, **named)

    def keep_input(self, *inputs: Any, **named: Any) -> Any:
        """The layer's forward, which saves only its inputs, the hidden states [1, T, D] first."""
        if not torch.is_grad_enabled():
            return self._original(*inputs, **named)
        routing, whole, tokens = self._routing, self._routing.whole, self._routing.tokens
        # In mixed precision these are the cast weights. By the time of backward the module has its float32 weights again.
        weights: dict[str, Tensor] = dict(self.named_parameters())

        def run(*saved: Any) -> Any:
            with _routed(routing, whole, tokens):
                return functional_call(self, weights, saved[: len(inputs)], named)

        # Keyword tensors, such as cos and sin, are shared by all layers. As arguments they count as saved tensors.
        common = [t for value in named.values() for t in (value if isinstance(value, tuple) else (value,)) if _rounded(t)]
        drops = whole is not None and whole.drops
        return checkpoint(run, *inputs, *common, use_reentrant=False, preserve_rng_state=drops)


def _rounded(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _routed(routing: Routing, whole: Any, tokens: Any) -> Iterator[None]:
    """Restore the routing of a forward, because its backward may run after the routing changed."""
    before = routing.whole, routing.tokens
    routing.whole, routing.tokens = whole, tokens
    try:
        yield
    finally:
        routing.whole, routing.tokens = before
