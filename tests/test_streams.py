"""Standard streams that are closed, full, not in UTF-8 or read by nobody: no verb ends in a traceback, and work is done."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain.artifacts import fingerprint, read_jsonl, write_json, write_jsonl
from posttrain.cli import main
from posttrain.data.sources import data_hashes

LATIN = "caf\udce9"  # as Python holds a Latin-1 name
COMMAND = [sys.executable, "-m", "posttrain.cli"]
RECIPE = """
name = "r"
[base]
model = "random:tiny"
template = "gemma"
dtype = "float32"
[adapter]
rank = 2
[[stage]]
kind = "sft"
name = "sft"
data = "data.jsonl"
batch = 4
validation = 0
[evaluation]
suites = ["s.toml"]
samples = ["Hi"]
sample_tokens = 2
"""


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a recipe and its data."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "s.toml").write_text('name = "s"\n[[task]]\nname = "p"\nanswer = "perplexity"\nitems = "t.jsonl"\n')
    (tmp_path / "t.jsonl").write_text('{"id": "a", "text": "One two three."}\n')
    rows = "".join(f'{{"prompt": "Name {i}", "completion": "Blue"}}\n' for i in range(4))
    (tmp_path / "data.jsonl").write_text(rows)
    return tmp_path


def shell(line: str, **environment: str) -> "subprocess.CompletedProcess[str]":
    """A command by the shell, which closes streams; `$P` is posttrain."""
    command = ["sh", "-c", line.replace("$P", f"{sys.executable} -m posttrain.cli")]
    return subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", env={**os.environ, **environment})


def test_a_run_whose_reader_has_ended_goes_on_in_silence(place: Path) -> None:
    """As by `2>&1 | head -1`."""
    run = subprocess.Popen([*COMMAND, "run", "r.toml", "--out", "run"], stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert run.stdout is not None
    assert run.stdout.readline() == b"checking the data\n"
    run.stdout.close()
    assert run.wait() == 0
    assert (place / "run/sft/manifest.json").exists()
    assert (place / "run/report.html").exists()


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_is_said_of_a_run_never_ends_it(place: Path) -> None:
    """Standard error on a full disk, and none of the three streams."""
    assert shell("$P run r.toml --out run 2> /dev/full").returncode == 0
    assert (place / "run/report.html").exists()
    assert shell("$P run r.toml --out run --set seed=1 <&- >&- 2>&-").returncode == 0


@pytest.mark.parametrize(
    "line",
    ["$P run --help", "$P show none", "$P data check data.jsonl --template gemma", "$P keys list none.json", "$P nonsense"],
)
def test_a_closed_stream_is_no_defect(line: str, place: Path) -> None:
    whole = shell(line)
    for closed in ("<&-", ">&-", "2>&-"):
        done = shell(f"{line} {closed}")
        assert done.returncode == whole.returncode != 1, done.stderr
        assert "Traceback" not in done.stderr
        if closed != ">&-":
            assert done.stdout == whole.stdout


def test_a_chat_without_input_ends_at_once(place: Path) -> None:
    done = shell("$P chat random:tiny --template gemma <&-")
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.parametrize(
    "arguments",
    [
        ("data", "check", f"{LATIN}.jsonl"), ("run", f"{LATIN}.toml"), ("run", "r.toml", "--out", LATIN),
        ("run", "r.toml", "--set", f"sft.data={LATIN}"), ("chat", "random:tiny", "--system", LATIN), ("show", LATIN),
        ("evaluate", "random:tiny", "--suite", LATIN), ("keys", "add", "k.json", "--name", LATIN), (LATIN,),
    ],
)  # fmt: skip
def test_an_argument_that_is_not_utf_8_is_refused_by_name(
    arguments: tuple[str, ...], place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: posttrain · the argument ")
    assert r"caf\xe9" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(
    "environment", [{"LC_ALL": "C"}, {"PYTHONIOENCODING": "ascii"}, {"PYTHONUTF8": "0", "LC_ALL": "POSIX"}]
)
def test_a_terminal_without_utf_8_shows_what_it_can(environment: dict[str, str], place: Path) -> None:
    done = shell("$P run r.toml --dry-run", **environment)
    assert done.returncode == 0, done.stderr
    assert "sft" in done.stdout


def test_a_name_in_a_folder_of_data_that_is_not_utf_8_counts_as_any_other(place: Path) -> None:
    (place / "data").mkdir()
    empty = data_hashes("data")
    (place / "data" / LATIN).touch()
    assert data_hashes("data") != empty


def test_json_holds_any_name(tmp_path: Path) -> None:
    """A file that this package writes is UTF-8, and gives the name back."""
    path = tmp_path / "a.jsonl"
    write_jsonl(path, [{LATIN: "ä"}])
    assert path.read_text(encoding="utf-8") == '{"caf\\udce9": "ä"}\n'
    assert list(read_jsonl(path)) == [{LATIN: "ä"}]
    write_json(tmp_path / "a.json", LATIN)
    assert len(fingerprint(LATIN)) == 16
    assert fingerprint(LATIN) != fingerprint(LATIN.replace("\udce9", "é"))
