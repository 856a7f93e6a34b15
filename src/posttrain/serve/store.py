"""The adapters of a server: which policies can be asked for, what each of them is, and which are in memory.

A policy has a public name and is identified by the content of its files. The engine knows it by a name made of both,
`sft@0f3c5a…`: other content under the same public name is another adapter to the engine, so requests in flight end on the
weights that they began with and later ones never meet them.

    offer    at start, from the command line: any folder
    load     at run time, from a request: only below one folder, and nothing is ever fetched
    use      for a request: from memory, or from disk again where others had taken its place

The adapters in memory have a bound, in which the slots of the engine are counted as if all were in flight: each is as wide as
the widest adapter. Those that were not used for longest make room, the pinned ones never. Files are read and checked beside the
event loop, one adapter at a time, and what is served changes only in the loop's thread, between two awaits. An adapter that
leaves keeps its engine name as long as a request or a row of the engine holds it.

Left out: the bound does not count adapters that left and are still held, nor slots that an engine without requests has not
given up yet; two names of one content are two adapters in memory; who can change links in the folder while it is read can make
the server look at an adapter elsewhere.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from posttrain.errors import AdapterError
from posttrain.generate.short_threads import beside
from posttrain.models.adapter_config import ADAPTER_CONFIG
from posttrain.models.adapter_files import ADAPTER_WEIGHTS, AdapterFiles, make_adapter, read_adapter
from posttrain.models.adapter_slots import SlotShape, slot_bytes
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter
from posttrain.serve.turns import Turns, owner

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# A path of a request: plain names joined by "/". No name begins with a dot, so there is no "..".
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9._=+-]{0,99}){0,9}")
# Beside its weights a file holds their names and its metadata.
_HEADER_BYTES = 2**24


class Served(NamedTuple):
    """What is known of one policy that can be asked for.

    `name` is the public one, `engine_name` what `generate.rows.Request.adapter` takes. `fingerprint` is the hash of its
    content, of the base its weights' hash. `root` names the base, `parent` the policy that its training started from, as far as
    that is known. `bytes` are those of its weights in memory.
    `adapter` is there where `use` gave it: whoever holds it keeps `engine_name` good.
    """

    name: str
    engine_name: str
    fingerprint: str
    root: str
    parent: str | None
    stage: str | None
    scores: dict[str, float] | None
    bytes: int
    pinned: bool
    adapter: LoraAdapter | None = None


class _Place(NamedTuple):
    """A folder on disk, and the one in which it must lie with all links followed; None where any will do."""

    folder: Path
    root: Path | None


class _Entry(NamedTuple):
    served: Served
    place: _Place
    shape: SlotShape


class AdapterStore:
    """The policies of one base in memory. For one event loop; `offer` is for the time before it runs."""

    def __init__(
        self, base: BaseModel, *, base_name: str, folder: Path | None, budget_bytes: int, stage: str | None = None,
        parent: str | None = None, scores: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """`folder` is where `load` may read. `stage`, `parent` and `scores` are those of whole weights in the base's place.

        Raises AdapterError where the folder is none.
        """
        if folder is not None and not folder.is_dir():
            raise AdapterError(f"folder {folder}", "is not a folder", do="make it, or give the one that holds the adapters")
        self._base, self._budget = base, budget_bytes
        self._folder = folder.resolve() if folder is not None else None
        size = sum(p.numel() * p.element_size() for p in base.model.parameters())
        assert base.weights_hash is not None, "weights that change are not served"
        self._root = Served(base_name, "base", base.weights_hash, base_name, parent, stage, scores, size, True)
        # Least recently used first.
        self._entries: dict[str, _Entry] = {}
        # One adapter at a time is read, in turn between owners: a burst of loads takes no more memory than one.
        self._reading = Turns(1, 1)

    def offer(
        self, name: str, path: Path, *, pinned: bool = False, stage: str | None = None, parent: str = "base",
        scores: dict[str, float] | None = None,
    ) -> Served:  # fmt: skip
        """Serve the adapter in a folder, at start. `parent` is what its training started from.

        Raises AdapterError where it cannot be served, or its name is taken.
        """
        self._check_name(name)
        if name in self._entries:
            raise AdapterError(f'adapter "{name}"', "a name that is taken", do="give each adapter a name of its own")
        place = _Place(path.absolute(), None)
        files = self._read(name, place)
        served = self._describe(name, files, pinned)._replace(stage=stage, scores=scores)
        if parent != "base":
            served = served._replace(parent=parent)
        return self._keep(self._make(name, files), served, place)

    async def load(self, name: str, path: str, *, pinned: bool = False, replace: bool = False) -> Served:
        """Serve the adapter at `path` below the folder, or with `replace` other content under a name that is taken.

        Whatever asks for the name after this has returned gets the new content. A load waits for the one before it.
        Raises AdapterError where it is refused; then everything is as it was.
        """
        self._check_name(name)
        place = self._check_path(name, path)
        async with self._reading.hold(owner()):
            files = await beside(self._read, name, place)
            known = self._entries.get(name)
            if known is not None and known.served.fingerprint == files.fingerprint:
                served = known.served._replace(pinned=pinned)
            elif known is None or replace:
                served = self._describe(name, files, pinned)
            else:
                raise AdapterError(f'adapter "{name}"', "is served with other content", do="ask for it to be replaced")
            return self._keep(await self._found(served, files), served, place)

    async def unload(self, name: str) -> None:
        """Serve an adapter no longer. Raises AdapterError where it is not served, or is the base."""
        async with self._reading.hold(owner()):
            if name == self._root.name:
                raise AdapterError("model", f'"{name}" is the base', allowed="an adapter")
            served = self._entry(name).served
            del self._entries[name]
            if served.engine_name in self._base.adapters:
                self._base.adapters.retire(served.engine_name)

    async def use(self, name: str) -> Served:
        """The policy that a request asks for, in memory; hold it until the request was submitted.

        Raises AdapterError where the name is not served, or the files of one that had to leave memory are not what they were.
        """
        if name == self._root.name:
            return self._root
        if self._entry(name).served.engine_name not in self._base.adapters:
            await self._recall(name)
        entry = self._entries[name] = self._entries.pop(name)
        return entry.served._replace(adapter=self._base.adapters.get(entry.served.engine_name))

    def __contains__(self, name: str) -> bool:
        return name == self._root.name or name in self._entries

    def models(self) -> list[Served]:
        """All that can be asked for, in memory or not: the base first, then by name."""
        return [self._root, *(self._entries[name].served for name in sorted(self._entries))]

    async def _recall(self, name: str) -> None:
        """Bring an adapter back from disk, as what it was when it was loaded."""
        async with self._reading.hold(owner()):
            served, place, _ = self._entry(name)
            if served.engine_name in self._base.adapters:  # another request was first
                return
            files = await beside(self._read, name, place)
            if files.fingerprint != served.fingerprint:
                raise AdapterError(f'adapter "{name}"', "its files were changed since it was loaded", do="load it again")
            self._keep(await self._found(served, files), served, place)

    async def _found(self, served: Served, files: AdapterFiles) -> LoraAdapter:
        """The adapter itself: the one in memory, where its content is the same."""
        if served.engine_name in self._base.adapters:
            return self._base.adapters.get(served.engine_name)
        return await beside(self._make, served.name, files)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            there = ", ".join(served.name for served in self.models())
            raise AdapterError("model", f"{name[:100]!r} is not served", allowed=f"there is: {there}")
        return self._entries[name]

    def _check_name(self, name: str) -> None:
        where = f"adapter {name[:100]!r}"
        if not _NAME.fullmatch(name):
            raise AdapterError(where, "a name that cannot be", allowed="up to 100 letters, digits, . _ -, first no sign")
        if name.casefold() in ("base", self._root.name.casefold()):
            raise AdapterError(where, "the name of the base", do="give the adapter another name")

    def _check_path(self, name: str, path: str) -> _Place:
        """Raises AdapterError for a path that is not plain, before the disk is asked for anything."""
        where = f'adapter "{name}"'
        if self._folder is None:
            raise AdapterError(where, "adapters cannot be loaded", do="start the server with the folder that holds them")
        if not _PATH.fullmatch(path):
            raise AdapterError(
                where, f"path {path[:100]!r}", allowed="names of letters, digits, . _ = + -, joined by /, none first a dot",
                do="give a path below the folder of adapters",
            )  # fmt: skip
        return _Place(self._folder / path, self._folder)

    def _read(self, name: str, place: _Place) -> AdapterFiles:
        """Runs beside the event loop. Nothing is opened before all of it is known to lie where it must."""
        where = f'adapter "{name}"'
        for path in (place.folder, place.folder / ADAPTER_CONFIG, place.folder / ADAPTER_WEIGHTS):
            if place.root is not None and not Path(os.path.realpath(path)).is_relative_to(place.root):
                raise AdapterError(where, "leads out of the folder of adapters", do="copy the adapter into it")
        return read_adapter(place.folder, where=where, limit=self._budget + _HEADER_BYTES)

    def _make(self, name: str, files: AdapterFiles) -> LoraAdapter:
        """Runs beside the event loop; the engine sees nothing of it."""
        where = f'adapter "{name}"'
        adapter = make_adapter(_engine_name(name, files), files, self._base, where=where)
        if adapter.head is not None:
            raise AdapterError(where, "is a reward model: it scores answers and writes none", allowed="a policy")
        for tensor, parameter in adapter.parameters().items():
            if not bool(parameter.isfinite().all()):
                raise AdapterError(where, f"{tensor} holds numbers that are not finite", do="train the adapter again")
        return adapter

    def _describe(self, name: str, files: AdapterFiles, pinned: bool) -> Served:
        root = self._root.name
        return Served(name, _engine_name(name, files), files.fingerprint, root, root, None, None, 0, pinned)

    def _keep(self, adapter: LoraAdapter, served: Served, place: _Place) -> Served:
        """Make room, and put an adapter in the place of what had its name. Without an await: no request comes in between."""
        adapters, size = self._base.adapters, 4 * sum(p.numel() for p in adapter.parameters().values())
        entry = _Entry(served._replace(bytes=size), place, SlotShape.of(adapter))
        others = [e for name, e in self._entries.items() if name != served.name and e.served.engine_name in adapters]
        pinned = [entry, *(other for other in others if other.served.pinned)]
        if (needed := self._bytes(pinned)) > self._budget:
            beside = " and pinned ones" if len(pinned) > 1 else ""
            raise AdapterError(
                f'adapter "{served.name}"', f"{needed} bytes in memory with slots for it{beside}",
                allowed=f"{self._budget} for all adapters",
                do="start the server with more memory for adapters, or serve fewer pinned ones",
            )  # fmt: skip
        held = [entry, *others]
        for other in others:
            if not other.served.pinned and self._bytes(held) > self._budget:
                adapters.retire(other.served.engine_name)
                held.remove(other)
        old = self._entries.pop(served.name, None)
        if old is not None and old.served.engine_name in adapters and old.served.engine_name != served.engine_name:
            adapters.retire(old.served.engine_name)
        adapters.add(adapter)
        self._entries[served.name] = entry
        return entry.served

    def _bytes(self, entries: Sequence[_Entry]) -> int:
        """What adapters take in memory, and their slots in the engine at most."""
        slots = slot_bytes([entry.shape for entry in entries], self._base.dtype, self._base.device)
        return sum(entry.served.bytes for entry in entries) + slots


def _engine_name(name: str, files: AdapterFiles) -> str:
    """No public name has an "@", so none can be taken for one of these."""
    return f"{name}@{files.fingerprint[:16]}"
