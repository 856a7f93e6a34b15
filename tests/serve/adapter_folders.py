"""Adapters on disk that change what the tiny base says, and what a policy answers."""

from pathlib import Path

import torch

from posttrain.models.adapter_files import save_adapter
from posttrain.models.base_model import BaseModel
from posttrain.models.heads import new_head
from posttrain.models.lora import LoraAdapter, LoraSettings
from posttrain.models.segments import Segments, Span

# Rank 4 on all layers of random:tiny, float32: 4 bytes * 4 * 2 layers * (q 64+64, k and v 64+32, o 64+64, gate and up 64+128,
# down 128+64) = 4 * 4 * 2 * 1024.
RANK_4_BYTES = 32_768


def room_for(adapters: int) -> int:
    """Bytes of so many adapters of rank 4, and of half as many slots more in an engine that computes in float32."""
    return (adapters + 3 * adapters // 2) * RANK_4_BYTES


def write_adapter(folder: Path, base: BaseModel, seed: int, *, rank: int = 4, head: bool = False) -> Path:
    """A folder in PEFT's format; nothing of it stays in memory."""
    settings = LoraSettings(rank, 2.0 * rank, 0.0, "all", "standard")
    adapter = base.adapters.create("written", settings, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.normal_(std=0.2, generator=generator)
    if head:
        adapter = LoraAdapter("written", settings, adapter.weights, head=new_head(64, seed=seed, device=base.device))
    folder.mkdir(parents=True, exist_ok=True)
    save_adapter(folder, adapter, base)
    base.adapters.remove("written")
    return folder


def logits_of(base: BaseModel, adapter: str) -> torch.Tensor:
    """Logits [T, V] of one row."""
    ids = torch.arange(40, 60)
    with torch.no_grad():
        hidden = base.hidden(ids, torch.arange(len(ids)), Segments((Span(0, len(ids)),)), adapter)
        return base.logits(hidden, adapter)


def in_memory(base: BaseModel) -> set[str]:
    """The public names of the adapters in memory."""
    return {name.partition("@")[0] for name in base.adapters.names()}
