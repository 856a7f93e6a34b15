"""Adapters of a server: what each one is, which are in memory, and how they change under way."""

import asyncio
import shutil
import threading
from hashlib import sha256
from pathlib import Path

import pytest
import torch
from adapter_folders import RANK_4_BYTES, in_memory, logits_of, room_for, write_adapter

from posttrain.artifacts import hash_file
from posttrain.errors import AdapterError
from posttrain.models.base_model import BaseModel
from posttrain.serve.store import AdapterStore, ServedModel


@pytest.fixture(scope="module")
def written(tiny: BaseModel, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Adapters a to e of rank 4; nobody changes them."""
    folder = tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate("abcde"):
        write_adapter(folder / name, tiny, seed)
    return folder


def store_of(base: BaseModel, folder: Path | None, *, room: int = 100) -> AdapterStore:
    """A store with room for so many adapters of rank 4."""
    return AdapterStore(base, base_name="tiny", folder=folder, budget_bytes=room_for(room))


def test_what_is_served_says_what_it_is(base: BaseModel, written: Path):
    store = store_of(base, None)
    served = store.offer("sft", written / "a", pinned=True, stage="sft", scores={"starter": 0.5})
    files = ("adapter_config.json", "adapter_model.safetensors")
    content = sha256("".join(hash_file(written / "a" / name) for name in files).encode()).hexdigest()
    assert served == ServedModel(
        "sft", f"sft@{content[:16]}", content, "tiny", "tiny", "sft", {"starter": 0.5}, RANK_4_BYTES, True
    )
    root = store.models()[0]
    size = sum(p.numel() * 4 for p in base.model.parameters())
    assert root == ServedModel("tiny", "base", base.source.weights_hash, "tiny", None, None, None, size, True)
    store.offer("another", written / "b")
    assert [model.name for model in store.models()] == ["tiny", "another", "sft"]
    assert asyncio.run(store.use("tiny")) == root
    assert not any(p.requires_grad for p in base.adapters.get(served.engine_name).parameters().values())


def test_the_least_recently_used_leaves_and_the_pinned_stay(base: BaseModel, written: Path):
    async def work() -> None:
        store = store_of(base, written, room=3)
        for name in "abc":
            await store.load(name, name)
        assert in_memory(base) == {"a", "b", "c"}
        await store.use("a")  # the order is now b c a
        await store.load("d", "d")
        assert in_memory(base) == {"c", "a", "d"}
        await store.use("b")  # read again: c a d -> a d b
        assert in_memory(base) == {"a", "d", "b"}
        await store.load("a", "a", pinned=True)  # d b a
        await store.use("c")
        await store.use("d")
        assert in_memory(base) == {"a", "c", "d"}  # a was used before the others, and stays
        await store.use("b")
        assert in_memory(base) == {"a", "d", "b"}
        await store.load("a", "a")  # pinned no longer: d b a
        await store.use("c")
        await store.use("d")
        await store.use("b")
        assert in_memory(base) == {"c", "d", "b"}
        assert [model.name for model in store.models()] == ["tiny", "a", "b", "c", "d"]

    asyncio.run(work())


def test_a_larger_adapter_takes_the_room_of_two(base: BaseModel, written: Path, tmp_path: Path):
    write_adapter(tmp_path / "wide", base, 7, rank=8)

    async def work() -> None:
        store = store_of(base, written, room=4)
        for name in "abc":
            await store.load(name, name)
        store.offer("wide", tmp_path / "wide")
        assert in_memory(base) == {"c", "wide"}

    asyncio.run(work())


def test_what_does_not_fit_is_refused_with_the_numbers(base: BaseModel, written: Path, tmp_path: Path):
    write_adapter(tmp_path / "wide", base, 7, rank=8)
    store = store_of(base, None, room=2)
    store.offer("a", written / "a", pinned=True)
    store.offer("b", written / "b")
    with pytest.raises(
        AdapterError, match='adapter "wide" · 294912 bytes in memory with slots for it and pinned ones · 163840 for all'
    ):
        store.offer("wide", tmp_path / "wide")
    assert in_memory(base) == {"a", "b"}
    assert [model.name for model in store.models()] == ["tiny", "a", "b"]
    small = AdapterStore(base, base_name="tiny", folder=None, budget_bytes=RANK_4_BYTES - 1)
    with pytest.raises(AdapterError, match="65536 bytes in memory with slots for it · 32767 for all adapters"):
        small.offer("c", written / "c")
    (tmp_path / "long").mkdir()
    shutil.copy(written / "a" / "adapter_config.json", tmp_path / "long")
    with (tmp_path / "long" / "adapter_model.safetensors").open("wb") as file:
        file.truncate(2**40)  # a file with a hole: nobody could read it into memory
    with pytest.raises(AdapterError, match=r"adapter_model\.safetensors has 1099511627776 bytes · at most 16941056"):
        store.offer("long", tmp_path / "long")


def test_what_comes_back_from_disk_gives_the_same_logits(base: BaseModel, written: Path):
    async def work() -> None:
        store = store_of(base, written, room=1)
        first = await store.load("a", "a")
        before = logits_of(base, first.engine_name)
        await store.load("b", "b")
        assert in_memory(base) == {"b"}
        again = await store.use("a")
        assert in_memory(base) == {"a"}
        assert again._replace(adapter=None) == first
        assert torch.equal(logits_of(base, again.engine_name), before)
        assert not torch.equal(before, logits_of(base, "base"))

    asyncio.run(work())


def test_files_that_changed_meanwhile_are_not_served_as_what_they_were(base: BaseModel, written: Path, tmp_path: Path):
    shutil.copytree(written / "a", tmp_path / "a")
    shutil.copytree(written / "b", tmp_path / "b")

    async def work() -> None:
        store = store_of(base, tmp_path, room=1)
        first = await store.load("a", "a")
        shutil.copy(written / "c" / "adapter_model.safetensors", tmp_path / "a")
        assert (await store.use("a")).fingerprint == first.fingerprint  # still in memory
        await store.load("b", "b")
        with pytest.raises(AdapterError, match='adapter "a" · its files changed after it was loaded · load it again'):
            await store.use("a")
        assert in_memory(base) == {"b"}
        second = await store.load("a", "a", replace=True)
        assert second.fingerprint != first.fingerprint
        assert (await store.use("a")).engine_name == second.engine_name
        shutil.rmtree(tmp_path / "b")
        with pytest.raises(AdapterError, match=r"no adapter_config\.json"):
            await store.use("b")

    asyncio.run(work())


def test_no_thread_that_read_an_adapter_lives_on(base: BaseModel, written: Path):
    """It would keep OpenMP's workers, and a stream would be half as fast."""

    async def work() -> list[str]:
        store = store_of(base, written, room=1)
        await store.load("a", "a")
        await store.load("b", "b")
        await store.use("a")  # from disk again
        for thread in set(threading.enumerate()) - before:
            thread.join(10)
        return [thread.name for thread in set(threading.enumerate()) - before]

    before = set(threading.enumerate())
    assert asyncio.run(work()) == []


def test_other_content_needs_to_be_asked_for_and_the_same_is_no_load(base: BaseModel, written: Path):
    async def work() -> None:
        store = store_of(base, written)
        first = await store.load("x", "a")
        held = (await store.use("x")).adapter
        assert await store.load("x", "a", pinned=True) == first._replace(pinned=True)
        assert (await store.use("x")).adapter is held
        with pytest.raises(
            AdapterError, match='adapter "x" · is already served with other content · set load_inplace to replace it'
        ):
            await store.load("x", "b")
        assert (await store.use("x")).fingerprint == first.fingerprint
        second = await store.load("x", "b", replace=True)
        assert second.engine_name != first.engine_name
        assert base.adapters.names() == (second.engine_name,)
        third = await store.load("x", "a", replace=True)  # what an engine name means never changes
        assert third.engine_name == first.engine_name
        with pytest.raises(AdapterError, match='adapter "x" · the name is taken'):
            store.offer("x", written / "b")

    asyncio.run(work())


def test_loads_of_one_name_at_once_come_one_after_the_other(base: BaseModel, written: Path):
    async def work() -> None:
        store = store_of(base, written)
        loads = [store.load("x", path, replace=True) for path in "abcabc"]
        done = await asyncio.gather(*loads)
        assert [served.fingerprint for served in done[:3]] == [served.fingerprint for served in done[3:]]
        assert (await store.use("x")).fingerprint == done[-1].fingerprint
        assert base.adapters.names() == (done[-1].engine_name,)
        refused = await asyncio.gather(*(store.load("y", path) for path in "abc"), return_exceptions=True)
        assert [isinstance(found, AdapterError) for found in refused] == [False, True, True]

    asyncio.run(work())


def test_an_engine_name_is_good_as_long_as_its_adapter_is_held(base: BaseModel, written: Path):
    async def work() -> None:
        store = store_of(base, written, room=1)
        for leave in (store.load("x", "b", replace=True), store.load("y", "c"), store.unload("x")):
            await store.load("x", "a", replace=True)
            held = await store.use("x")
            expected = logits_of(base, held.engine_name)
            await leave
            assert held.engine_name not in base.adapters
            assert torch.equal(logits_of(base, held.engine_name), expected)
            name = held.engine_name
            del held
            await asyncio.sleep(0)  # asyncio itself holds what the last await gave until the next one
            with pytest.raises(AdapterError, match="is not loaded"):
                base.adapters.get(name)

    asyncio.run(work())


def test_what_is_unloaded_is_served_no_longer(base: BaseModel, written: Path):
    async def work() -> None:
        store = store_of(base, written, room=1)
        await store.load("a", "a", pinned=True)
        await store.unload("a")
        assert base.adapters.names() == ()
        for call in (store.use("a"), store.unload("a"), store.use("base"), store.use("\x00" * 10_000)):
            with pytest.raises(AdapterError, match="is not served · there is: tiny") as caught:
                await call
            assert len(str(caught.value)) < 600
        with pytest.raises(AdapterError, match='"tiny" is the base'):
            await store.unload("tiny")
        await store.load("a", "a")
        await store.load("b", "b")
        await store.unload("a")  # known, but not in memory
        assert [model.name for model in store.models()] == ["tiny", "b"]

    asyncio.run(work())
