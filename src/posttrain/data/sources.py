"""Where rows come from: JSON lines, JSON, CSV, Parquet, a `save_to_disk` folder, a hub dataset id, or the starter data.

The only file that knows `datasets`, which is imported only for what the standard library cannot read. Rows leave here as
plain dicts with a number that a person can find again in the file. Remote code is never run.
"""

import csv
import hashlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import posttrain
from posttrain.artifacts import expand_home, hash_file
from posttrain.errors import DataError
from posttrain.settings import Source

STARTER = Path(posttrain.__file__).parent / "starter"
MAX_FIELD_BYTES = 10 * 2**20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]:%-]+)?")


class RawRow(NamedTuple):
    """One row as it stands in its file; `number` counts from 1, lines for JSON lines."""

    number: int
    value: dict[str, Any]


def as_sources(data: str | tuple[Source, ...]) -> tuple[Source, ...]:
    """The recipe's `data` as a list of sources."""
    return (Source(path=data),) if isinstance(data, str) else data


def locate(path: str) -> Path | None:
    """The file or folder that a path names; None for a hub id. Raises DataError where there is neither."""
    if path.startswith("starter/"):
        found = STARTER / path.removeprefix("starter/")
        if not found.resolve().is_relative_to(STARTER) or not found.is_file():
            there = ", ".join(sorted(f"starter/{p.name}" for p in STARTER.glob("*.jsonl")))
            raise DataError(f'data "{path}"', "no such starter file", allowed=f"there is: {there}")
        return found
    local = expand_home(path)
    if local.exists():
        return local
    if local.suffix in (".jsonl", ".json", ".csv", ".parquet") or not _HUB_ID.fullmatch(path):
        raise DataError(
            f'data "{path}"', f"there is no such file (looked in {local.absolute().parent})", do="correct the path",
            allowed="a file (.jsonl .json .csv .parquet), a save_to_disk folder, a hub id org/name, or starter/<file>",
        )  # fmt: skip
    return None


def data_hashes(data: str | tuple[Source, ...]) -> dict[str, str]:
    """sha256 of every source's bytes by path; a hub id stands for itself, since its bytes are not here yet."""
    found = {}
    for source in as_sources(data):
        place = locate(source.path)
        if place is None:
            found[source.path] = f"hub:{source.path}"
        elif place.is_file():
            found[source.path] = hash_file(place)
        else:
            files = sorted(p for p in place.rglob("*") if p.is_file())
            joined = "".join(f"{p.relative_to(place)}:{hash_file(p)};" for p in files)
            found[source.path] = hashlib.sha256(joined.encode(errors="surrogateescape")).hexdigest()
    return found


def read_rows(path: str) -> list[RawRow]:
    """Every row of one source. Raises DataError, with the place, for whatever cannot be read."""
    place = locate(path)
    if place is None:
        rows = _from_hub(path)
    elif place.is_dir():
        rows = _from_folder(path, place)
    elif place.suffix in (".parquet", ".arrow"):
        rows = _from_table(path, place)
    else:
        rows = list(_READERS.get(place.suffix, _json_lines)(path, place))
    if not rows:
        raise DataError(f'data "{path}"', "no rows", do="give a file with at least one row")
    for row in rows:
        _check_sizes(path, row)
    return rows


def _check_sizes(path: str, row: RawRow) -> None:
    for column, value in row.value.items():
        size = _characters(value)
        if size > MAX_FIELD_BYTES:
            raise DataError(
                f'data "{path}" · row {row.number}', f'"{column}" holds {size / 2**20:.0f} MB',
                allowed=f"at most {MAX_FIELD_BYTES // 2**20} MB a field", do="remove or cut the row",
            )  # fmt: skip


def _characters(value: Any) -> int:
    """Characters of a text, or of all texts inside a value."""
    total = 0
    waiting = [value]
    while waiting:
        part = waiting.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, list):
            waiting += part
        elif isinstance(part, dict):
            waiting += part.values()
    return total


