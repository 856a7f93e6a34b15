"""The API keys of a server: a JSON file with the sha256, name, scopes and creation time of each key.

A key is a random token of 256 bits, shown once when it is created. Its hash needs no salt and no slow function: those protect
passwords, which can be guessed. 2^256 tokens cannot be guessed, and a slow hash would let anyone load the server with
wrong keys. This file does not import torch, so the command is fast.

A running server rereads its file when it changes (`KeyFile`), so revoking a key takes effect at once.

Not included: keys that expire, and keys in a database.
"""

import fcntl
import hashlib
import hmac
import json
import logging
import os
import re
import secrets
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from posttrain.artifacts import fsync_folder
from posttrain.errors import ArtifactError, RecipeError

SCOPES = ("use", "admin")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,99}")
_HASH = re.compile(r"[0-9a-f]{64}")
# A file can change twice within one tick of the file system's clock, so a file written this recently is reread at each request.
_TICK_SECONDS = 2.0
_LOG = logging.getLogger(__name__)


class Key(NamedTuple):
    """One entry of the key file."""

    name: str
    sha256: str
    scopes: tuple[str, ...]
    created: str


class Keys(NamedTuple):
    """The entries of a key file."""

    keys: tuple[Key, ...]

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """Read a key file. Raises ArtifactError if it is malformed, or readable by other users of the machine."""
        where = str(path)
        try:
            # O_NONBLOCK: opening a pipe must not wait for a writer. A pipe is refused below.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read() if stat.S_ISREG(mode) else b""
        except OSError as error:
            raise ArtifactError(where, f"cannot be read ({error.strerror})", do="create it with `posttrain keys add`") from None
        if mode & 0o077:
            raise ArtifactError(where, f"mode {stat.S_IMODE(mode):o}", allowed="600 (only the owner)", do=f"chmod 600 {path}")
        try:
            rows = json.loads(data)["keys"]
            keys = tuple(_parse(row) for row in rows)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ArtifactError(where, "not a key file", do="create a new one with `posttrain keys add`") from None
        if len({key.name for key in keys}) < len(keys):
            raise ArtifactError(where, "two keys with the same name", do="remove one of them")
        return cls(keys)

    def check(self, presented: str) -> Key | None:
        """The entry of the presented key, or None. The time does not depend on which key matches."""
        digest = hashlib.sha256(presented.encode(errors="replace")).hexdigest()
        match = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                match = key
        return match


class KeyFile:
    """The current keys of a file. If the file becomes unreadable, the keys that were read last stay valid.

    Raises ArtifactError as `Keys.read` does if the file cannot be read at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._read_state, self._warned = path, _state(path), False
        self._keys = Keys.read(path)

    def check(self, presented: str) -> Key | None:
        """Like `Keys.check`, with the current content of the file."""
        state = _state(self._path)
        if state != self._read_state or (state is not None and abs(time.time() - state.written) < _TICK_SECONDS):
            self._warned = self._warned and state == self._read_state
            self._read_state = state
            self._read()
        return self._keys.check(presented)

    def _read(self) -> None:
        try:
            self._keys = Keys.read(self._path)
            self._warned = False
        except ArtifactError as error:
            if not self._warned:
                _LOG.warning("%s; the keys that were read last stay valid", error)
            self._warned = True


class _State(NamedTuple):
    """Values that change with a file: device and inode, size, and the times of writing and renaming.

    `times` are nanoseconds, `written` is seconds.
    """

    inode: tuple[int, int]
    size: int
    times: tuple[int, int]
    written: float


def _state(path: Path) -> _State | None:
    """None if there is no file."""
    try:
        status = path.stat()
    except OSError:
        return None
    return _State((status.st_dev, status.st_ino), status.st_size, (status.st_mtime_ns, status.st_ctime_ns), status.st_mtime)


def _parse(row: dict[str, Any]) -> Key:
    """Parse an entry. Raises ValueError, TypeError or KeyError if it is malformed."""
    key = Key(row["name"], row["sha256"], tuple(row["scopes"]), row["created"])
    datetime.fromisoformat(key.created)
    if not _NAME.fullmatch(key.name) or not _HASH.fullmatch(key.sha256) or not key.scopes or set(key.scopes) - set(SCOPES):
        raise ValueError("not a key")
    return key


def add_key(path: Path, name: str, scopes: Sequence[str]) -> str:
    """Create a key, add it to the file (created if missing) and return the secret, which is stored nowhere.

    Raises RecipeError for an invalid name or scope, ArtifactError if the file cannot be read or written.
    """
    if not _NAME.fullmatch(name):
        raise RecipeError(
            "--name", f"{name[:100]!r}", allowed="up to 100 letters, digits, . _ @ -, starting with a letter or digit"
        )
    if not scopes or set(scopes) - set(SCOPES):
        raise RecipeError("scopes", ", ".join(scopes) or "none", allowed=", ".join(SCOPES))
    with _locked(path):
        keys = Keys.read(path).keys if path.exists() else ()
        if name in (key.name for key in keys):
            raise RecipeError("--name", f'a key named "{name}" exists', do="choose another name, or revoke that key first")
        secret = f"pt-{secrets.token_urlsafe(32)}"
        digest = hashlib.sha256(secret.encode()).hexdigest()
        created = datetime.now(UTC).isoformat(timespec="seconds")
        _write(path, (*keys, Key(name, digest, tuple(scopes), created)))
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Remove a key from the file. Raises RecipeError for an unknown name, ArtifactError as `Keys.read` does."""
    with _locked(path):
        keys = Keys.read(path).keys
        remaining = tuple(key for key in keys if key.name != name)
        if len(remaining) == len(keys):
            raise RecipeError("NAME", f"no key {name[:100]!r}", allowed=f"there is: {', '.join(key.name for key in keys)}")
        _write(path, remaining)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Lock the folder against other key changes. The file itself is replaced, so it cannot carry the lock."""
    try:
        folder = os.open(path.parent, os.O_RDONLY)
    except OSError as error:
        raise _unwritable(path, error) from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _unwritable(path: Path, error: OSError) -> ArtifactError:
    return ArtifactError(str(path), f"cannot be written ({error.strerror})", do="name a file in a folder that you can write to")


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Replace the file atomically. mkstemp creates mode 600, so others can never read it."""
    text = json.dumps({"keys": [key._asdict() for key in keys]}, indent=2) + "\n"
    try:
        handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        try:
            with open(handle, "w", encoding="utf-8") as file:
                file.write(text)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            os.unlink(temporary)
            raise
        fsync_folder(path.parent)
    except OSError as error:
        raise _unwritable(path, error) from None
