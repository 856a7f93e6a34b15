"""Locks of run folders, and detection of folders that are renamed or removed during the work.

`pipeline.py` locks the run folder; each stage checks its own partial folder. Lock and check use an open descriptor and not the
path, so they follow a renamed folder. The lock is on the folder itself, and on `.lock` in it for file systems that lock only
files.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from posttrain.artifacts import disk_error
from posttrain.errors import MovedError, RunLockedError


class HeldFolder:
    """An open folder. Raises OSError if it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self.descriptor)

    def is_there(self) -> bool:
        """Whether the path still refers to this folder."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except OSError:
            return False

    def now(self) -> Path | None:
        """The current path of the folder. None if it was removed or the system does not provide it."""
        with suppress(OSError):
            path = Path(os.readlink(f"/proc/self/fd/{self.descriptor}"))
            if os.path.samestat(os.stat(path), os.fstat(self.descriptor)):
                return path
        return None

    def check(self, *, left: str = "") -> None:
        """Raise MovedError if the folder was renamed or removed. `left` describes the work in it for the error text."""
        if self.is_there():
            return
        current_path = self.now()
        if current_path is None:
            do = "run the same command to begin again"
            raise MovedError(str(self.path), "was removed while this process worked in it", do=do)
        problem = "was renamed" if not self.path.exists() else "was renamed, and another folder has its name"
        raise MovedError(
            str(self.path), f"{problem} while this process worked in it",
            allowed=left or f"everything so far is in {current_path}",
            do="give its new name with --out to go on",
        )  # fmt: skip


@contextmanager
def run_lock(run: Path) -> Iterator[HeldFolder]:
    """Lock a run folder for the length of the block. The lock ends with the process.

    Raises RunLockedError at once if another process has it, ArtifactError if the folder cannot be created or written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        folder = HeldFolder(run)
        handle = os.open(".lock", os.O_RDWR | os.O_CREAT, 0o666, dir_fd=folder.descriptor)
    except OSError as error:
        raise disk_error(run, error) from error
    try:
        _lock(run, handle)
        with suppress(OSError):  # a file system that locks only files
            _lock(run, folder.descriptor)
        folder.check()
        yield folder
    finally:
        os.close(handle)
        folder.close()


def _lock(run: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        do = "wait for it, or choose another folder with --out"
        raise RunLockedError(str(run), "another posttrain process works on this run", do=do) from None