def _text(path: str, place: Path) -> str:
    try:
        return place.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = place.read_bytes()[: error.start].count(b"\n") + 1
        raise DataError(
            f'data "{path}" · line {line}', f"not UTF-8 (byte {error.start})", do="save the file as UTF-8"
        ) from None
    except OSError as error:
        raise DataError(f'data "{path}"', error.strerror or str(error), do="make it readable") from None


def _json_lines(path: str, place: Path) -> Iterator[RawRow]:
    for number, line in enumerate(_text(path, place).split("\n"), 1):
        if not line.strip():
            continue
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = str(error).split(":")[0]
            raise DataError(
                f'data "{path}" · line {number}', f"not JSON ({reason})", do="write one JSON object a line"
            ) from None
        yield RawRow(number, _object(path, number, value))


def _json(path: str, place: Path) -> Iterator[RawRow]:
    text = _text(path, place)
    try:
        values = json.loads(text)
    except (ValueError, RecursionError):
        yield from _json_lines(path, place)  # JSON lines under the name .json are common
        return
    if isinstance(values, dict):
        values = [values]  # JSON lines of one line
    if not isinstance(values, list):
        raise DataError(f'data "{path}"', f"a JSON {type(values).__name__}", allowed="a list of objects, or one object a line")
    for number, value in enumerate(values, 1):
        yield RawRow(number, _object(path, number, value))


def _object(path: str, number: int, value: Any) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f'data "{path}" · row {number}', f"a {type(value).__name__}", allowed="a JSON object", do="correct the row"
        )
    return value


def _csv(path: str, place: Path) -> Iterator[RawRow]:
    csv.field_size_limit(MAX_FIELD_BYTES * 4)
    # Not `splitlines`, which also cuts at characters that a cell may hold (a form feed, U+2028).
    reader = csv.DictReader(io.StringIO(_text(path, place), newline=""))
    number = 0
    try:
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise DataError(
                    f'data "{path}" · row {number}', "another number of fields than the header", do="correct the row"
                )
            yield RawRow(number, {key: _maybe_messages(value) for key, value in row.items()})
    except csv.Error as error:
        raise DataError(f'data "{path}" · row {number + 1}', f"not CSV ({error})", do="correct the row") from None


def _maybe_messages(value: str) -> Any:
    """A cell that holds a JSON list of objects (messages) is that list; every other cell is its text."""
    if value.lstrip()[:1] == "[":
        try:
            found = json.loads(value)
        except (ValueError, RecursionError):
            return value
        return found if found and all(isinstance(turn, dict) for turn in found) else value
    return value


_READERS = {".jsonl": _json_lines, ".ndjson": _json_lines, ".json": _json, ".csv": _csv}


def _from_table(path: str, place: Path) -> list[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.read_table(place)
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f'data "{path}"', f"not a Parquet file ({str(error)[:80]})", do="write it again") from None
    return [RawRow(number, dict(row)) for number, row in enumerate(table.to_pylist(), 1)]


def _from_folder(path: str, place: Path) -> list[RawRow]:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(place))
    except (OSError, ValueError, KeyError) as error:
        raise DataError(
            f'data "{path}"',
            f"not a folder of datasets' save_to_disk ({str(error)[:80]})",
            do="name a file inside it instead",
        ) from None
    return _of_dataset(path, loaded, "train")


def _from_hub(path: str) -> list[RawRow]:
    import datasets

    name, _, split = path.partition(":")
    try:
        loaded = datasets.load_dataset(name, split=split or None)
    except Exception as error:  # noqa: BLE001 - the hub's errors have no common ancestor
        raise DataError(
            f'data "{path}"', f"cannot be fetched from the hub ({type(error).__name__}: {str(error).splitlines()[0][:120]})",
            do="check the id and the network, or give a local file",
        ) from None  # fmt: skip
    return _of_dataset(path, loaded, split or "train")


def _of_dataset(path: str, loaded: Any, split: str) -> list[RawRow]:
    if isinstance(loaded, dict):
        if split not in loaded:
            raise DataError(
                f'data "{path}"',
                f'no split "{split}"',
                allowed=f"there is: {', '.join(loaded)}",
                do="write org/name:split",
            )
        loaded = loaded[split]
    return [RawRow(number, dict(row)) for number, row in enumerate(loaded, 1)]
