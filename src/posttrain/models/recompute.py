"""Decoder layers that keep their input alone and compute their inside again in the backward (Chen et al. 2016).

What a training step keeps falls from everything that each layer computes to one hidden state a layer; what is paid is a second
forward of the layers. The same operations run on the same numbers, so gradients are the same to the last bit wherever those
operations give the same twice.

Where it stands: `train/stage.py` turns it on around the optimiser loop, for every stage. Forwards that record no gradients
(sampling, references, evaluation) run as they do without. Left out: the head, the embedding and the last norm keep what they
keep, and so do the narrow copies of weights in mixed precision.

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
    """Inside, a forward of the base that records gradients keeps only the inputs of its layers; `on = False` changes nothing.

    The backward may run outside. Raises ModelError for an architecture whose layers are not known.
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
            del layer.forward  # the class's own is found again


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of a model that transformers says can be computed again, in order; none lies in another one."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        if isinstance(module, GradientCheckpointingLayer) and not any(name.startswith(f"{outer}.") for outer in found):
            found[name] = module
    return list(found.values())


class _Recomputed(nn.Module):
    """A layer beside itself: called as this module, it runs its own forward with whatever weights it is lent."""

    def __init__(self, layer: nn.Module, routing: Routing) -> None:
        super().__init__()
        self.layer, self._routing = layer, routing
        self._own: Callable[..., Any] = layer.forward

    def forward(self, *inputs: Any, **named: Any) -> Any:
        """What the layer gives."""
        return self._own(*inputs, **named)

    def keep_input(self, *inputs: Any, **named: Any) -> Any:
        """The layer's forward: its inputs, the hidden states [1, T, D] first, to what the layer gives."""
        if not torch.is_grad_enabled():
            return self._own(*inputs, **named)
        routing, whole, tokens = self._routing, self._routing.whole, self._routing.tokens
        # In mixed precision these are the narrow weights, whose place the wide ones have again by the time of the backward.
        weights: dict[str, Tensor] = dict(self.named_parameters())

        def run(*kept: Any) -> Any:
            with _routed(routing, whole, tokens):
                return functional_call(self, weights, kept[: len(inputs)], named)

        # Named tensors, rotations above all, are the layers' in common. As arguments they are counted among what is kept.
        common = [t for value in named.values() for t in (value if isinstance(value, tuple) else (value,)) if _rounded(t)]
        drops = whole is not None and whole.drops
        return checkpoint(run, *inputs, *common, use_reentrant=False, preserve_rng_state=drops)


def _rounded(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


@contextmanager
def _routed(routing: Routing, whole: Any, tokens: Any) -> Iterator[None]:
    """The routing of a forward, also when its backward comes after it was left."""
    before = routing.whole, routing.tokens
    routing.whole, routing.tokens = whole, tokens
    try:
        yield
    finally:
        routing.whole, routing.tokens = before
