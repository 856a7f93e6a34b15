"""Checkpoints of a stage in progress: published only when whole, verified before use, never a pickle.

A checkpoint is a folder `step-00000012` with `state.safetensors` (weights, optimiser moments, random state), `state.json`
(step, counters) and `manifest.json` (sha256 of both, written last). It is written beside its place, fsynced and renamed.
Loading takes the newest that verifies; a damaged one is named and passed over.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, NamedTuple

from safetensors.torch import load_file, save_file
from torch import Tensor

from posttrain.artifacts import disk_error, fsync_folder, fsync_tree, hash_file, write_json

KEEP = 2
TENSORS, STATE, MANIFEST = "state.safetensors", "state.json", "manifest.json"


class Checkpoint(NamedTuple):
    """State to go on from."""

    tensors: dict[str, Tensor]
    state: dict[str, Any]


def save_checkpoint(folder: Path, step: int, checkpoint: Checkpoint) -> None:
    """Write a checkpoint; older ones beyond the newest two go, after the new one is safe. Raises ArtifactError."""
    final = folder / f"step-{step:08d}"
    partial = folder / f".step-{step:08d}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        save_file({n: t.contiguous() for n, t in checkpoint.tensors.items()}, str(partial / TENSORS))
        write_json(partial / STATE, checkpoint.state)
        fsync_tree(partial)
        write_json(partial / MANIFEST, {name: hash_file(partial / name) for name in (TENSORS, STATE)})
        shutil.rmtree(final, ignore_errors=True)
        os.rename(partial, final)
        fsync_folder(folder)
    except OSError as error:
        shutil.rmtree(partial, ignore_errors=True)
        raise disk_error(final, error) from error
    for old in checkpoint_folders(folder)[KEEP:]:
        shutil.rmtree(old, ignore_errors=True)


def checkpoint_folders(folder: Path) -> list[Path]:
    """Published checkpoints, newest first."""
    return sorted(folder.glob("step-*"), reverse=True)


def load_newest(folder: Path) -> Checkpoint | None:
    """The newest checkpoint that verifies, or None. Says on standard error which ones it refused, and why."""
    for candidate in checkpoint_folders(folder):
        reason = _damage(candidate)
        if reason is None:
            state = json.loads((candidate / STATE).read_text(encoding="utf-8"))
            return Checkpoint(load_file(str(candidate / TENSORS)), state)
        print(f"checkpoint {candidate.name} refused: {reason}; going on from an older one", file=sys.stderr)
    return None


def _damage(candidate: Path) -> str | None:
    """Why a checkpoint cannot be used, or None."""
    try:
        manifest = json.loads((candidate / MANIFEST).read_text(encoding="utf-8"))
        expected = {name: str(manifest[name]) for name in (TENSORS, STATE)}
    except (OSError, ValueError, KeyError, TypeError):
        return f"{MANIFEST} is missing or damaged"
    for name, digest in expected.items():
        if not (candidate / name).exists():
            return f"{name} is missing"
        if hash_file(candidate / name) != digest:
            return f"{name} does not match its sha256"
    return None
