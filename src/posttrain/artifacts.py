"""Run folders: immutable artifacts, manifests, fingerprints, atomic publishing, lineage.

A stage is written to a hidden sibling folder. Every file is fsynced, the manifest is written last, and the folder is renamed,
so a manifest means a complete artifact. This module does not import torch, so that the report and a finished run start fast.
Not covered: power loss on disks that ignore fsync, NFS renames and object stores.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
import tomllib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactError
from posttrain.file_types import check_manifest

MANIFEST = "manifest.json"
# The folder of a run that contains the scores of its policies and reward models.
EVALUATIONS = "evaluate"
_STAGE_NAME = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")


def fingerprint(value: Any) -> str:
    """A hash of JSON data that does not depend on key order, as 16 hex digits."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(_encoded(text)).hexdigest()[:16]


def _encoded(json_text: str) -> bytes:
    """JSON as UTF-8. Undecodable bytes of file names become escapes, which JSON readers accept."""
    return json_text.encode(errors="backslashreplace")


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand_home(path: str) -> Path:
    """Expand `~` to the home folder. A path without such a home (`~$file.csv`) is returned unchanged."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically."""
    write_bytes(path, _encoded(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"))


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: temporary sibling, fsync, rename. Raises ArtifactError if the disk fails."""
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


_DISK_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "the file is too large for this disk",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EROFS: "the disk is read-only",
    errno.EEXIST: "a file is where a folder should be",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the disk has an input/output error",
}


def is_disk_error(error: OSError) -> bool:
    """Whether an error comes from the file system and not from a defect of this package."""
    return error.errno in _DISK_REASONS


def os_error_in(message: str) -> OSError | None:
    """The OSError that a library in Rust, such as safetensors, reports only in its message ("… os error 28 …"), if any."""
    number = re.search(r"os error (\d+)", message)
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def disk_error(path: Path, error: OSError) -> ArtifactError:
    """The error for a write that the file system refused."""
    reason = _DISK_REASONS.get(error.errno or 0, error.strerror or str(error))
    return ArtifactError(str(path), reason, do="make room or choose another folder with --out, then run the same command again")


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


def set_usual_modes(folder: Path) -> None:
    """Give every file below a folder the default permissions. safetensors writes files that only their owner can read.

    The default comes from a new file, because reading the umask would change it briefly for all threads.
    """
    probe = folder / f".mode.{os.getpid()}"
    try:
        probe.touch(exist_ok=False)
        mode = stat.S_IMODE(probe.stat().st_mode)
    finally:
        probe.unlink(missing_ok=True)
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            path.chmod(mode)


@contextmanager
def new_folder(out: Path) -> Iterator[Path]:
    """A temporary folder that is renamed to `out` when the block ends, or removed if the block fails.

    Raises ArtifactError if `out` exists or the disk fails.
    """
    if out.exists() or out.is_symlink():
        raise ArtifactError(str(out), "exists already", do="name a folder that does not exist yet")
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        yield partial
        set_usual_modes(partial)
        fsync_tree(partial)
        os.rename(partial, out)
        fsync_folder(out.absolute().parent)
    except OSError as error:
        raise disk_error(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def publish(partial: Path, final: Path, manifest: dict[str, Any], *, scratch: Collection[str] = ()) -> None:
    """Turn a partial folder into an artifact: fsync, manifest last, rename. Replaces an older artifact.

    The manifest contains the sha256 of every file. `scratch` names files that were needed only during the work; they are
    removed after the manifest is written. A kill at any point loses nothing: `recover` completes the publication. Raises
    ArtifactError if the disk fails.
    """
    try:
        set_usual_modes(partial)
        fsync_tree(partial)
        files = {
            path.relative_to(partial).as_posix(): hash_file(path)
            for path in sorted(partial.rglob("*"))
            if path.is_file() and path.relative_to(partial).parts[0] not in scratch
        }
        write_json(partial / MANIFEST, {**manifest, "files": files})
        _move_into_place(partial, final, scratch)
    except OSError as error:
        raise disk_error(final, error) from error


def _move_into_place(partial: Path, final: Path, scratch: Collection[str]) -> None:
    for name in scratch:
        _remove(partial / name)
    retired = final.with_name(f".{final.name}.retired")
    if final.exists():
        _remove(retired)
        os.rename(final, retired)
    os.rename(partial, final)
    fsync_folder(final.parent)
    _remove(retired)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def partial_folder(folder: Path) -> Path:
    """The folder in which an artifact is built before it is published."""
    return folder.with_name(f".{folder.name}.partial")


def recover(parent: Path, *, scratch: Collection[str] = ()) -> None:
    """Complete publications that a kill interrupted: a partial folder with a manifest is complete.

    An artifact that was being replaced is restored unless the new one is complete.
    """
    for partial in sorted(parent.glob(".*.partial")):
        if (partial / MANIFEST).exists():
            _move_into_place(partial, parent / partial.name[1 : -len(".partial")], scratch)
    for retired in sorted(parent.glob(".*.retired")):
        final = parent / retired.name[1 : -len(".retired")]
        if final.exists():
            _remove(retired)
        else:
            os.rename(retired, final)


def verify_files(folder: Path, names: Iterable[str] | None = None) -> None:
    """Compare files of an artifact with the hashes in its manifest (all of them, or those named).

    Raises ArtifactError that names the changed or missing file.
    """
    manifest = read_manifest(folder) or {}
    for name, digest in manifest.get("files", {}).items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.is_file() or hash_file(path) != digest:
            problem = "was changed after it was made" if path.is_file() else "is missing"
            raise ArtifactError(str(path), problem, do=f"remove {folder} and run the recipe again")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a published artifact, or None. Raises ArtifactError if it is damaged."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        raise ArtifactError(str(path), "not readable as JSON", do=f"remove {folder} and run the recipe again") from None
    check_manifest(manifest, str(path), do=f"remove {folder} and run the recipe again")
    checked: dict[str, Any] = manifest
    return checked


def read_recipe(folder: Path) -> tuple[dict[str, Any], str]:
    """The recipe of a run as tables and as text. Raises ArtifactError if the folder is not a run."""
    path = folder / "recipe.toml"
    try:
        text = path.read_text(encoding="utf-8")
        recipe = tomllib.loads(text)
    except (FileNotFoundError, NotADirectoryError):
        raise ArtifactError(str(folder), "not a run folder", do="name a folder made by `posttrain run`") from None
    except (UnicodeDecodeError, tomllib.TOMLDecodeError):
        raise ArtifactError(str(path), "not readable as TOML", do="run the recipe again") from None
    tables = recipe.get("stage", [])
    # A name becomes a path, so a recipe from an untrusted run must not escape its folder.
    if not isinstance(tables, list) or not all(
        isinstance(t, dict) and _STAGE_NAME.fullmatch(str(t.get("name"))) for t in tables
    ):
        raise ArtifactError(str(path), "stages without a valid name", do="run the recipe again")
    return recipe, text


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file that this package wrote, without an incomplete last line."""
    if not path.exists():
        return
    with path.open(encoding="utf-8") as file:
        for line in file:
            if line.endswith("\n"):
                yield json.loads(line)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write rows as JSON lines, atomically."""
    write_bytes(path, _encoded("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)))


def lineage(run: Path, stage: str) -> list[dict[str, Any]]:
    """Manifests from a stage back to the base, the stage first."""
    manifests: list[dict[str, Any]] = []
    pending, visited = [stage], set()
    while pending:
        name = pending.pop(0)
        if name in visited or name == "base":
            continue
        visited.add(name)
        manifest = read_manifest(run / name)
        if manifest is None:
            raise ArtifactError(str(run / name), "no finished stage", do="run the recipe first")
        manifests.append(manifest)
        pending.extend(str(parent) for parent in manifest.get("inputs", {}))
    return manifests
