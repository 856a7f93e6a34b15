"""The API keys of a server: a JSON file that holds of each key its sha256, its name, what it may do and since when.

A key is a random token of 256 bits that is shown once, when it is made. Its hash needs no salt and no slow function: those
protect passwords, which can be guessed; 2^256 tokens cannot, and a slow hash would let anyone keep the server busy with
wrong keys. No torch here: a key is made at once.

A running server reads its file again once it has changed (`KeyFile`), so that a key that is revoked opens nothing any more.

Left out: keys that expire, and keys in a database.
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
# A file may change again within one tick of its file system's clock: what was written this lately is read at every request.
_TICK_SECONDS = 2.0
_LOG = logging.getLogger(__name__)


class Key(NamedTuple):
    """One key as it lies in the file."""

    name: str
    sha256: str
    scopes: tuple[str, ...]
    created: str


class Keys(NamedTuple):
    """The keys of a file."""

    keys: tuple[Key, ...]

    @classmethod
    def read(cls, path: Path) -> "Keys":
        """The keys of a file. Raises ArtifactError where it is not one, or is open to other users of the machine."""
        where = str(path)
        try:
            # A pipe is opened without waiting for who writes into it, and then refused.
            with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
                mode = os.fstat(file.fileno()).st_mode
                data = file.read() if stat.S_ISREG(mode) else b""
        except OSError as error:
            raise ArtifactError(where, f"cannot be read ({error.strerror})", do="make it with `posttrain keys add`") from None
        if mode & 0o077:
            raise ArtifactError(where, f"mode {stat.S_IMODE(mode):o}", allowed="600: its owner alone", do=f"chmod 600 {path}")
        try:
            rows = json.loads(data)["keys"]
            keys = tuple(_parse(row) for row in rows)
        except (ValueError, TypeError, KeyError, RecursionError):
            raise ArtifactError(where, "not a file of keys", do="make another one with `posttrain keys add`") from None
        if len({key.name for key in keys}) < len(keys):
            raise ArtifactError(where, "two keys of one name", do="remove one of them")
        return cls(keys)

    def check(self, presented: str) -> Key | None:
        """The key that a client presents, or None. Takes the same time whichever it is, or none."""
        digest = hashlib.sha256(presented.encode(errors="replace")).hexdigest()
        found = None
        for key in self.keys:
            if hmac.compare_digest(key.sha256, digest):
                found = key
        return found


class KeyFile:
    """The keys of a file as it is now. One that cannot be read any more leaves the keys in force that were read last.

    Raises ArtifactError as `Keys.read` does where it cannot be read at the start.
    """

    def __init__(self, path: Path) -> None:
        self._path, self._seen, self._told = path, _state(path), False
        self._keys = Keys.read(path)

    def check(self, presented: str) -> Key | None:
        """As `Keys.check`, of the keys that the file has now."""
        state = _state(self._path)
        if state != self._seen or (state is not None and abs(time.time() - state.written) < _TICK_SECONDS):
            self._told = self._told and state == self._seen
            self._seen = state
            self._read()
        return self._keys.check(presented)

    def _read(self) -> None:
        try:
            self._keys = Keys.read(self._path)
            self._told = False
        except ArtifactError as error:
            if not self._told:
                _LOG.warning("%s; the keys that were read last stay in force", error)
            self._told = True


class _State(NamedTuple):
    """What changes with a file: its place on disk, its length, and when it was written or renamed.

    `times` are nanoseconds, `written` is seconds.
    """

    place: tuple[int, int]
    size: int
    times: tuple[int, int]
    written: float


def _state(path: Path) -> _State | None:
    """None where there is no file."""
    try:
        found = path.stat()
    except OSError:
        return None
    return _State((found.st_dev, found.st_ino), found.st_size, (found.st_mtime_ns, found.st_ctime_ns), found.st_mtime)


def _parse(row: dict[str, Any]) -> Key:
    """Raises ValueError, TypeError or KeyError for what is not a key."""
    key = Key(row["name"], row["sha256"], tuple(row["scopes"]), row["created"])
    datetime.fromisoformat(key.created)
    if not _NAME.fullmatch(key.name) or not _HASH.fullmatch(key.sha256) or not key.scopes or set(key.scopes) - set(SCOPES):
        raise ValueError("not a key")
    return key


def add_key(path: Path, name: str, scopes: Sequence[str]) -> str:
    """Make a key and write it into a file, which is made where there is none; returns the secret, which is kept nowhere.

    Raises RecipeError for a name or a scope that cannot be, ArtifactError where the file cannot be read or written.
    """
    if not _NAME.fullmatch(name):
        raise RecipeError("--name", f"{name[:100]!r}", allowed="up to 100 letters, digits, . _ @ -, first no sign")
    if not scopes or set(scopes) - set(SCOPES):
        raise RecipeError("scopes", ", ".join(scopes) or "none", allowed=", ".join(SCOPES))
    with _locked(path):
        keys = Keys.read(path).keys if path.exists() else ()
        if name in (key.name for key in keys):
            raise RecipeError("--name", f'"{name}" has a key', do="choose another name, or revoke that key first")
        secret = f"pt-{secrets.token_urlsafe(32)}"
        digest = hashlib.sha256(secret.encode()).hexdigest()
        created = datetime.now(UTC).isoformat(timespec="seconds")
        _write(path, (*keys, Key(name, digest, tuple(scopes), created)))
    return secret


def revoke_key(path: Path, name: str) -> None:
    """Take a key out of a file. Raises RecipeError where it has none of that name, ArtifactError as `Keys.read` does."""
    with _locked(path):
        keys = Keys.read(path).keys
        left = tuple(key for key in keys if key.name != name)
        if len(left) == len(keys):
            raise RecipeError("NAME", f"no key {name[:100]!r}", allowed=f"there is: {', '.join(key.name for key in keys)}")
        _write(path, left)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Others who change keys in this folder wait; the file itself is replaced, so the lock lies on the folder."""
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
    return ArtifactError(str(path), f"cannot be written ({error.strerror})", do="name a file in a folder of your own")


def _write(path: Path, keys: tuple[Key, ...]) -> None:
    """Whole or not at all, and never readable by others: a temporary file begins with mode 600."""
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
