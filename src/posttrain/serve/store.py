"""The adapters of a server: which policies are served, their metadata, and which are in memory.

A policy has a public name and is identified by the hash of its files. Its name in the engine contains both, `sft@0f3c5a…`. New
content under the same public name is a different adapter for the engine, so running requests finish on the weights they started
with, and later requests never use them.

    offer    at start, from the command line: any folder
    load     at run time, from a request: only below one folder, and nothing is downloaded
    use      for a request: from memory, or read from disk again if the adapter was evicted

The memory of adapters is bounded. The bound includes the slots of the engine as if all adapters were in use; each slot is as
wide as the widest adapter. The least recently used adapters are evicted, pinned ones never. Files are read and checked outside
the event loop, one adapter at a time. The table of adapters changes only in the loop's thread, between two awaits. An evicted
adapter keeps its engine name as long as a request or a row of the engine uses it.

Limits: the bound does not count evicted adapters that are still in use, nor slots that an idle engine has not freed yet.
Two names with the same content are two adapters in memory. Someone who can change links in the folder during a read can make
the server read an adapter elsewhere.
"""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from posttrain.errors import AdapterError
from posttrain.generate.short_threads import await_in_short_thread
from posttrain.models.adapter_config import ADAPTER_CONFIG
from posttrain.models.adapter_files import ADAPTER_WEIGHTS, AdapterFiles, make_adapter, read_adapter
from posttrain.models.adapter_slots import SlotShape, slot_bytes
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter
from posttrain.serve.turns import FairSemaphore, current_owner

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}")
# A path in a request: plain names joined by "/". No name starts with a dot, so ".." is impossible.
_PATH = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._=+-]{0,99}(/[A-Za-z0-9_][A-Za-z0-9._=+-]{0,99}){0,9}")
# The allowed size of a file's header, which holds tensor names and metadata.
_HEADER_BYTES = 2**24


