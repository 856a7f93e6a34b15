"""Fairness of the engine: whose turn it is, how many places an owner has, and which of its rows rest."""

from collections import Counter

import pytest
from engine_runs import run

from posttrain.generate import engine as engine_module
from posttrain.generate.engine import Engine, SamplingSettings, generate
from posttrain.generate.fair_queue import FairQueue, PromptDebts
from posttrain.generate.requests import Request, Row
from posttrain.models.base_model import BaseModel

SIX = SamplingSettings(6, 1.0, seed=1, min_new_tokens=6)


def waiting_row(tiny: BaseModel, number: int, owner: str) -> Row:
    return Row(number, Request([1], SamplingSettings(1), owner=owner), 0, None, tiny.chat)


def test_owners_take_turns_by_what_they_had(tiny: BaseModel):
    """a had 10 tokens; b comes anew and starts there, not at 0; c, who comes when both wait, starts at the least of them."""
    queue = FairQueue()
    for number in range(3):
        queue.add([waiting_row(tiny, number, "a")])
    order = []

    def serve(tokens: int) -> None:
        group = queue.next(lambda _: True)
        assert group is not None
        queue.take(group)
        queue.charge(group[0].request.owner, tokens)
        order.append(group[0].number)

    serve(10)
    queue.add([waiting_row(tiny, 3, "b")])
    queue.add([waiting_row(tiny, 4, "b")])
    serve(5)  # both had 10: whoever waits longer
    queue.add([waiting_row(tiny, 5, "c")])
    serve(1)
    serve(1)
    serve(20)
    serve(1)
    assert order == [0, 1, 3, 5, 4, 2]
    assert len(queue) == 0
    assert queue.next(lambda _: True) is None


@pytest.mark.parametrize(("owners", "most"), [(1, 28), (2, 14), (4, 7), (8, 3), (11, 3)])
def test_owners_have_equal_shares_of_seven_eighths_of_the_places_and_each_an_eighth_of_them(
    owners: int, most: int, tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
):
    """Of 32 places, where each wants more: one that floods does not take the places of those who come after it."""
    monkeypatch.setitem(engine_module.ROWS, "cpu", 32)
    engine = Engine(tiny, serving=True)
    for index in range(30):
        for owner in range(owners):
            engine.submit(Request([1, 9, 7 + index, 8 + owner], SIX, owner=f"owner {owner}"))
    for _ in range(5):
        engine.step()
        held = Counter(row.request.owner for row in engine._places.rows())
        assert set(held.values()) == {most} if owners < 11 else max(held.values()) == most


