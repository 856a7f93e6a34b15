"""Rows come out the same from every kind of file; a file that cannot be read is refused with its place."""
# ruff: noqa: E501 - a row of a table stays one line

import json
from pathlib import Path
from typing import Any

import datasets
import pyarrow
import pyarrow.parquet
import pytest

from posttrain.data.sources import MAX_FIELD_BYTES, data_hashes, locate, read_rows, read_source
from posttrain.errors import DataError

ROWS: list[dict[str, Any]] = [
    {"prompt": 'What, "quoted"?', "completion": "Line one\nline two"},
    {"prompt": "Form\x0cfeed, \u2028 and \x85 next line", "completion": "[1, 2]"},
    {"prompt": "é 漢 🙂", "completion": "=1+1"},
]
TALK: list[dict[str, Any]] = [{"messages": [{"role": "user", "content": "a, b"}, {"role": "assistant", "content": "c"}]}]


def jsonl(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def indented(path: Path, rows: list[dict[str, Any]]) -> None:
    path.write_text(json.dumps(rows, indent=1), encoding="utf-8")


def csv_file(path: Path, rows: list[dict[str, Any]]) -> None:
    def cell(value: Any) -> str:
        text = value if isinstance(value, str) else json.dumps(value)
        return '"' + text.replace('"', '""') + '"' if any(c in text for c in '",\n') else text

    lines = [",".join(rows[0]), *(",".join(cell(v) for v in row.values()) for row in rows)]
    path.write_bytes(("\ufeff" + "\r\n".join(lines) + "\r\n").encode())


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)


def saved(path: Path, rows: list[dict[str, Any]]) -> None:
    datasets.Dataset.from_list(rows).save_to_disk(str(path))


def saved_splits(path: Path, rows: list[dict[str, Any]]) -> None:
    both = {"train": datasets.Dataset.from_list(rows), "test": datasets.Dataset.from_list(rows[:1])}
    datasets.DatasetDict(both).save_to_disk(str(path))


WRITERS = {
    "rows.jsonl": jsonl, "rows.ndjson": jsonl, "lines.json": jsonl, "list.json": indented, "rows.csv": csv_file, "rows.parquet": parquet,
    "folder": saved, "splits": saved_splits,
}  # fmt: skip


@pytest.mark.parametrize("name", WRITERS)
@pytest.mark.parametrize("rows", [ROWS, TALK], ids=["text", "messages"])
def test_every_kind_of_file_gives_the_same_rows(tmp_path: Path, name: str, rows: list[dict[str, Any]]):
    WRITERS[name](tmp_path / name, rows)
    read = read_rows(str(tmp_path / name))
    assert [row.value for row in read] == rows
    assert [row.number for row in read] == list(range(1, len(rows) + 1))


def test_blank_lines_do_not_shift_line_numbers(tmp_path: Path):
    (tmp_path / "a.jsonl").write_text('\n{"a": 1}\r\n\n  \n{"a": 2}', encoding="utf-8")
    assert [row.number for row in read_rows(str(tmp_path / "a.jsonl"))] == [2, 5]


def test_starter_data_is_found_by_name():
    assert len(read_rows("starter/demonstrations.jsonl")) >= 300
    with pytest.raises(
        DataError, match=r"no such starter file · there is: starter/demonstrations.jsonl, starter/preferences.jsonl"
    ):
        locate("starter/nothing.jsonl")
    with pytest.raises(DataError, match="no such starter file"):
        locate("starter/../recipe.py")


