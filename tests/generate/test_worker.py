"""The engine behind asyncio: many at once, clients that leave, a full queue, and going down."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import pytest

from posttrain.errors import BusyError, ModelError
from posttrain.generate import engine as engine_module
from posttrain.generate.engine import Engine, generate
from posttrain.generate.requests import Event, Request
from posttrain.generate.sampling import SamplingSettings
from posttrain.generate.worker import Answer, serving
from posttrain.models.base_model import BaseModel
from posttrain.records import Rollout

PROMPTS = [[1, 40 + i, 50, 60 + i] for i in range(12)]


def run(work: Coroutine[Any, Any, None]) -> None:
    """To the end within a minute, and no thread of ours left behind."""
    asyncio.run(asyncio.wait_for(work, 60))
    assert "posttrain engine" not in [thread.name for thread in threading.enumerate()]


async def last(answer: Answer) -> list[Rollout]:
    """The rollouts of an answer; its tokens must have come one by one."""
    tokens: dict[int, list[int]] = {}
    rollouts: dict[int, Rollout] = {}
    async for event in answer:
        if event.token is not None:
            tokens.setdefault(event.row, []).append(event.token)
        if event.rollout is not None:
            rollouts[event.row] = event.rollout
    assert all(tokens.get(row, []) == list(rollout.completion_ids) for row, rollout in rollouts.items())
    return [rollouts[row] for row in sorted(rollouts)]


def test_requests_at_once_get_what_each_gets_alone(tiny: BaseModel):
    settings = SamplingSettings(9, 1.0, seed=4)

    async def work() -> None:
        async with serving(tiny) as server:
            answers = [last(server.submit(Request(p, settings, completions=1 + i % 3))) for i, p in enumerate(PROMPTS)]
            for prompt, rollouts in zip(PROMPTS, await asyncio.gather(*answers), strict=True):
                alone = generate(tiny, [prompt], settings, "base", completions=len(rollouts))
                assert [(r.completion_ids, r.finish) for r in rollouts] == [(r.completion_ids, r.finish) for r in alone]

    run(work())


def test_events_may_be_handed_over_together_but_first_tokens_and_ends_do_not_wait(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch
):
    """Of three completions, whose tokens come in their order whatever comes together."""
    handed: list[list[Event | BaseException]] = []
    own = Answer.put
    monkeypatch.setattr(Answer, "put", lambda answer, events: handed.append(list(events)) or own(answer, events))
    settings = SamplingSettings(20, 1.0, seed=4, min_new_tokens=20)

    async def work() -> None:
        async with serving(tiny) as server:
            found = await last(server.submit(Request(PROMPTS[0], settings, completions=3), together=8))
        alone = generate(tiny, [PROMPTS[0]], settings, "base", completions=3)
        assert [rollout.completion_ids for rollout in found] == [rollout.completion_ids for rollout in alone]

    run(work())
    assert [len(events) for events in handed[:3]] == [1, 1, 1]
    assert max(map(len, handed)) == 8
    assert sum(map(len, handed)) == 60
    assert len(handed) < 20


def test_what_is_held_back_comes_with_the_error_that_the_engine_died_of(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    own, steps = Engine.step, iter(range(100))

    def step(engine: Engine) -> list[Event]:
        if next(steps) > 4:
            raise ArithmeticError("broken")
        return own(engine)

    monkeypatch.setattr(Engine, "step", step)

    async def work() -> None:
        async with serving(tiny) as server:
            answer = server.submit(Request([1, 2], SamplingSettings(20, min_new_tokens=20)), together=16)
            assert [(await anext(answer)).row for _ in range(5)] == [0] * 5
            with pytest.raises(ArithmeticError):
                await anext(answer)

    run(work())


def test_a_client_that_leaves_makes_room(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(engine_module.ROWS, "cpu", 1)

    async def work() -> None:
        async with serving(tiny) as server:
            endless = server.submit(Request([1, 2], SamplingSettings(2000)))
            await anext(endless)
            behind = asyncio.create_task(last(server.submit(Request([1, 3], SamplingSettings(3)))))
            gone = asyncio.create_task(last(server.submit(Request([1, 4], SamplingSettings(2000)))))
            await asyncio.sleep(0)
            gone.cancel()  # a task that is cancelled ends its answer
            endless.cancel()
            assert [r.finish for r in await last_of(endless)] == ["cancelled"]
            assert len((await behind)[0].completion_ids) == 3

    run(work())


async def last_of(answer: Answer) -> list[Rollout]:
    """Rollouts of an answer of which some events were read before."""
    return [event.rollout async for event in answer if event.rollout is not None]


def test_a_full_queue_says_so_at_once(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(engine_module.ROWS, "cpu", 1)

    async def work() -> None:
        async with serving(tiny, waiting=2) as server:
            with pytest.raises(BusyError, match="0 completions wait and 3 more are requested · at most 2 · try again later"):
                server.submit(Request([1], completions=3))
            first = server.submit(Request([1, 2], SamplingSettings(2000)))
            await anext(first)
            others = [server.submit(Request([1, 3], SamplingSettings(2))) for _ in range(2)]
            with pytest.raises(BusyError, match="2 completions wait and 1 more are requested"):
                server.submit(Request([1, 3]))
            with pytest.raises(ModelError, match="an empty prompt"):
                server.submit(Request([]))
            first.cancel()
            assert [len(await last(other)) for other in others] == [1, 1]
            assert len(await last(server.submit(Request([1, 3], SamplingSettings(2))))) == 1

    run(work())


def test_going_down_ends_what_is_in_flight(tiny: BaseModel):
    async def work() -> None:
        async with serving(tiny) as server:
            answers = [server.submit(Request(p, SamplingSettings(2000))) for p in PROMPTS]
            await anext(answers[0])
        for answer in answers:
            assert [r.finish for r in await last_of(answer)] == ["cancelled"]
        with pytest.raises(BusyError, match="the engine has stopped"):
            server.submit(Request([1]))

    run(work())