def test_who_generates_without_a_server_has_all_places(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(engine_module.ROWS, "cpu", 32)
    engine = Engine(tiny)
    for index in range(40):
        engine.submit(Request([1, 9, 7 + index], SIX))
    engine.step()
    assert engine.running == 32


@pytest.mark.parametrize("by_blocks", [True, False])
def test_the_newest_rows_of_a_flood_rest_while_others_answer(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch, *, by_blocks: bool
):
    """Sixteen places: fourteen rows of a flood that was there first, then two of another owner, which have a place at once.
    Seven of the flood rest until those two have ended, and all say what they say alone."""
    monkeypatch.setitem(engine_module.ROWS, "cpu", 16)
    monkeypatch.setitem(engine_module.SERVED_PREFILL_TOKENS, "cpu", 4096)
    engine = Engine(tiny, serving=True)
    engine._places.by_blocks = by_blocks
    # Of many lengths, so that rows stand in another order than they came.
    asked = [Request([1, *range(7, 8 + 37 * i % 150)], SIX, owner="flood" if i < 20 else "calm") for i in range(22)]
    numbers = [engine.submit(request)[0] for request in asked[:20]]
    events = engine.step()
    assert [engine.running, engine.waiting.total()] == [14, 6]
    numbers += [engine.submit(request)[0] for request in asked[20:]]
    flood, calm = set(numbers[:14]), set(numbers[20:])
    while calm:
        step = engine.step()
        told = {event.row for event in step if event.token is not None}
        assert calm <= told
        assert len(told & flood) <= 7
        calm -= {event.row for event in step if event.rollout is not None}
        events += step
    ended = [event.row for event in events if event.rollout is not None]
    assert ended[:7] == numbers[:7] if not by_blocks else set(ended[:7]) == set(numbers[:7])
    assert not set(numbers[7:20]).intersection(ended)
    events += run(engine)
    found = {event.row: event.rollout for event in events if event.rollout is not None}
    for number, request in zip(numbers, asked, strict=True):
        assert found[number].completion_ids == generate(tiny, [request.prompt], SIX, "base")[0].completion_ids


def test_a_row_at_rest_can_be_given_up(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(engine_module.ROWS, "cpu", 8)
    engine = Engine(tiny, serving=True)
    flood = [engine.submit(Request([1, 9, i], SIX, owner="flood"))[0] for i in range(7, 14)]
    engine.step()
    engine.submit(Request([1, 8, 7], SIX, owner="calm"))
    engine.step()
    assert sorted(row.number for row in engine._places.rows() if row.resting) == flood[3:]
    for number in flood[4:]:
        engine.cancel(number)
    ends = {event.row: event.rollout.finish for event in run(engine) if event.rollout is not None}
    assert [ends[number] for number in flood] == ["length"] * 4 + ["cancelled"] * 3
    assert not engine.running


def test_a_cache_is_not_copied_when_others_join(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """Memory that nobody writes to costs nothing, so that there is room for all from the first row on; where a cache has room
    for few it grows, and the rows that are there go on."""
    for limit, kept in ((engine_module.CACHE_BYTES["cpu"], True), (2**20, False)):
        monkeypatch.setitem(engine_module.CACHE_BYTES, "cpu", limit)
        engine, asked = Engine(tiny, serving=True), [Request([1, 9, *range(7, 20 + i)], SIX) for i in range(30)]
        numbers = engine.submit(asked[0])
        events = engine.step()
        ((shelf, _),) = engine._places.shelves.values()
        address = shelf.address
        numbers += [engine.submit(request)[0] for request in asked[1:]]
        events += engine.step()
        assert (shelf.address == address) is kept
        found = {event.row: event.rollout for event in events + run(engine) if event.rollout is not None}
        for number, request in zip(numbers, asked, strict=True):
            assert found[number].completion_ids == generate(tiny, [request.prompt], SIX, "base")[0].completion_ids


def test_the_time_of_prompts_is_a_debt_that_other_steps_pay():
    """A step takes 1 s, and one with prompts of a 4 s: three more steps pay the 3 s by which others waited longer."""
    prompts, calm = PromptDebts(), {"calm": 1}
    prompts.pay(1.0, {}, calm)
    prompts.pay(4.0, {"a": 512}, calm)
    assert [prompts.may_prefill("a", calm), prompts.may_prefill("b", calm), prompts.may_prefill("calm", calm)] == [
        False,
        True,
        True,
    ]
    assert [prompts.may_prefill("a", {}), prompts.may_prefill("a", {"a": 3})] == [True, True]  # who would wait?
    may = []
    for _ in range(3):
        prompts.pay(1.0, {}, calm)
        may.append(prompts.may_prefill("a", calm))
    assert may == [False, False, True]
    prompts.pay(5.0, {"a": 300, "b": 100}, {"calm": 1, "b": 2})  # 3 s and 1 s
    prompts.pay(1.0, {}, calm)
    assert [prompts.may_prefill("a", calm), prompts.may_prefill("b", calm)] == [False, True]
    prompts = PromptDebts()
    prompts.pay(1.0, {}, {"a": 1})
    prompts.pay(9.0, {"a": 512}, {"a": 1})  # nobody else waited
    assert prompts.may_prefill("a", calm)


def test_a_flood_of_prompts_takes_half_of_the_time_of_others(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """By a clock that takes 1 s a step and 1 s for 16 tokens of prompts: 37 tokens of an answer beside prompts of 48 tokens
    without end take at most 74 s and a step more, not 148; and when they have come, the prompts go on in every step."""
    monkeypatch.setitem(engine_module.SERVED_PREFILL_TOKENS, "cpu", 48)
    engine, clock, computed = Engine(tiny, serving=True), [0.0], []
    inner = engine._step

    def step():
        events, chunks = inner()
        computed.append(sum(chunk.length for chunk in chunks))
        clock[0] += 1 + computed[-1] / 16
        return events, chunks

    monkeypatch.setattr(engine, "_step", step)
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: clock[0])
    (calm,) = engine.submit(Request([1, 8, 7], SamplingSettings(40, min_new_tokens=40), owner="calm"))
    for _ in range(3):
        engine.step()
    numbers = [engine.submit(Request([1, *range(i, i + 47)], SamplingSettings(1), owner="flood"))[0] for i in range(40)]
    began, ended = clock[0], list[int]()
    while calm not in ended:
        ended += [event.row for event in engine.step() if event.rollout is not None]
    assert 60 <= clock[0] - began <= 78
    assert 8 <= len(ended) - 1 <= 12
    computed.clear()
    ended += [event.row for event in run(engine) if event.rollout is not None]
    assert sorted(ended) == sorted([calm, *numbers])
    assert all(computed)


@pytest.mark.parametrize("steady", [False, True])
def test_a_prompt_that_waits_half_way_stays_where_it_is(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch, *, steady: bool):
    """In pieces of 48 tokens of 241, each of which others' steps pay for, but where steps of those have a fixed form."""
    monkeypatch.setitem(engine_module.SERVED_PREFILL_TOKENS, "cpu", 48)
    monkeypatch.setitem(engine_module.FIXED_FORMS, "cpu", steady)
    engine, clock, asked = Engine(tiny, serving=True), [0.0], []
    inner, paused = engine._step, 0

    def step():
        nonlocal paused
        events, chunks = inner()
        clock[0] += 1 + 4 * len(chunks)
        paused += bool(engine._filling and not chunks)
        return events, chunks

    monkeypatch.setattr(engine, "_step", step)
    monkeypatch.setattr(engine_module.time, "perf_counter", lambda: clock[0])
    for length, owner in ((3, "calm"), (240, "flood")):
        asked.append(Request([1, *range(7, 7 + length)], SamplingSettings(40, 1.0, min_new_tokens=40), owner=owner))
    numbers = engine.submit(asked[0])
    events = engine.step() + engine.step()
    numbers += engine.submit(asked[1])
    found = {event.row: event.rollout for event in events + run(engine) if event.rollout is not None}
    assert bool(paused) is not steady
    for number, request in zip(numbers, asked, strict=True):
        assert found[number].completion_ids == generate(tiny, [request.prompt], request.settings, "base")[0].completion_ids
