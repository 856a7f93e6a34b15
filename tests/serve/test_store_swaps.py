"""Adapters change under a running engine: what is in flight ends on its own weights, what comes later gets the new ones."""

import asyncio
import shutil
from pathlib import Path

import pytest
from adapter_folders import in_memory, room_for, write_adapter

from posttrain.errors import AdapterError
from posttrain.generate.engine import generate
from posttrain.generate.requests import Request
from posttrain.generate.sampling import SamplingSettings
from posttrain.generate.worker import Answer, Server, serving
from posttrain.models.adapter_files import load_adapter
from posttrain.models.base_model import BaseModel, load_base
from posttrain.records import Rollout
from posttrain.serve.errors import Refusal
from posttrain.serve.limits import Limits
from posttrain.serve.protocol import CompletionRequest
from posttrain.serve.service import Service
from posttrain.serve.store import AdapterStore

PROMPTS = [[1, 40 + i, 50, 60 + i] for i in range(8)]
SETTINGS = SamplingSettings(6, 1.0, seed=3)
Answers = dict[str, list[tuple[int, ...]]]


@pytest.fixture(scope="module")
def written(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight adapters."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abcdefgh"):
        write_adapter(folder / name, tiny, seed, rank=(4, 2)[seed % 2])
    return folder


@pytest.fixture(scope="module")
def cold(written: Path) -> Answers:
    """What each adapter answers to each prompt on a base of its own that has never seen another."""
    found: Answers = {}
    for name in ("base", *"abcdefgh"):
        fresh = load_base("random:tiny", template="gemma", dtype="float32", device="cpu")
        if name != "base":
            load_adapter(written / name, name, fresh)
        found[name] = [rollout.completion_ids for rollout in generate(fresh, PROMPTS, SETTINGS, name)]
    assert len({tuple(answers) for answers in found.values()}) == 9, "two adapters that answer alike would hide a mistake"
    return found


async def ids_of(answer: Answer) -> tuple[int, ...]:
    rollouts: list[Rollout] = [event.rollout async for event in answer if event.rollout is not None]
    return rollouts[0].completion_ids


def test_200_requests_while_one_name_changes_under_them(base: BaseModel, written: Path, cold: Answers):
    names = "abcdefgh"
    returned = 0  # the number of the last load that came back
    asked: list[tuple[int, str, asyncio.Task[tuple[int, ...]]]] = []
    stale: list[int] = []

    async def change(store: AdapterStore, paths: dict[str, str]) -> None:
        nonlocal returned
        while len(asked) < 200:
            path = names[(returned + 1) % 8]
            paths[(await store.load("x", path, replace=True)).fingerprint] = path
            returned += 1

    async def ask(store: AdapterStore, server: Server, paths: dict[str, str], number: int) -> None:
        before = returned
        served = await store.use("x")
        place = number % len(PROMPTS)
        if paths[served.fingerprint] != names[before % 8]:
            stale.append(number)
        await asyncio.sleep(0)  # a prompt takes its time; `served` holds the adapter
        answer = server.submit(Request(PROMPTS[place], SETTINGS, served.engine_name, place))
        asked.append((number, served.fingerprint, asyncio.create_task(ids_of(answer))))

    async def work() -> None:
        store = AdapterStore(base, base_name="tiny", folder=written, budget_bytes=room_for(10))
        paths = {(await store.load("x", "a")).fingerprint: "a"}
        async with serving(base) as server:
            changes = asyncio.create_task(change(store, paths))
            requests = []
            for number in range(200):
                requests.append(asyncio.create_task(ask(store, server, paths, number)))
                await asyncio.sleep(0.001)
            await asyncio.gather(*requests, changes)
            wrong = [n for n, content, task in asked if await task != cold[paths[content]][n % len(PROMPTS)]]
        assert (len(asked), wrong, stale) == (200, [], [])
        assert len({content for _, content, _ in asked}) > 4
        assert len(base.adapters.names()) == 1

    asyncio.run(asyncio.wait_for(work(), 120))


def test_what_is_asked_for_after_a_load_returned_is_the_new_one(base: BaseModel, written: Path, cold: Answers):
    """And what was asked for before it, with rows in flight or not yet begun, stays the old one."""

    async def work() -> None:
        store = AdapterStore(base, base_name="tiny", folder=written, budget_bytes=room_for(10))
        running: list[tuple[str, int, asyncio.Task[tuple[int, ...]]]] = []
        async with serving(base) as server:
            for turn in range(50):
                name = "ab"[turn % 2]
                await store.load("x", name, replace=True)
                for i, prompt in enumerate(PROMPTS[:4]):
                    answer = server.submit(Request(prompt, SETTINGS, (await store.use("x")).engine_name, i))
                    running.append((name, i, asyncio.create_task(ids_of(answer))))
            wrong = [(name, i) for name, i, task in running if await task != cold[name][i]]
            assert (len(running), wrong) == (200, [])

    asyncio.run(asyncio.wait_for(work(), 120))


