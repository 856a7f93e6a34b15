"""Read rows from JSON lines, JSON, CSV, Parquet, a `save_to_disk` folder, a hub dataset id, or the starter data.

This is the only module that imports `datasets`, and only for formats that the standard library cannot read. Rows are plain
dicts, each with its number in the file. Remote code is never run.
"""

import csv
import hashlib
import io
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import posttrain
from posttrain.artifacts import expand_home, hash_file
from posttrain.data import meaning
from posttrain.errors import DataError
from posttrain.reading import Unreadable, decode_text, json_lines, parse_json
from posttrain.settings import ROWS_OF, Data, Source, as_sources

STARTER = Path(posttrain.__file__).parent / "starter"
MAX_FIELD_BYTES = 10 * 2**20
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\[\]:%-]+)?")


# The columns that are read. Other columns may have any content.
COLUMNS = meaning.COLUMNS | {
    "messages", "prompt", "completion", "conversations", "instruction", "input", "output", "history", "text", "chosen",
    "rejected", "output_1", "output_2", "label", "id", "reason", "margin", "probability", "category", "subset",
    "author_1", "author_2", "chosen_author", "rejected_author",
}  # fmt: skip


class RawRow(NamedTuple):
    """One row as it is in its file. `number` counts from 1; for JSON lines it is the line."""

    number: int
    value: dict[str, Any]


class SourceRows(NamedTuple):
    """The rows of one source, and the sha256 of the bytes that they come from."""

    rows: list[RawRow]
    sha256: str


class Loaded(NamedTuple):
    """The sources of a stage, each with its rows."""

    sources: tuple[tuple[Source, SourceRows], ...]

    @property
    def columns(self) -> list[str]:
        """The columns of the first row."""
        return list(self.sources[0][1].rows[0].value)


def locate(path: str) -> Path | None:
    """The file or folder that a path names, or None for a hub id. Raises DataError if it is neither."""
    if path.startswith("starter/"):
        file = STARTER / path.removeprefix("starter/")
        if not file.resolve().is_relative_to(STARTER) or not file.is_file():
            there = ", ".join(sorted(f"starter/{p.name}" for p in STARTER.glob("*.jsonl")))
            raise DataError(f'data "{path}"', "no such starter file", allowed=f"there is: {there}")
        return file
    if path.startswith(ROWS_OF):
        raise DataError(f'data "{path}"', "rows of a stage outside of a run", do="name the file rows.jsonl in the run folder")
    local = expand_home(path)
    if local.exists():
        return local
    if local.suffix in (".jsonl", ".json", ".csv", ".parquet") or not _HUB_ID.fullmatch(path):
        raise DataError(
            f'data "{path}"', f"there is no such file (looked in {local.absolute().parent})", do="correct the path",
            allowed="a file (.jsonl .json .csv .parquet), a save_to_disk folder, a hub id org/name, or starter/<file>",
        )  # fmt: skip
    return None


def data_hashes(data: Data, known: dict[str, str] | None = None) -> dict[str, str]:
    """sha256 of the bytes of every source by path. For a hub id it is the id, because its bytes are not local yet.
    Rows of an earlier stage are left out, because the fingerprint of that stage covers them.

    Paths in `known` are not hashed again; new hashes are added to it. Raises DataError for a file that cannot be opened.
    """
    hashes = {} if known is None else known
    paths = [source.path for source in as_sources(data) if source.stage is None]
    for path in paths:
        if path not in hashes:
            hashes[path] = _hash(path, locate(path))
    return {path: hashes[path] for path in paths}


def _hash(path: str, place: Path | None) -> str:
    if place is None:
        return f"hub:{path}"
    try:
        if place.is_file():
            return hash_file(place)
        files = sorted(p for p in place.rglob("*") if p.is_file())
        joined = "".join(f"{p.relative_to(place)}:{hash_file(p)};" for p in files)
    except OSError as error:
        raise _cannot_open(path, error) from None
    return hashlib.sha256(joined.encode(errors="surrogateescape")).hexdigest()


