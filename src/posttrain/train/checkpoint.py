"""Checkpoints of a stage in progress: published only when whole, verified before use, never a pickle.

A checkpoint is a folder `step-00000012` with `state.safetensors` (weights, optimiser moments, random state), `state.json`
(step, counters) and `manifest.json` (sha256 of both, written last). It is written beside its place, fsynced and renamed.
Its manifest also has the fingerprint of the stage that it belongs to. Loading takes the newest that verifies; a damaged one, or
one of another stage, is named and set aside, so that it never counts among those kept.
"""

import json
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.artifacts import disk_error, fsync_folder, fsync_tree, hash_file, write_json
from posttrain.locks import HeldFolder
from posttrain.terminal import say

KEEP = 2
CHECKPOINTS = "checkpoints"
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"


class Checkpoint(NamedTuple):
    """State to go on from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Owner(NamedTuple):
    """The stage that checkpoints belong to: what it works for, as a fingerprint, and its folder, which is held open."""

    fingerprint: str
    held: HeldFolder

    def check(self) -> None:
        """Raises MovedError where the stage's folder was renamed or removed, which says where the last checkpoint is."""
        now = self.held.now()
        newest = checkpoint_folders(now / CHECKPOINTS)[:1] if now is not None else []
        self.held.check(left=f"the last checkpoint is {newest[0]}" if newest else "")


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, *, keep: int = KEEP, owner: Owner | None = None) -> None:
    """Write a checkpoint; older ones beyond the newest `keep` go, after the new one is safe.

    Raises ArtifactError when the disk refuses, and where the owner's folder is not where it was: it is not made again.
    """
    if owner is not None:
        owner.check()
    final = folder / step_name(step)
    partial = folder / f".step-{step:08d}.partial"
    with disk_errors(final):
        for leftover in folder.glob(".step-*.partial"):  # of a save that was killed
            shutil.rmtree(leftover, ignore_errors=True)
        folder.mkdir(parents=owner is None, exist_ok=True)
        partial.mkdir()
        save_file({n: t.contiguous() for n, t in checkpoint.tensors.items()}, str(partial / TENSORS))
        write_json(partial / STATE, checkpoint.state)
        fsync_tree(partial)
        whose = {} if owner is None else {"stage": owner.fingerprint}
        write_json(partial / MANIFEST, {**whose, **{name: hash_file(partial / name) for name in (TENSORS, STATE)}})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        fsync_folder(folder)
    for old in checkpoint_folders(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Whatever the file system refuses inside becomes an ArtifactError that names `path`; safetensors has its own words."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error
    except SafetensorError as error:
        number = re.search(r"os error (\d+)", str(error))
        known = OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))
        raise disk_error(path, known) from error


def checkpoint_folders(folder: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def oldest_step(folder: Path) -> int:
    """The step of the oldest published checkpoint, 0 where there is none: as far back as a resumed stage may go."""
    return min((int(found.name.removeprefix("step-")) for found in checkpoint_folders(folder)), default=0)


def load_newest(folder: Path, owner: Owner | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies and is its owner's, or None. Says on standard error which ones it refused, and why.

    A refused one is kept under a hidden name: it must not take the place of a good one when old ones are removed.
    """
    candidates = checkpoint_folders(folder)
    for position, candidate in enumerate(candidates, start=1):
        reason = damage(candidate, owner)
        if reason is None:
            return _read(candidate)
        then = "going on from an older one" if position < len(candidates) else "there is no older one, starting over"
        say(f"{folder.name}/{candidate.name} refused: {reason}; {then}")
        aside = folder / f".{candidate.name}.refused"
        with disk_errors(aside):
            shutil.rmtree(aside, ignore_errors=True)
            os.rename(candidate, aside)
    return None


def load_step(folder: Path, step: int, owner: Owner | None = None) -> Checkpoint | None:
    """The checkpoint of one step, or None where it is missing, damaged or another stage's."""
    candidate = folder / step_name(step)
    return None if damage(candidate, owner) is not None else _read(candidate)


def _read(candidate: Path) -> Checkpoint:
    state = json.loads((candidate / STATE).read_text(encoding="utf-8"))
    return Checkpoint(load_file(str(candidate / TENSORS)), state)


def damage(candidate: Path, owner: Owner | None = None) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((candidate / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: str(manifest[name]) for name in (TENSORS, STATE)}
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    if owner is not None and manifest.get("stage") != owner.fingerprint:
        whose = f"of another stage ({manifest['stage']!s:.16})" if "stage" in manifest else "of no stage that it names"
        return f"it is {whose}, and this one is {owner.fingerprint}"
    for name, digest in expected.items():
        try:
            found = hash_file(candidate / name)
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name} cannot be read ({error.strerror})"
        if found != digest:
            return f"{name} does not match its sha256"
    return None
