"""Run folders: immutable artifacts, manifests, fingerprints, atomic publishing, lineage.

A stage is written to a hidden sibling folder, every file is fsynced, its manifest is written last, and the folder is
renamed. A manifest therefore means a whole artifact. No torch here: the report and a run that has nothing to do
must start at once. Power loss on a disk that lies about fsync, NFS renames and object stores are out of reach.
"""

import errno
import hashlib
import json
import os
import re
import shutil
import stat
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from posttrain.errors import ArtifactError
from posttrain.file_types import check_manifest

MANIFEST = "manifest.json"


def fingerprint(value: Any) -> str:
    """A hash of JSON-able data that does not depend on key order: 16 hex digits are enough for a run folder."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False)
    return hashlib.sha256(_encoded(text)).hexdigest()[:16]


def _encoded(json_text: str) -> bytes:
    """JSON in UTF-8. What has no place there, a file name of other bytes, becomes the escape that JSON reads it back from."""
    return json_text.encode(errors="backslashreplace")


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def expand_home(path: str) -> Path:
    """A path with `~` as the home folder. One that names nobody's home (`~$file.csv`) is the name of a file as it is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that after a crash the file is either whole or absent."""
    write_bytes(path, _encoded(json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"))


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


_DISK_REASONS = {
    errno.ENOSPC: "the disk is full",
    errno.EDQUOT: "the disk quota is used up",
    errno.EFBIG: "larger than a file may be here",
    errno.EACCES: "no permission to write",
    errno.EPERM: "no permission to write",
    errno.EROFS: "a read-only disk",
    errno.EEXIST: "a file is where a folder should be",
    errno.ENOTDIR: "a file is where a folder should be",
    errno.ENAMETOOLONG: "the name is too long",
    errno.EIO: "the disk does not answer",
}


def is_disk_error(error: OSError) -> bool:
    """Whether the file system refused, rather than this package asking for what cannot be."""
    return error.errno in _DISK_REASONS


def os_error_in(message: str) -> OSError | None:
    """The OSError that a library in Rust, such as safetensors, reports only in its message ("… os error 28 …"), if any."""
    number = re.search(r"os error (\d+)", message)
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else None


def disk_error(path: Path, error: OSError) -> ArtifactError:
    """Words for a write that the file system refused."""
    found = _DISK_REASONS.get(error.errno or 0, error.strerror or str(error))
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


def set_usual_modes(folder: Path) -> None:
    """Give every file below a folder the permissions of a file made here: safetensors writes files that only their owner reads.

    What a new file gets is asked by making one, since reading the umask would change it for a moment in all threads.
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
    """A folder to fill that becomes `out` when the block ends; where the block fails nothing is left.

    Raises ArtifactError for a name that is taken and when the disk refuses.
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
    """Turn a partial folder into an artifact: fsync, manifest last, rename. An older artifact there is replaced.

    The manifest gets the sha256 of every payload file. `scratch` names what was needed only while working; it goes after
    the manifest is written, so that a kill at any point loses nothing: `recover` finishes what was begun here.
    Raises ArtifactError when the disk refuses.
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
    """Where an artifact is built before it is published."""
    return folder.with_name(f".{folder.name}.partial")


def recover(parent: Path, *, scratch: Collection[str] = ()) -> None:
    """Finish what a kill inside `publish` left in a folder of artifacts: a partial one with a manifest is whole.

    Of an artifact that was being replaced either the new one is put in place or, where there is none, the old one back.
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

    Raises ArtifactError naming the file that was changed or is gone.
    """
    manifest = read_manifest(folder) or {}
    for name, digest in manifest.get("files", {}).items():
        if names is not None and name not in names:
            continue
        path = folder / name
        if not path.is_file() or hash_file(path) != digest:
            found = "was changed after it was made" if path.is_file() else "is missing"
            raise ArtifactError(str(path), found, do=f"remove {folder} and run the recipe again")


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """The manifest of a published artifact, or None where there is none. A damaged one is an error by name."""
    path = folder / MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, RecursionError):
        raise ArtifactError(str(path), "not readable as JSON", do=f"remove {folder} and run the recipe again") from None
    check_manifest(manifest, str(path), do=f"remove {folder} and run the recipe again")
    found: dict[str, Any] = manifest
    return found


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
    write_bytes(path, _encoded("".join(json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows)))


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
