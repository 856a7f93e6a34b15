"""A folder held while a process works in it: by one process at a time, and noticed when its name leads elsewhere.

Where it stands: `pipeline.py` holds the run folder, and each stage its own unfinished folder. Both the hold and the check go by
the folder that is open and not by its path, so they follow it where it is renamed. The lock is on the folder itself, and on
`.lock` in it for file systems that lock only files.
"""

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from posttrain.artifacts import disk_error
from posttrain.errors import MovedError, RunLockedError


class HeldFolder:
    """A folder that is open. Raises OSError where it cannot be opened."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)

    def close(self) -> None:
        os.close(self.descriptor)

    def is_there(self) -> bool:
        """Whether the path leads to this folder."""
        try:
            return os.path.samestat(os.stat(self.path), os.fstat(self.descriptor))
        except OSError:
            return False

    def now(self) -> Path | None:
        """Where the folder is by now; None where it was removed, or where the system does not tell."""
        with suppress(OSError):
            place = Path(os.readlink(f"/proc/self/fd/{self.descriptor}"))
            if os.path.samestat(os.stat(place), os.fstat(self.descriptor)):
                return place
        return None

    def check(self, *, left: str = "") -> None:
        """Raises MovedError where the folder was renamed or removed: nothing is written where it was. `left` is what to say of
        the work that is in it.
        """
        if self.is_there():
            return
        now = self.now()
        if now is None:
            do = "run the same command to begin again"
            raise MovedError(str(self.path), "was removed while this process worked in it", do=do)
        found = "was renamed" if not self.path.exists() else "was renamed, and another folder is in its place"
        raise MovedError(
            str(self.path), f"{found} while this process worked in it", allowed=left or f"everything so far is in {now}",
            do="give its new name with --out to go on",
        )  # fmt: skip


@contextmanager
def run_lock(run: Path) -> Iterator[HeldFolder]:
    """Hold a run folder; a second process is refused at once, by whatever name. The lock dies with its process.

    Raises RunLockedError where another process holds it, ArtifactError where the folder cannot be made or written.
    """
    try:
        run.mkdir(parents=True, exist_ok=True)
        held = HeldFolder(run)
        handle = os.open(".lock", os.O_RDWR | os.O_CREAT, 0o666, dir_fd=held.descriptor)
    except OSError as error:
        raise disk_error(run, error) from error
    try:
        _lock(run, handle)
        with suppress(OSError):  # a file system that locks only files
            _lock(run, held.descriptor)
        held.check()
        yield held
    finally:
        os.close(handle)
        held.close()


def _lock(run: Path, descriptor: int) -> None:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        do = "wait for it, or choose another folder with --out"
        raise RunLockedError(str(run), "another posttrain process works on this run", do=do) from None
