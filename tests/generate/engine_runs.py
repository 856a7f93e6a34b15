"""Requests for an engine, adapters that change its answers, and the answers."""

import torch

from posttrain.generate.engine import Engine
from posttrain.generate.requests import Event, Request
from posttrain.generate.sampling import SamplingSettings
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter, LoraSettings
from posttrain.models.segments import Segments, Span
from posttrain.records import Rollout


def ragged_prompts(count: int = 64) -> list[list[int]]:
    """Prompts of 1 to 60 tokens, all different."""
    generator = torch.Generator().manual_seed(3)
    lengths = torch.randint(1, 61, (count,), generator=generator).tolist()
    return [[1, *torch.randint(7, 263, (n,), generator=generator).tolist()] for n in lengths]


def full_logits(base: BaseModel, ids: list[int], adapter: str) -> torch.Tensor:
    """Logits [T, V] of one row computed at once, as training computes them."""
    with torch.no_grad():
        row = torch.tensor(ids)
        hidden = base.hidden(row, torch.arange(len(ids)), Segments((Span(0, len(ids)),)), adapter)
        return base.logits(hidden, adapter)


def mixed(index: int) -> SamplingSettings:
    """Settings of row `index` of a batch in which every row has others."""
    kinds = [
        SamplingSettings(14, 1.0, seed=4), SamplingSettings(9), SamplingSettings(20, 0.7, 0.9, seed=1),
        SamplingSettings(5, 1.3, top_k=7), SamplingSettings(18, 1.0, min_p=0.02, repetition_penalty=1.3),
        SamplingSettings(11, 0.0, repetition_penalty=1.5), SamplingSettings(8, 1.0, logit_bias=((50, 5.0), (60, -50.0))),
        SamplingSettings(16, 1.0, stop=("k", "zz"), min_new_tokens=3), SamplingSettings(100, 1.0, stop_ids=(70, 71, 72, 73)),
    ]  # fmt: skip
    return kinds[index % len(kinds)]


def lively(base: BaseModel, name: str, seed: int) -> LoraAdapter:
    adapter = base.adapters.create(name, LoraSettings(4, 8.0, 0.0, "all", "standard"), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, b in adapter.weights.values():
            b.normal_(std=0.2, generator=generator)
    return adapter


def run(engine: Engine) -> list[Event]:
    events = []
    while engine.live:
        events += engine.step()
    return events


def answers(engine: Engine, requests: list[Request]) -> list[Rollout]:
    numbers = [number for request in requests for number in engine.submit(request)]
    found = {event.row: event.rollout for event in run(engine) if event.rollout is not None}
    return [found[number] for number in numbers]
