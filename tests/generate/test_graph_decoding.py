"""Steps of fixed form against plain ones: the same tokens from rows that come, go, share prompts and bring their adapters.

On a CPU they run as they stand; what a GPU makes of them is in `test_cuda_decoding.py`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import pytest
import torch
from decoding_waves import KINDS, broken, lively, waves_of

from posttrain.generate import engine as engine_module
from posttrain.generate.engine import Engine
from posttrain.generate.requests import Request
from posttrain.generate.sampling import SamplingSettings
from posttrain.models.base_model import BaseModel
from posttrain.records import Rollout


class Run(NamedTuple):
    """What an engine told, and the forms that its steps had (none where they were plain)."""

    rollouts: list[Rollout]
    forms: set[object]


@pytest.fixture(scope="module")
def base(tiny: BaseModel) -> Iterator[BaseModel]:
    """The tiny base with adapters of several shapes."""
    for name in KINDS:
        lively(tiny, name)
    yield tiny
    for name in tiny.adapters.names():
        tiny.adapters.remove(name)


def run(base: BaseModel, waves: list[list[Request]], *, steady: bool, every: int = 3) -> Run:
    """Requests that come in waves, one in so many steps."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine_module.FIXED_FORMS, base.device.type, steady)
        engine = Engine(base)
    ends, forms, numbers, steps = {}, set(), [], 0
    while engine.live or steps < every * len(waves):
        if steps % every == 0 and steps // every < len(waves):
            numbers += [number for request in waves[steps // every] for number in engine.submit(request)]
        ends |= {event.row: event.rollout for event in engine.step() if event.rollout is not None}
        forms |= set(engine._decoder.graphs.forms) if engine._decoder is not None else set()
        steps += 1
    return Run([ends[number] for number in numbers], forms)


def agree(base: BaseModel, waves: list[list[Request]]) -> Run:
    """Steady steps say what plain ones say; returns what they said."""
    plain, steady = run(base, waves, steady=False), run(base, waves, steady=True)
    assert [(r.completion_ids, r.finish) for r in steady.rollouts] == [(r.completion_ids, r.finish) for r in plain.rollouts]
    for a, b in zip(steady.rollouts, plain.rollouts, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
        assert a.model_logprobs == pytest.approx(b.model_logprobs, abs=1e-5)
    assert steady.forms
    return steady


@pytest.mark.parametrize(
    "names", [["base"], ["wide"], ["base", "wide", "narrow"], ["rows"], ["base", "wide", "narrow", "rows"]]
)
def test_rows_that_come_and_go(base: BaseModel, monkeypatch: pytest.MonkeyPatch, names: list[str]):
    monkeypatch.setitem(engine_module.ROWS, "cpu", 24)
    told = agree(base, waves_of(names))
    assert {r.finish for r in told.rollouts} >= {"length", "stop id"}


def test_prompts_in_pieces_beside_them(base: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(engine_module.PREFILL_TOKENS, "cpu", 48)
    generator = torch.Generator().manual_seed(11)
    long = [[1, *torch.randint(7, 263, (n,), generator=generator).tolist()] for n in (300, 110, 290)]
    waves = waves_of(["base", "narrow"], 12, 3)
    for wave, prompt in zip(waves, long, strict=False):
        wave.insert(1, Request(prompt, SamplingSettings(30, 1.0, seed=5), "wide", 100, 2))
    agree(base, waves)


def test_few_forms_for_many_lengths(base: BaseModel):
    """40 rows of 1 to 274 new tokens: at most 40, 32 or 16 rows and 256 or 512 keys seen."""
    lengths = [1 + 7 * i for i in range(40)]
    settings = [SamplingSettings(n, 1.0, seed=n, min_new_tokens=n) for n in lengths]
    told = run(base, [[Request([1, 50 + i], s, "wide") for i, s in enumerate(settings)]], steady=True)
    assert len(told.forms) <= 6
    assert [len(r.completion_ids) for r in told.rollouts] == lengths


def test_an_adapter_that_is_replaced_under_its_name(base: BaseModel):
    """Rows in flight keep the one that they began with."""
    first = [Request([1, 50, 60 + i], SamplingSettings(20, 1.0, seed=i), "fresh", i) for i in range(5)]
    told = []
    for steady in (False, True):
        lively(base, "fresh", 1, kind="narrow")
        with pytest.MonkeyPatch.context() as patch:
            patch.setitem(engine_module.FIXED_FORMS, base.device.type, steady)
            engine = Engine(base)
        ends = {}
        for turn in range(3):
            for request in first:
                engine.submit(request)
            for _ in range(4):
                ends |= {event.row: event.rollout for event in engine.step() if event.rollout is not None}
            base.adapters.retire("fresh")
            lively(base, "fresh", 2 + turn, kind="wide" if turn else "narrow")
        while engine.live:
            ends |= {event.row: event.rollout for event in engine.step() if event.rollout is not None}
        told.append([ends[i].completion_ids for i in range(15)])
    assert told[0] == told[1]
    assert len(set(told[0])) == 15


def test_weights_that_give_no_numbers_end_alone(base: BaseModel):
    broken(base, "broken")
    fine = ["base", "wide", "narrow"]
    told = agree(base, waves_of(["base", "broken", "wide", "narrow"], 24))
    ends = {r.adapter: r.finish for r in told.rollouts}
    assert ends["broken"] == "not finite"
    assert all(ends[name] != "not finite" for name in fine)


def test_weights_that_break_while_they_answer(base: BaseModel):
    """Rows of theirs end in the next step; the others say what they would have said."""
    lively(base, "breaks", kind="narrow")
    requests = [Request([1, 40 + i], SamplingSettings(12, 1.0, seed=i), ("wide", "breaks")[i % 2], i) for i in range(6)]
    wanted = run(base, [requests[::2]], steady=False).rollouts
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine_module.FIXED_FORMS, base.device.type, True)
        engine = Engine(base)
    for request in requests:
        engine.submit(request)
    ends, steps = {}, 0
    while engine.live:
        if steps == 4:
            theirs = base.adapters.get("breaks").weights
            with torch.no_grad():
                for a, _ in theirs.values():
                    a.fill_(float("nan"))
        ends |= {event.row: event.rollout for event in engine.step() if event.rollout is not None}
        steps += 1
    assert [ends[i].finish for i in (1, 3, 5)] == ["not finite"] * 3
    assert [ends[i].completion_ids for i in (0, 2, 4)] == [r.completion_ids for r in wanted]


def test_forms_whose_tensors_are_gone_are_let_go(base: BaseModel):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine_module.FIXED_FORMS, base.device.type, True)
        engine = Engine(base)
    assert engine._decoder is not None
    for turn in range(6):
        engine.submit(Request([1, 50 + turn], SamplingSettings(6, 1.0), "wide"))
        while engine.live:
            engine.step()
        assert len(engine._decoder.graphs.forms) == 1
