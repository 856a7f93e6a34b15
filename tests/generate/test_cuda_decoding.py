"""Replayed steps on a GPU against plain ones there: the same tokens, and the steps were replayed. `pytest -m gpu`."""

import pytest
import torch
from decoding_waves import KINDS, broken, lively, waves_of
from engine_runs import ragged_prompts

from posttrain.generate import engine as engine_module
from posttrain.generate.engine import Engine, generate
from posttrain.generate.requests import Request
from posttrain.generate.sampling import SamplingSettings
from posttrain.models.base_model import BaseModel, load_base
from posttrain.records import Rollout

# The compiler warns of what it could do on this card; that is not ours to answer for.
pytestmark = [pytest.mark.gpu, pytest.mark.filterwarnings("default")]


@pytest.fixture(scope="module")
def far(own_cache: None) -> BaseModel:
    """The tiny base on a GPU in float32, with adapters of several shapes."""
    base = load_base("random:tiny", template="gemma", dtype="float32", device="cuda")
    for name in KINDS:
        lively(base, name)
    return base


def engine_of(base: BaseModel, *, steady: bool) -> Engine:
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(engine_module.FIXED_FORMS, "cuda", steady)
        return Engine(base)


def answers(engine: Engine, waves: list[list[Request]], every: int = 4) -> list[Rollout]:
    """What comes of requests that are sent in waves."""
    ends, numbers, steps = {}, [], 0
    while engine.live or steps < every * len(waves):
        if steps % every == 0 and steps // every < len(waves):
            numbers += [number for request in waves[steps // every] for number in engine.submit(request)]
        ends |= {event.row: event.rollout for event in engine.step() if event.rollout is not None}
        steps += 1
    return [ends[number] for number in numbers]


def replayed(engine: Engine) -> int:
    assert engine._decoder is not None
    return engine._decoder.graphs.replayed


def same(found: list[Rollout], wanted: list[Rollout]) -> None:
    assert [(r.completion_ids, r.finish) for r in found] == [(r.completion_ids, r.finish) for r in wanted]
    for a, b in zip(found, wanted, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-4)


@pytest.mark.parametrize("names", [["base"], ["wide"], ["base", "wide", "narrow"], ["rows"], ["base", *KINDS]])
def test_rows_that_come_and_go(far: BaseModel, names: list[str]) -> None:
    """Shelves grow, empty and come back; several engines in turn share the memory of what they record."""
    waves = waves_of(names)
    wanted = answers(engine_of(far, steady=False), waves)
    for _ in range(3):
        engine = engine_of(far, steady=True)
        same(answers(engine, waves), wanted)
        assert replayed(engine) > 0
        same(answers(engine, waves), wanted)


def test_a_shelf_that_grows_and_one_that_is_left(far: BaseModel) -> None:
    """First few rows of one shelf, then many more and others, then few again."""
    prompts = ragged_prompts(40)
    settings = [SamplingSettings((40, 12, 250)[i % 3], 1.0, seed=i) for i in range(40)]
    requests = [Request(p, s, ("wide", "base")[i % 2], i) for i, (p, s) in enumerate(zip(prompts, settings, strict=True))]
    waves = [requests[:2], requests[2:3], requests[3:20], [], requests[20:]]
    engine = engine_of(far, steady=True)
    same(answers(engine, waves, 8), answers(engine_of(far, steady=False), waves, 8))
    assert replayed(engine) > 50


def test_an_adapter_that_is_replaced_under_its_name(far: BaseModel) -> None:
    requests = [Request([1, 50, 60 + i], SamplingSettings(24, 1.0, seed=i), "fresh", i) for i in range(5)]
    told = []
    for steady in (False, True):
        engine, ends = engine_of(far, steady=steady), {}
        for turn in range(4):
            lively(far, "fresh", turn, kind="wide" if turn > 1 else "narrow")
            for request in requests:
                engine.submit(request)
            for _ in range(6):
                ends |= {event.row: event.rollout for event in engine.step() if event.rollout is not None}
            far.adapters.retire("fresh")
        while engine.live:
            ends |= {event.row: event.rollout for event in engine.step() if event.rollout is not None}
        told.append([ends[i].completion_ids for i in range(20)])
    assert replayed(engine) > 0
    assert told[0] == told[1]


def test_an_adapter_that_learns_between_answers(far: BaseModel) -> None:
    """One engine, the same adapter, other numbers in it: what was recorded reads them."""
    engine = engine_of(far, steady=True)
    learning = lively(far, "learning", kind="narrow")
    settings = SamplingSettings(12, 1.0, seed=3)
    told = []
    for _ in range(3):
        told.append(answers(engine, [[Request([1, 50, 51], settings, "learning")]]))
        same(told[-1], generate(far, [[1, 50, 51]], settings, "learning"))
        with torch.no_grad():
            for _, b in learning.weights.values():
                b.mul_(-1.5)
    assert len({r.completion_ids for (r,) in told}) == 3


def test_weights_that_give_no_numbers_end_alone(far: BaseModel) -> None:
    broken(far, "broken")
    waves = waves_of(["base", "broken", "wide", "narrow"], 24)
    engine = engine_of(far, steady=True)
    found = answers(engine, waves)
    same(found, answers(engine_of(far, steady=False), waves))
    assert {r.finish for r in found if r.adapter == "broken"} == {"not finite"}
    assert all(r.finish != "not finite" for r in found if r.adapter != "broken")
    assert replayed(engine) > 0


def test_all_steps_but_the_first_two_are_replayed(far: BaseModel) -> None:
    """One with the prompts, one that runs as it stands; the one that is recorded is replayed too."""
    engine = engine_of(far, steady=True)
    answers(engine, [[Request([1, 50 + i], SamplingSettings(30, min_new_tokens=30), "wide") for i in range(5)]])
    assert replayed(engine) == 28


def test_full_weights_that_move_between_answers(own_cache: None) -> None:
    """float32 weights, seen by a forward in bfloat16: the copies of weights that moved are others."""
    base = load_base("random:tiny", template="gemma", device="cuda", full=True)
    requests = [Request(p, SamplingSettings(16, 1.0, seed=2), "base", i) for i, p in enumerate(ragged_prompts(16))]
    engine, told = engine_of(base, steady=True), []
    for _ in range(2):
        told.append([r.completion_ids for r in answers(engine, [requests])])
        wanted = answers(engine_of(base, steady=False), [requests])
        # Rounding may tip a draw.
        assert sum(ids == r.completion_ids for ids, r in zip(told[-1], wanted, strict=True)) >= 12
        with torch.no_grad():
            for weight in base.model.parameters():
                weight.mul_(1.3)
    assert sum(a == b for a, b in zip(*told, strict=True)) < 8
    assert replayed(engine) > 16


def test_memory_comes_back_and_random_numbers_are_not_touched(far: BaseModel) -> None:
    state, reserved = torch.cuda.get_rng_state(), []
    for _ in range(12):
        generate(far, ragged_prompts(20), SamplingSettings(40, 1.0), ["base", "wide"] * 10)
        reserved.append(torch.cuda.memory_reserved())
    assert reserved[-1] - reserved[3] <= 4 * 2**20
    assert torch.equal(torch.cuda.get_rng_state(), state)
    torch.rand(8, device="cuda")