def hashes_in(report: Mapping[str, Any]) -> dict[str, str]:
    """sha256 by path of the sources in a data report."""
    sources = [*report["sources"], *report.get("ptx", {}).get("sources", [])]
    return {source["path"]: source["sha256"] for source in sources}


def refuse_changed(read: Mapping[str, str], planned: Mapping[str, str]) -> None:
    """Compare the hashes of the data that was read with those in the plan. Raises DataError if they differ."""
    for path, digest in read.items():
        if planned.get(path, digest) != digest:
            raise DataError(
                f'data "{path}"', "was changed during the run: it differs from the data in the plan",
                do="run the same command again; steps that depend on the file are run again",
            )  # fmt: skip


def load(data: Data) -> Loaded:
    """Read every source of a stage once. Raises DataError, with the place, for data that cannot be read."""
    return Loaded(tuple((source, read_source(source.path, file=source.file)) for source in as_sources(data)))


def read_rows(path: str) -> list[RawRow]:
    """Every row of one source. Raises DataError, with the place, for data that cannot be read."""
    return read_source(path).rows


def read_source(path: str, *, file: Path | None = None) -> SourceRows:
    """Every row of one source, with the hash of the bytes that they come from. `file` is the file of a source `stage:NAME`.

    Raises DataError, with the place, for data that cannot be read.
    """
    place = locate(path) if file is None else file
    digest = _hash(path, None)
    if place is None:
        rows = _from_hub(path)
    elif place.is_dir():
        digest = _hash(path, place)
        rows = _from_folder(path, place)
        if _hash(path, place) != digest:
            raise DataError(f'data "{path}"', "was changed while it was read", do="run the same command again")
    else:
        data = _bytes(path, place)
        digest = hashlib.sha256(data).hexdigest()
        rows = list(_READERS.get(place.suffix, _json_lines)(path, data))
    if not rows:
        raise DataError(f'data "{path}"', "no rows", do="give a file with at least one row")
    for row in rows:
        _check_sizes(path, row)
    return SourceRows(rows, digest)


def _bytes(path: str, place: Path) -> bytes:
    try:
        return place.read_bytes()
    except OSError as error:
        raise _cannot_open(path, error) from None


def _cannot_open(path: str, error: OSError) -> DataError:
    return DataError(f'data "{path}"', error.strerror or str(error), do="make it readable")


def _check_sizes(path: str, row: RawRow) -> None:
    for column in COLUMNS & row.value.keys():
        size = _characters(row.value[column])
        if size > MAX_FIELD_BYTES:
            raise DataError(
                f'data "{path}" · row {row.number}', f'"{column}" holds {size / 2**20:.0f} MB',
                allowed=f"at most {MAX_FIELD_BYTES // 2**20} MB a field", do="remove or cut the row",
            )  # fmt: skip


def _characters(value: Any) -> int:
    """Number of characters of a text, or of all texts inside a value."""
    total = 0
    pending = [value]
    while pending:
        part = pending.pop()
        if isinstance(part, str):
            total += len(part)
        elif isinstance(part, list):
            pending += part
        elif isinstance(part, dict):
            pending += part.values()
    return total


def _unreadable(path: str, bad: Unreadable, unit: str = "line") -> DataError:
    return DataError(f'data "{path}"' + (f" · {unit} {bad.line}" if bad.line else ""), bad.found, do=bad.do)


def _json_lines(path: str, data: bytes) -> Iterator[RawRow]:
    try:
        for number, value in json_lines(decode_text(data)):
            yield RawRow(number, _object(path, number, value))
    except Unreadable as bad:
        raise _unreadable(path, bad) from None


def _json(path: str, data: bytes) -> Iterator[RawRow]:
    try:
        values = parse_json(decode_text(data))
    except Unreadable as bad:
        if data.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"[":
            raise _unreadable(path, bad) from None
        yield from _json_lines(path, data)  # JSON lines under the name .json are common
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


