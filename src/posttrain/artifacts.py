"""Run folders: immutable artifacts, manifests, fingerprints, atomic publishing, lineage, the run lock.

A stage is written to a hidden sibling folder, every file is fsynced, its manifest is written last, and the folder is
renamed. A manifest therefore means a whole artifact. No torch here: the report and a run that has nothing to do
must start at once. Power loss on a disk that lies about fsync, NFS renames and object stores are out of reach.
"""

import errno
import fcntl
import hashlib
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactError, RunLockedError

MANIFEST = "manifest.json"


def fingerprint(value: Any) -> str:
    """A hash of JSON-able data that does not depend on key order: 16 hex digits are enough for a run folder."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that after a crash the file is either whole or absent."""
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file through a temporary sibling, fsync and rename. Raises ArtifactError when the disk refuses."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise disk_error(path, error) from error


def disk_error(path: Path, error: OSError) -> ArtifactError:
    """Words for a write that the file system refused."""
    reasons = {
        errno.ENOSPC: "the disk is full",
        errno.EACCES: "no permission to write",
        errno.EROFS: "a read-only disk",
    }
    found = reasons.get(error.errno or 0, error.strerror or str(error))
    return ArtifactError(str(path), found, do="make room or choose another folder with --out, then run the same command again")


def fsync_folder(folder: Path) -> None:
    """Make renames inside a folder durable."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(folder: Path) -> None:
    """Make every file below a folder durable, then the folders."""
    for root, _, names in os.walk(folder, topdown=False):
        for name in names:
            with (Path(root) / name).open("rb") as file:
                os.fsync(file.fileno())
        fsync_folder(Path(root))


def publish(partial: Path, final: Path, manifest: dict[str, Any]) -> None:
    """Turn a partial folder into an artifact: fsync, manifest last, rename. An older artifact there is replaced."""
    try:
        fsync_tree(partial)
        write_json(partial / MANIFEST, manifest)
        if final.exists():
            retired = final.with_name(f".{final.name}.retired")
            shutil.rmtree(retired, ignore_errors=True)
            os.rename(final, retired)
            os.rename(partial, final)
            shutil.rmtree(retired, ignore_errors=True)
        else:
            os.rename(partial, final)
        fsync_folder(final.parent)
    except OSError as error:
        raise disk_error(final, error) from error


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a published artifact, or None where there is none. A damaged one is an error by name."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (json.JSONDecodeError, UnicodeDecodeError):
        raise ArtifactError(str(path), "not readable as JSON", do=f"remove {folder} and run the recipe again") from None
    if not isinstance(manifest, dict) or "fingerprint" not in manifest:
        raise ArtifactError(str(path), "not a manifest", do=f"remove {folder} and run the recipe again")
    return manifest


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file that this package wrote; a torn last line is left out."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, whole or not at all."""
    write_bytes(path, "".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows).encode())


def lineage(run: Path, stage: str) -> list[dict[str, Any]]:
    """Manifests from a stage back to the base, the stage first."""
    found: list[dict[str, Any]] = []
    pending, seen = [stage], set()
    while pending:
        name = pending.pop(0)
        if name in seen or name == "base":
            continue
        seen.add(name)
        manifest = read_manifest(run / name)
        if manifest is None:
            raise ArtifactError(str(run / name), "no finished stage", do="run the recipe first")
        found.append(manifest)
        pending.extend(str(parent) for parent in manifest.get("inputs", {}))
    return found


@contextmanager
def run_lock(run: Path) -> Iterator[None]:
    """Hold a run folder; a second process is refused at once. The lock dies with the process, however it dies."""
    try:
        run.mkdir(parents=True, exist_ok=True)
        handle = (run / ".lock").open("a+")
    except OSError as error:
        raise disk_error(run, error) from error
    with handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise RunLockedError(
                str(run),
                "another posttrain process works on this run",
                do="wait for it, or choose another folder with --out",
            ) from None
        yield