class ServedModel(NamedTuple):
    """One served policy.

    `name` is public, `engine_name` is for `generate.requests.Request.adapter`. `fingerprint` is the hash of the files, for the
    base the hash of its weights. `root` names the base, `parent` the policy that training started from, if known. `bytes` is
    the size of the weights in memory. `use` sets `adapter`; a reference to it keeps `engine_name` valid.
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


class _Location(NamedTuple):
    """A folder on disk. If `root` is set, the folder must be inside it after resolving all links."""

    folder: Path
    root: Path | None


class _Entry(NamedTuple):
    served: ServedModel
    location: _Location
    shape: SlotShape


class AdapterStore:
    """The policies of one base. Belongs to one event loop; call `offer` before it runs."""

    def __init__(
        self, base: BaseModel, *, base_name: str, folder: Path | None, budget_bytes: int, stage: str | None = None,
        parent: str | None = None, scores: dict[str, float] | None = None,
    ) -> None:  # fmt: skip
        """`folder` is where `load` may read. `stage`, `parent` and `scores` describe full weights served in place of the base.

        Raises AdapterError if `folder` is not a folder.
        """
        if folder is not None and not folder.is_dir():
            raise AdapterError(
                f"folder {folder}", "is not a folder", do="create it, or name the folder that holds the adapters"
            )
        self._base, self._budget = base, budget_bytes
        self._folder = folder.resolve() if folder is not None else None
        size = sum(p.numel() * p.element_size() for p in base.model.parameters())
        assert base.weights_hash is not None, "the base has no weights hash"
        self._root = ServedModel(base_name, "base", base.weights_hash, base_name, parent, stage, scores, size, True)
        # Least recently used first.
        self._entries: dict[str, _Entry] = {}
        # One adapter is read at a time, in turn between owners, so a burst of loads needs no more memory than one load.
        self._reading = FairSemaphore(1, 1)

    def offer(
        self, name: str, path: Path, *, pinned: bool = False, stage: str | None = None, parent: str = "base",
        scores: dict[str, float] | None = None,
    ) -> ServedModel:  # fmt: skip
        """Serve the adapter in a folder, at start. `parent` is the policy that its training started from.

        Raises AdapterError if it cannot be served or its name is taken.
        """
        self._check_name(name)
        if name in self._entries:
            raise AdapterError(f'adapter "{name}"', "the name is taken", do="give each adapter a different name")
        location = _Location(path.absolute(), None)
        files = self._read(name, location)
        served = self._describe(name, files, pinned)._replace(stage=stage, scores=scores)
        if parent != "base":
            served = served._replace(parent=parent)
        return self._publish(self._make(name, files), served, location)

    async def load(self, name: str, path: str, *, pinned: bool = False, replace: bool = False) -> ServedModel:
        """Serve the adapter at `path` below the folder. `replace` allows new content under an existing name.

        Requests that start after this returns use the new content. Loads run one after another.
        Raises AdapterError if the adapter is refused; nothing changes then.
        """
        self._check_name(name)
        location = self._check_path(name, path)
        async with self._reading.hold(current_owner()):
            files = await await_in_short_thread(self._read, name, location)
            existing = self._entries.get(name)
            if existing is not None and existing.served.fingerprint == files.fingerprint:
                served = existing.served._replace(pinned=pinned)
            elif existing is None or replace:
                served = self._describe(name, files, pinned)
            else:
                raise AdapterError(
                    f'adapter "{name}"', "is already served with other content", do="set load_inplace to replace it"
                )
            return self._publish(await self._adapter_for(served, files), served, location)

    async def unload(self, name: str) -> None:
        """Stop serving an adapter. Raises AdapterError if it is not served or is the base."""
        async with self._reading.hold(current_owner()):
            if name == self._root.name:
                raise AdapterError("model", f'"{name}" is the base', allowed="an adapter")
            served = self._entry(name).served
            del self._entries[name]
            if served.engine_name in self._base.adapters:
                self._base.adapters.retire(served.engine_name)

    async def use(self, name: str) -> ServedModel:
        """The policy of a request, loaded into memory. Keep the result until the request is submitted.

        Raises AdapterError if the name is not served, or if the files of an evicted adapter have changed.
        """
        if name == self._root.name:
            return self._root
        if self._entry(name).served.engine_name not in self._base.adapters:
            await self._recall(name)
        entry = self._entries[name] = self._entries.pop(name)
        return entry.served._replace(adapter=self._base.adapters.get(entry.served.engine_name))

    def __contains__(self, name: str) -> bool:
        return name == self._root.name or name in self._entries

    def models(self) -> list[ServedModel]:
        """All served policies, in memory or not: the base first, then by name."""
        return [self._root, *(self._entries[name].served for name in sorted(self._entries))]

    async def _recall(self, name: str) -> None:
        """Read an evicted adapter from disk again. Its content must not have changed."""
        async with self._reading.hold(current_owner()):
            served, location, _ = self._entry(name)
            if served.engine_name in self._base.adapters:  # another request was first
                return
            files = await await_in_short_thread(self._read, name, location)
            if files.fingerprint != served.fingerprint:
                raise AdapterError(f'adapter "{name}"', "its files changed after it was loaded", do="load it again")
            self._publish(await self._adapter_for(served, files), served, location)

    async def _adapter_for(self, served: ServedModel, files: AdapterFiles) -> LoraAdapter:
        """The adapter in memory with the same content, or a new one."""
        if served.engine_name in self._base.adapters:
            return self._base.adapters.get(served.engine_name)
        return await await_in_short_thread(self._make, served.name, files)

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            names = ", ".join(served.name for served in self.models())
            raise AdapterError("model", f"{name[:100]!r} is not served", allowed=f"there is: {names}")
        return self._entries[name]

    def _check_name(self, name: str) -> None:
        where = f"adapter {name[:100]!r}"
        if not _NAME.fullmatch(name):
            raise AdapterError(
                where, "invalid name", allowed="up to 100 letters, digits, . _ -, starting with a letter or digit"
            )
        if name.casefold() in ("base", self._root.name.casefold()):
            raise AdapterError(where, "is the name of the base", do="give the adapter another name")

    def _check_path(self, name: str, path: str) -> _Location:
        """Raise AdapterError for an unsafe path, before any access to the disk."""
        where = f'adapter "{name}"'
        if self._folder is None:
            raise AdapterError(where, "the server has no folder to load adapters from", do="start it with --adapters-dir")
        if not _PATH.fullmatch(path):
            raise AdapterError(
                where, f"path {path[:100]!r}",
                allowed="names of letters, digits, . _ = + -, joined by /, none starting with a dot",
                do="give a path below the folder of adapters",
            )  # fmt: skip
        return _Location(self._folder / path, self._folder)

    def _read(self, name: str, location: _Location) -> AdapterFiles:
        """Runs outside the event loop. Checks the location of every file before opening any."""
        where = f'adapter "{name}"'
        for path in (location.folder, location.folder / ADAPTER_CONFIG, location.folder / ADAPTER_WEIGHTS):
            if location.root is not None and not Path(os.path.realpath(path)).is_relative_to(location.root):
                raise AdapterError(where, "is outside the folder of adapters", do="copy the adapter into it")
        return read_adapter(location.folder, where=where, limit=self._budget + _HEADER_BYTES)

    def _make(self, name: str, files: AdapterFiles) -> LoraAdapter:
        """Runs outside the event loop, without touching the engine."""
        where = f'adapter "{name}"'
        adapter = make_adapter(_engine_name(name, files), files, self._base, where=where)
        if adapter.head is not None:
            raise AdapterError(where, "is a reward model: it scores answers and writes none", allowed="a policy")
        for tensor, parameter in adapter.parameters().items():
            if not bool(parameter.isfinite().all()):
                raise AdapterError(where, f"{tensor} has numbers that are not finite", do="train the adapter again")
        return adapter

    def _describe(self, name: str, files: AdapterFiles, pinned: bool) -> ServedModel:
        root = self._root.name
        return ServedModel(name, _engine_name(name, files), files.fingerprint, root, root, None, None, 0, pinned)

    def _publish(self, adapter: LoraAdapter, served: ServedModel, location: _Location) -> ServedModel:
        """Evict adapters to make room, and replace the entry of this name. Has no await, so no request runs in between."""
        adapters, size = self._base.adapters, 4 * sum(p.numel() for p in adapter.parameters().values())
        entry = _Entry(served._replace(bytes=size), location, SlotShape.of(adapter))
        loaded = [e for name, e in self._entries.items() if name != served.name and e.served.engine_name in adapters]
        pinned = [entry, *(candidate for candidate in loaded if candidate.served.pinned)]
        if (needed := self._bytes(pinned)) > self._budget:
            pinned_too = " and pinned ones" if len(pinned) > 1 else ""
            raise AdapterError(
                f'adapter "{served.name}"', f"{needed} bytes in memory with slots for it{pinned_too}",
                allowed=f"{self._budget} for all adapters",
                do="start the server with more memory for adapters, or serve fewer pinned ones",
            )  # fmt: skip
        entries = [entry, *loaded]
        for candidate in loaded:
            if not candidate.served.pinned and self._bytes(entries) > self._budget:
                adapters.retire(candidate.served.engine_name)
                entries.remove(candidate)
        old = self._entries.pop(served.name, None)
        if old is not None and old.served.engine_name in adapters and old.served.engine_name != served.engine_name:
            adapters.retire(old.served.engine_name)
        adapters.add(adapter)
        self._entries[served.name] = entry
        return entry.served

    def _bytes(self, entries: Sequence[_Entry]) -> int:
        """The memory of adapters plus the maximum of their slots in the engine."""
        slots = slot_bytes([entry.shape for entry in entries], self._base.dtype, self._base.device)
        return sum(entry.served.bytes for entry in entries) + slots


def _engine_name(name: str, files: AdapterFiles) -> str:
    """Public names contain no "@", so they cannot equal an engine name."""
    return f"{name}@{files.fingerprint[:16]}"