def _csv(path: str, data: bytes) -> Iterator[RawRow]:
    try:
        text = decode_text(data)
    except Unreadable as bad:
        raise _unreadable(path, bad) from None
    csv.field_size_limit(MAX_FIELD_BYTES * 4)
    # Not `splitlines`, which also cuts at characters that a cell may hold (a form feed, U+2028).
    reader = csv.DictReader(io.StringIO(text, newline=""))
    number = 0
    try:
        _refuse_twice(path, reader.fieldnames or ())
        for number, row in enumerate(reader, 1):
            if None in row or None in row.values():
                raise DataError(
                    f'data "{path}" · row {number}', "another number of fields than the header", do="correct the row"
                )
            yield RawRow(number, {key: _maybe_messages(value) for key, value in row.items()})
    except csv.Error as error:
        raise DataError(f'data "{path}" · row {number + 1}', f"not CSV ({error})", do="correct the row") from None


def _refuse_twice(path: str, columns: Sequence[str]) -> None:
    """Raises DataError if two columns that are read have the same name, which is ambiguous."""
    twice = [name for name in dict.fromkeys(columns) if name in COLUMNS and columns.count(name) > 1]
    if twice:
        raise DataError(f'data "{path}"', f'two columns named "{twice[0]}"', do="rename or remove one of them")


def _maybe_messages(value: str) -> Any:
    """Parse a cell that contains a JSON list of objects (messages). Other cells are returned as text."""
    if value.lstrip()[:1] == "[":
        try:
            turns = parse_json(value)
        except Unreadable:
            return value
        return turns if turns and all(isinstance(turn, dict) for turn in turns) else value
    return value


def _parquet(path: str, data: bytes) -> Iterator[RawRow]:
    import pyarrow
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(pyarrow.BufferReader(data))
        _refuse_twice(path, file.schema_arrow.names)
        table = file.read()
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f'data "{path}"', f"not a Parquet file ({str(error)[:80]})", do="write it again") from None
    yield from _of_table(table)


def _of_table(table: Any) -> Iterator[RawRow]:
    """Rows of an Arrow table. Columns that are not read get None, because Python may be unable to represent their values."""
    columns = {
        name: _cells(table.column(index)) if name in COLUMNS else [None] * table.num_rows
        for index, name in enumerate(table.column_names)
    }
    for number, values in enumerate(zip(*columns.values(), strict=True), 1):
        yield RawRow(number, dict(zip(columns, values, strict=True)))


def _cells(column: Any) -> list[Any]:
    """The values of a column. Times and dates are converted to numbers, because they may be out of the range of Python."""
    import pyarrow

    try:
        return list(column.cast(_without_times(column.type)).to_pylist())
    except (pyarrow.ArrowException, ValueError, OverflowError):
        return [_cell(scalar) for scalar in column]


def _cell(scalar: Any) -> Any:
    import pyarrow

    try:
        return scalar.as_py()
    except (pyarrow.ArrowException, ValueError, OverflowError):
        return _NoPython()


class _NoPython:
    """A value that Python cannot represent. A row is refused if this cell is read as a text or a number."""


def _without_times(kind: Any) -> Any:
    """The type with an integer in place of every time or date."""
    import pyarrow

    if pyarrow.types.is_struct(kind):
        return pyarrow.struct([field.with_type(_without_times(field.type)) for field in kind])
    if pyarrow.types.is_list(kind):
        return pyarrow.list_(kind.value_field.with_type(_without_times(kind.value_type)))
    if pyarrow.types.is_large_list(kind):
        return pyarrow.large_list(kind.value_field.with_type(_without_times(kind.value_type)))
    return pyarrow.int64() if pyarrow.types.is_temporal(kind) else kind


_READERS = {
    ".jsonl": _json_lines,
    ".ndjson": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".arrow": _parquet,
}


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
    _refuse_twice(path, loaded.column_names)
    return list(_of_table(loaded.with_format("arrow")[:]))
