"""Checkpoints of an unfinished stage: written atomically, verified before use, never a pickle.

A checkpoint is a folder `step-00000012` with `state.safetensors` (weights, optimiser moments, random state), `state.json`
(step, counters) and `manifest.json` (sha256 of both, written last). It is written under a hidden name, fsynced and renamed.
Its manifest also has the fingerprint of the stage that it belongs to. Loading takes the newest checkpoint that verifies. A
damaged one, or one of another stage, is reported and renamed, so that it does not take the place of a good one.
"""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.artifacts import disk_error, fsync_folder, fsync_tree, hash_file, os_error_in, write_json
from posttrain.locks import HeldFolder
from posttrain.terminal import say

KEEP = 2
CHECKPOINTS = "checkpoints"
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"


class Checkpoint(NamedTuple):
    """The state that a stage resumes from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


class Owner(NamedTuple):
    """The stage that checkpoints belong to: its fingerprint, and its folder, which is held open."""

    fingerprint: str
    folder: HeldFolder

    def check(self) -> None:
        """Raises MovedError where the stage's folder was renamed or removed; the error says where the last checkpoint is."""
        folder = self.folder.now()
        newest = checkpoint_folders(folder / CHECKPOINTS)[:1] if folder is not None else []
        self.folder.check(left=f"the last checkpoint is {newest[0]}" if newest else "")


def step_name(step: int) -> str:
    """The folder of a step's checkpoint."""
    return f"step-{step:08d}"


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint, *, keep: int = KEEP, owner: Owner | None = None) -> None:
    """Write a checkpoint, then remove all but the newest `keep`.

    Raises ArtifactError when the disk refuses, and MovedError where the owner's folder was moved: it is not created again.
    """
    if owner is not None:
        owner.check()
    final = folder / step_name(step)
    partial = folder / f".step-{step:08d}.partial"
    with disk_errors(final):
        for leftover in folder.glob(".step-*.partial"):  # of a killed save
            shutil.rmtree(leftover, ignore_errors=True)
        folder.mkdir(parents=owner is None, exist_ok=True)
        partial.mkdir()
        save_file({n: t.contiguous() for n, t in checkpoint.tensors.items()}, str(partial / TENSORS))
        write_json(partial / STATE, checkpoint.state)
        fsync_tree(partial)
        stage = {} if owner is None else {"stage": owner.fingerprint}
        write_json(partial / MANIFEST, {**stage, **{name: hash_file(partial / name) for name in (TENSORS, STATE)}})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        fsync_folder(folder)
    for old in checkpoint_folders(folder)[keep:]:
        shutil.rmtree(old, ignore_errors=True)


@contextmanager
def disk_errors(path: Path) -> Iterator[None]:
    """Turn errors of the file system inside into an ArtifactError that names `path`, those of safetensors included."""
    try:
        yield
    except OSError as error:
        raise disk_error(path, error) from error
    except SafetensorError as error:
        raise disk_error(path, os_error_in(str(error)) or OSError(str(error))) from error


def checkpoint_folders(folder: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def oldest_step(folder: Path) -> int:
    """The step of the oldest published checkpoint, 0 where there is none: the earliest that a resumed stage may start from."""
    return min((int(checkpoint.name.removeprefix("step-")) for checkpoint in checkpoint_folders(folder)), default=0)


def load_newest(folder: Path, owner: Owner | None = None) -> Checkpoint | None:
    """The newest checkpoint that verifies and belongs to the owner, or None. Prints which ones it refused, and why.

    A refused one is renamed to a hidden name: it must not take the place of a good one when old ones are removed.
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
    """Why a checkpoint cannot be used, or None where it can."""
    try:
        manifest = json.loads((candidate / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: str(manifest[name]) for name in (TENSORS, STATE)}
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    if owner is not None and manifest.get("stage") != owner.fingerprint:
        other = f"of another stage ({manifest['stage']!s:.16})" if "stage" in manifest else "of no stage that it names"
        return f"it is {other}, and this one is {owner.fingerprint}"
    for name, digest in expected.items():
        try:
            actual = hash_file(candidate / name)
        except OSError as error:
            return f"{name} is missing" if isinstance(error, FileNotFoundError) else f"{name} cannot be read ({error.strerror})"
        if actual != digest:
            return f"{name} does not match its sha256"
    return None