def test_hashes_follow_the_bytes(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    jsonl(path, ROWS)
    saved(tmp_path / "folder", ROWS)
    before = data_hashes(str(path)) | data_hashes(str(tmp_path / "folder"))
    assert before == data_hashes(str(path)) | data_hashes(str(tmp_path / "folder"))
    jsonl(path, ROWS[:2])
    (tmp_path / "folder" / "more").write_text("x", encoding="utf-8")
    after = data_hashes(str(path)) | data_hashes(str(tmp_path / "folder"))
    assert all(before[name] != after[name] for name in before)
    assert data_hashes("org/name") == {"org/name": "hub:org/name"}


def test_columns_that_nobody_reads_may_hold_anything(tmp_path: Path):
    beyond = pyarrow.array([2534023008000000000] * 2, type=pyarrow.timestamp("us"))
    others = {
        "year": beyond,
        "zone": pyarrow.array([1, 2], type=pyarrow.timestamp("us", tz="Mars/Olympus")),
        "nested": pyarrow.array(
            [[{"t": 1}], None], type=pyarrow.list_(pyarrow.struct([("t", pyarrow.timestamp("ns", tz="x"))]))
        ),
        "nanoseconds": pyarrow.array([1, 2], type=pyarrow.duration("ns")),
        "big": pyarrow.array(["x" * (MAX_FIELD_BYTES + 1), ""]),
    }
    table = pyarrow.table({"prompt": ["q", "r"], "completion": ["a", "b"], **others})
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    datasets.Dataset(table.select(["prompt", "completion", "year", "big"])).save_to_disk(str(tmp_path / "folder"))
    for name in ("a.parquet", "folder"):
        rows = read_rows(str(tmp_path / name))
        assert [(row.value["prompt"], row.value["completion"]) for row in rows] == [("q", "a"), ("r", "b")]
        assert {"year", "big"} <= rows[0].value.keys()
    unread = json.dumps({"prompt": "q", "completion": "a", "raw": "x" * (MAX_FIELD_BYTES + 1)})
    (tmp_path / "a.jsonl").write_text(unread, encoding="utf-8")
    assert len(read_rows(str(tmp_path / "a.jsonl"))) == 1


def test_a_column_that_is_read_may_hold_times_beside_its_texts(tmp_path: Path):
    turn = pyarrow.struct(
        [("role", pyarrow.string()), ("content", pyarrow.string()), ("at", pyarrow.timestamp("us", tz="x/y"))]
    )
    turns = [[{"role": "user", "content": "q", "at": 2534023008000000000}, {"role": "assistant", "content": "a", "at": None}]]
    table = pyarrow.table(
        {"messages": pyarrow.array(turns, type=pyarrow.list_(turn)), "reason": pyarrow.array([5], pyarrow.date64())}
    )
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    (row,) = read_rows(str(tmp_path / "a.parquet"))
    assert [turn["content"] for turn in row.value["messages"]] == ["q", "a"]


def test_two_columns_of_one_name_are_refused_where_they_are_read(tmp_path: Path):
    (tmp_path / "a.csv").write_text("prompt,completion,completion\nq,FIRST,SECOND\n", encoding="utf-8")
    names = ["prompt", "completion", "completion"]
    table = pyarrow.Table.from_arrays([pyarrow.array(["q"])] * 3, names=names)
    pyarrow.parquet.write_table(table, tmp_path / "a.parquet")
    for name in ("a.csv", "a.parquet"):
        with pytest.raises(DataError, match='two columns named "completion" · rename or remove one of them'):
            read_rows(str(tmp_path / name))
    (tmp_path / "b.csv").write_text("prompt,completion,,\nq,a,,\n", encoding="utf-8")  # a sheet's empty columns
    assert read_rows(str(tmp_path / "b.csv"))[0].value["completion"] == "a"


@pytest.mark.parametrize("name", WRITERS)
def test_the_hash_is_that_of_the_bytes_that_were_read(tmp_path: Path, name: str):
    path = tmp_path / name
    WRITERS[name](path, ROWS)
    assert read_source(str(path)).sha256 == data_hashes(str(path))[str(path)]


def test_a_folder_that_changes_while_it_is_read_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    saved(tmp_path / "folder", ROWS)
    load_from_disk = datasets.load_from_disk

    def slowly(path: str) -> Any:
        loaded = load_from_disk(path)
        (tmp_path / "folder" / "more").write_text("x", encoding="utf-8")
        return loaded

    monkeypatch.setattr(datasets, "load_from_disk", slowly)
    with pytest.raises(DataError, match="was changed while it was read"):
        read_source(str(tmp_path / "folder"))


# --- what cannot be read: where · found · allowed · do ----------------------------------------------------------------

BAD_FILES: dict[str, tuple[str, bytes, str]] = {
    "empty": ("a.jsonl", b"", '" · no rows · give a file with at least one row'),
    "only blank lines": ("a.jsonl", b"\n \n", '" · no rows'),
    "empty list": ("a.json", b"[]", '" · no rows'),
    "header only": ("a.csv", b"prompt,completion\r\n", '" · no rows'),
    "invalid UTF-8": (
        "a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', '" · line 2 · not UTF-8 text (byte 16) · save the file as UTF-8',
    ),
    "UTF-16": ("a.csv", "prompt,completion\n".encode("utf-16"), '" · line 1 · not UTF-8 text (byte 0) · save the file as UTF-8'),
    "not JSON": ("a.jsonl", b'{"a": 1}\n{"a": \n', '" · line 2 · not JSON (Expecting value) · write one JSON object a line'),
    "plain text": ("a.txt", b"Hello there\n", '" · line 1 · not JSON (Expecting value) · write one JSON object a line'),
    "a list a line": ("a.jsonl", b"[1, 2]\n", '" · row 1 · a list · a JSON object · correct the row'),
    "a number in a list": ("a.json", b'[{"a": 1}, 3]', '" · row 2 · a int · a JSON object · correct the row'),
    "one JSON text": ("a.json", b'"text"', '" · a JSON str · a list of objects, or one object a line'),
    "endless brackets": ("a.jsonl", b"[" * 200_000, '" · line 1 · not JSON (maximum recursion depth exceeded'),
    "a missing cell": ("a.csv", b"prompt,completion\r\na,b\r\nc\r\n", '" · row 2 · another number of fields than the header · correct the row'),
    "a cell too many": ("a.csv", b"prompt,completion\r\na,b,c\r\n", '" · row 1 · another number of fields than the header · correct the row'),
    "a huge cell": ("a.csv", b"prompt,completion\na," + b"x" * (MAX_FIELD_BYTES * 4 + 1), '" · row 1 · not CSV (field larger than'),
    "10 MB in a field": (
        "a.jsonl", json.dumps({"prompt": "a", "completion": "x" * (MAX_FIELD_BYTES + 1)}).encode(),
        '" · row 1 · "completion" holds 10 MB · at most 10 MB a field · remove or cut the row',
    ),
    "10 MB in a message": (
        "a.jsonl", json.dumps({"messages": [{"role": "user", "content": "x" * (MAX_FIELD_BYTES + 1)}]}).encode(),
        '" · row 1 · "messages" holds 10 MB · at most 10 MB a field · remove or cut the row',
    ),
    "no Parquet": ("a.parquet", b"PAR1 and then nothing", '" · not a Parquet file ('),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_FILES)
def test_a_bad_file_is_refused_with_its_place(tmp_path: Path, name: str):
    file, content, message = BAD_FILES[name]
    (tmp_path / file).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(str(tmp_path / file))
    assert str(error.value).startswith(f'data "{tmp_path / file}{message}')


def test_a_missing_file_is_named_with_what_is_allowed(tmp_path: Path):
    with pytest.raises(DataError) as error:
        read_rows(str(tmp_path / "gone.jsonl"))
    assert str(error.value) == (
        f'data "{tmp_path}/gone.jsonl" · there is no such file (looked in {tmp_path}) · a file (.jsonl .json .csv .parquet), '
        "a save_to_disk folder, a hub id org/name, or starter/<file> · correct the path"
    )


def test_a_folder_that_is_no_dataset_is_refused(tmp_path: Path):
    (tmp_path / "notes.txt").write_text("x", encoding="utf-8")
    with pytest.raises(DataError, match=r"not a folder of datasets' save_to_disk .* name a file inside it instead"):
        read_rows(str(tmp_path))


def test_a_folder_without_the_split_names_those_there_are(tmp_path: Path):
    datasets.DatasetDict({"test": datasets.Dataset.from_list(ROWS)}).save_to_disk(str(tmp_path / "d"))
    with pytest.raises(DataError, match='no split "train" · there is: test'):
        read_rows(str(tmp_path / "d"))


def test_a_hub_id_without_a_network_is_refused():
    with pytest.raises(
        DataError, match=r"cannot be fetched from the hub .* check the id and the network, or give a local file"
    ):
        read_rows("nobody/posttrain-has-no-such-dataset:train")