def test_a_request_keeps_the_adapter_it_was_taken_with(base: BaseModel, written: Path, cold: Answers):
    """The engine's thread comes to it only after the name has gone."""

    async def work() -> None:
        load_adapter(written / "a", "a", base)
        async with serving(base) as server:
            with server._changed:  # while this is held the thread takes no note
                answer = server.submit(Request(PROMPTS[0], SETTINGS, "a"))
                base.adapters.remove("a")
            assert await ids_of(answer) == cold["a"][0]

    asyncio.run(asyncio.wait_for(work(), 60))


def test_8_adapters_and_the_base_with_room_for_3_answer_as_each_alone(base: BaseModel, written: Path, cold: Answers):
    """Every request may need one that had to leave; reading it does not stop the others."""

    async def work() -> None:
        store = AdapterStore(base, base_name="tiny", folder=written, budget_bytes=room_for(3))
        for name in "abcdefgh":
            await store.load(name, name)
        names = ["tiny", *"abcdefgh"]

        async def ask(server: Server, number: int) -> bool:
            name, place = names[number % 9], number % len(PROMPTS)
            answer = server.submit(Request(PROMPTS[place], SETTINGS, (await store.use(name)).engine_name, place))
            return await ids_of(answer) == cold["base" if name == "tiny" else name][place]

        async with serving(base) as server:
            assert all(await asyncio.gather(*(ask(server, number) for number in range(216))))
        assert len(in_memory(base)) <= 6  # of rank 2 nearly six have the bytes of three of rank 4

    asyncio.run(asyncio.wait_for(work(), 120))


def test_reading_an_adapter_does_not_stop_the_loop(base: BaseModel, written: Path):
    async def work() -> None:
        store = AdapterStore(base, base_name="tiny", folder=written, budget_bytes=room_for(10))
        await store.load("b", "b")
        first = asyncio.create_task(store.load("x", "a"))
        second = asyncio.create_task(store.load("x", "b"))
        await asyncio.sleep(0)  # both have begun
        assert (await store.use("b")).name == "b"
        assert not first.done()
        assert not second.done()
        with pytest.raises(AdapterError, match="model · 'x' is not served"):
            await store.use("x")
        assert (await first).name == "x"
        with pytest.raises(AdapterError, match="is already served with other content"):
            await second

    asyncio.run(asyncio.wait_for(work(), 60))


def test_one_wide_adapter_among_narrow_ones_counts_with_the_slots_that_it_widens(
    base: BaseModel, written: Path, tmp_path: Path
):
    """Measured after every answer: adapters in memory, and what the engine copies of them. When the wide one has left, so has
    its width."""
    write_adapter(tmp_path / "wide", base, 9, rank=64)
    for name in "abcdefgh":
        shutil.copytree(written / name, tmp_path / name)
    budget = room_for(44)
    shown: list[tuple[int, int]] = []

    async def work() -> None:
        store = AdapterStore(base, base_name="tiny", folder=tmp_path, budget_bytes=budget)
        async with serving(base) as server:
            kept = server._engine._adapters

            async def ask(*names: str) -> None:
                used = [await store.use(name) for name in names]
                found = [server.submit(Request(PROMPTS[0], SETTINGS, one.engine_name, place)) for place, one in enumerate(used)]
                del used
                await asyncio.gather(*map(ids_of, found))
                del found
                there = [base.adapters.get(name) for name in base.adapters.names()]
                files = sum(4 * p.numel() for adapter in there for p in adapter.parameters().values())
                slots = sum(t.nbytes for stack in kept._stacks.values() for t in (stack.a, stack.b))
                shown.append((files + slots, kept.rank))

            for name in "abcdefgh":
                await store.load(name, name)
            await ask(*"abcdefgh")
            assert in_memory(base) == set("abcdefgh")
            await store.load("wide", "wide")
            await ask("wide")
            assert "wide" in in_memory(base)
            assert len(in_memory(base)) == 3, "more slots of rank 64 do not fit"
            await ask("wide", *(in_memory(base) - {"wide"}))
            for name in "abcdefgh":
                await ask(name)
            await store.unload("wide")
            await ask("a")
            await ask(*"abcdefgh")

    asyncio.run(asyncio.wait_for(work(), 60))
    assert max(size for size, _ in shown) <= budget
    assert [rank for _, rank in shown[:3]] == [4, 64, 64]
    assert shown[-1][1] == 4


def test_a_disk_that_is_slow_stops_only_who_needs_it(base: BaseModel, written: Path):
    """Another adapter is being read and does not come: what is in memory answers, what is not is told in time."""

    async def work() -> None:
        store = AdapterStore(base, base_name="tiny", folder=written, budget_bytes=room_for(1))
        for name in "ab":
            await store.load(name, name)
        service = Service(base, store, Limits(queue_seconds=0.2))
        async with service.running(), store._reading.hold("another"):
            for model in ("tiny", "b"):
                flow = await service.open(CompletionRequest(model=model, prompt="Hi", max_tokens=2, min_tokens=2), "")
                assert len([event async for event in flow.events()]) == 2
            with pytest.raises(Refusal, match="the adapter of 'a' was not loaded within --queue-seconds") as caught:
                await service.open(CompletionRequest(model="a", prompt="Hi"), "")
            assert caught.value.status == 503
        async with service.running():
            await service.open(CompletionRequest(model="a", prompt="Hi"), "")

    asyncio.run(asyncio.wait_for(work(), 60))
