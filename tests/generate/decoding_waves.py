"""Waves of requests over adapters of several kinds, for decoding with CUDA graphs."""

import torch
from engine_runs import mixed, ragged_prompts

from posttrain.generate.requests import Request
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter, LoraSettings

# Rank, layers and trained rows of each.
KINDS = {"wide": (8, "all", ()), "narrow": (2, "attention", ()), "rows": (3, "mlp", (5, 60, 61))}


def lively(base: BaseModel, name: str, seed: int = 0, *, kind: str | None = None) -> LoraAdapter:
    """An adapter with nothing at zero; one of this name is replaced."""
    rank, targets, token_ids = KINDS[kind or name]
    adapter = base.adapters.create(name, LoraSettings(rank, 8.0, 0.0, targets, "standard"), seed=seed, token_ids=token_ids)
    generator = torch.Generator().manual_seed(seed + 7)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.copy_(torch.empty(b.shape).normal_(std=0.2, generator=generator))
        if adapter.tokens is not None:
            rows = adapter.tokens.rows
            rows.copy_(torch.empty(rows.shape).normal_(std=0.4, generator=generator))
    return adapter


def waves_of(names: list[str], count: int = 36, size: int = 6) -> list[list[Request]]:
    prompts = [[*p, 60, 61] for p in ragged_prompts(count)]
    requests = [Request(p, mixed(i), names[i % len(names)], 2 * i, 1 + i % 2) for i, p in enumerate(prompts)]
    return [requests[i : i + size] for i in range(0, count, size)]


def broken(base: BaseModel, name: str) -> None:
    """An adapter that gives no numbers."""
    adapter = lively(base, name, kind="wide")
    with torch.no_grad():
        for a, _ in adapter.weights.values():
            a.fill_(float("nan"))
