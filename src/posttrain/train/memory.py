"""The memory of a ppo stage by parts, in MiB. It is counted and not measured, so a resumed stage logs the same numbers.

    base         the weights of the model, once for all roles
    adapters     of policy, reference, init, reward models, gold and value function, with their heads
    optimiser    gradients and AdamW's two moments of what is trained
    cache        room for keys and values of the completions that are sampled at once
    packed       a second copy of the weights while completions are sampled in bfloat16 on a CPU without matrix tiles, in the
                 layout that its products read
    activations  what the largest forward pass of a step keeps for its backward pass; with `recompute` the inputs of the layers
                 and what is outside of them, beside which the backward pass holds the inside of one layer at a time

The numbers are in metrics.jsonl and the report. Left out: the program, its libraries and the data, temporary tensors, and with
full weights the copy of the policy while another role has its place.
"""

import weakref
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from posttrain.generate.batch import room_for
from posttrain.generate.engine import ROWS
from posttrain.kernels import packed_bytes
from posttrain.models.base_model import BaseModel
from posttrain.stages.ppo import PpoStage
from posttrain.train.roles import Roles

MIB = 2**20


def fixed_memory(roles: Roles, stage: PpoStage, trained: Iterable[nn.Parameter]) -> dict[str, float]:
    """What is in memory from the first step to the last, by the names of the metrics."""
    base = roles.base
    names = {roles.policy, roles.reference, stage.init, *roles.scorer.models}
    names |= set(roles.gold.gold_scorer.models) if roles.gold is not None else set()
    adapters = [p for name in names - {"base"} if name in base.adapters for p in base.adapters.get(name).parameters().values()]
    adapters += roles.value.parameters.values() if roles.value is not None else ()
    return {
        "memory/base": _mib([*base.model.parameters(), *base.model.buffers()]), "memory/adapters": _mib(adapters),
        "memory/optimiser": 3 * _mib(trained),
    }  # fmt: skip


def cache_memory(base: BaseModel, prompts: Sequence[Sequence[int]], stage: PpoStage) -> float:
    """The key-value cache of the completions that are sampled at once: as many of the largest as the engine takes."""
    kind = base.device.type
    rooms = [room_for(len(ids) + stage.max_new_tokens - 1, kind) for ids in prompts for _ in range(stage.completions)]
    return sum(sorted(rooms)[-ROWS[kind] :]) * base.cache_bytes / MIB


def packed_memory(base: BaseModel) -> float:
    """The weights that the engine holds a second time while it samples (`kernels`)."""
    weights = (base.head_VD, *(layer.weight for layer in base.model.modules() if isinstance(layer, nn.Linear)))
    return _mib(weight for weight in weights if packed_bytes(weight, base.dtype, base.device))


class ActivationCounter:
    """Counts the bytes that forward passes save for their backward passes; `largest` is that of the largest pass, in MiB."""

    def __init__(self, base: BaseModel) -> None:
        self.base, self.largest = base, 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what the forward pass inside saves. On a GPU it is what the allocated memory has grown by."""
        if self.base.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.base.device)
            yield
            self.largest = max(self.largest, (torch.cuda.memory_allocated(self.base.device) - before) / MIB)
            return
        weights = {p.untyped_storage().data_ptr() for p in self.base.model.parameters()}
        saved: list[weakref.ref[Tensor]] = []  # weak: what the forward pass itself frees is not counted

        def save(tensor: Tensor) -> Tensor:
            detached = tensor.detach()
            if not tensor.is_leaf or not (tensor.requires_grad or tensor.untyped_storage().data_ptr() in weights):
                saved.append(weakref.ref(detached))
            return detached

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            yield
        self.largest = max(self.largest, _mib(tensor for ref in saved if (tensor := ref()) is not None))


def _mib(tensors: Iterable[Tensor]) -> float:
    """The size of tensors. Those that share a storage count once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()) / MIB
