"""What a ppo stage holds in memory, by parts and in MiB. Counted and not measured: a resumed stage logs the very same
numbers.

    base         the weights of the model, once for all roles
    adapters     of policy, reference, init, reward models, gold and value function, with their heads
    optimiser    gradients and AdamW's two moments of what is trained
    cache        room for keys and values of the completions that are sampled at once
    packed       while completions are sampled on a CPU in bfloat16 that has no matrix tiles, the weights once more, as its
                 products read them
    activations  what the step's largest forward keeps for its backward; with `recompute` the inputs of the layers and what lies
                 outside of them, beside which the backward holds the inside of one layer after the other

Where it stands: rows of metrics.jsonl, and the report. Left out: what the program, its libraries and the data take, products
on their way, and with full weights the copy of the policy while another role has its place.
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
from posttrain.settings import PpoStage
from posttrain.train.roles import Roles

MIB = 2**20


def held(roles: Roles, stage: PpoStage, trained: Iterable[nn.Parameter]) -> dict[str, float]:
    """What is there from the first step to the last, by the names of the metrics."""
    base = roles.base
    names = {roles.policy, roles.reference, stage.init, *roles.judge.models}
    names |= set(roles.gold.judge.models) if roles.gold is not None else set()
    adapters = [p for name in names - {"base"} if name in base.adapters for p in base.adapters.get(name).parameters().values()]
    adapters += roles.value.parameters.values() if roles.value is not None else ()
    return {
        "memory/base": _mib([*base.model.parameters(), *base.model.buffers()]), "memory/adapters": _mib(adapters),
        "memory/optimiser": 3 * _mib(trained),
    }  # fmt: skip


def cache(base: BaseModel, prompts: Sequence[Sequence[int]], stage: PpoStage) -> float:
    """Room for the completions of these prompts that are sampled at once: as many as the engine takes, the largest."""
    kind = base.device.type
    rooms = [room_for(len(ids) + stage.max_new_tokens - 1, kind) for ids in prompts for _ in range(stage.completions)]
    return sum(sorted(rooms)[-ROWS[kind] :]) * base.cache_bytes / MIB


def packed(base: BaseModel) -> float:
    """The weights that the engine holds a second time while it samples (`kernels`)."""
    weights = (base.head_VD, *(layer.weight for layer in base.model.modules() if isinstance(layer, nn.Linear)))
    return _mib(weight for weight in weights if packed_bytes(weight, base.dtype, base.device))


class Kept:
    """The largest sum of bytes that one of the forwards inside of `counted` kept for its backward."""

    def __init__(self, base: BaseModel) -> None:
        self.base, self.largest = base, 0.0

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Count what the forward inside keeps. On a GPU it is what its memory has grown by."""
        if self.base.device.type == "cuda":
            before = torch.cuda.memory_allocated(self.base.device)
            yield
            self.largest = max(self.largest, (torch.cuda.memory_allocated(self.base.device) - before) / MIB)
            return
        weights = {p.untyped_storage().data_ptr() for p in self.base.model.parameters()}
        saved: list[weakref.ref[Tensor]] = []  # what is gone by the end of the forward was not kept

        def keep(tensor: Tensor) -> Tensor:
            held = tensor.detach()
            if not tensor.is_leaf or not (tensor.requires_grad or tensor.untyped_storage().data_ptr() in weights):
                saved.append(weakref.ref(held))
            return held

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            yield
        self.largest = max(self.largest, _mib(held for ref in saved if (held := ref()) is not None))


def _mib(tensors: Iterable[Tensor]) -> float:
    """Tensors of one storage count once."""
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values()) / MIB
