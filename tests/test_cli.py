"""The command: help with an example for every verb, and one line of error with exit code 2 for every mistake."""

import argparse
import io
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from posttrain import __version__
from posttrain.cli import build_parser, main
from tiny_runs import TINY, copied_run, finished_run


def verbs(parser: argparse.ArgumentParser, path: tuple[str, ...] = ()) -> dict[tuple[str, ...], argparse.ArgumentParser]:
    """Every verb and the verbs below it, by path."""
    found = {}
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for name, below in action.choices.items():
                found[(*path, name)] = below
                found |= verbs(below, (*path, name))
    return found


VERBS = verbs(build_parser())


def exit_code(arguments: list[str]) -> int:
    """What the shell would see."""
    try:
        return main(arguments)
    except SystemExit as left:
        return int(left.code or 0)


@pytest.mark.parametrize("path", VERBS, ids=" ".join)
def test_every_verb_has_help_with_an_example_that_parses(path: tuple[str, ...], capsys: pytest.CaptureFixture[str]):
    assert exit_code([*path, "--help"]) == 0
    text = capsys.readouterr().out
    example = text[text.index("example: ") + len("example: ") :].split("\n")[0]
    assert example.startswith(f"posttrain {' '.join(path)} ")
    build_parser().parse_args(example.split()[1:])
    for action in VERBS[path]._actions:
        assert action.help, f"{path}: {action.dest} has no help"


def test_the_verbs_are_those_of_the_design():
    assert {" ".join(path) for path in VERBS} == {
        "run", "report", "show", "compare", "audit", "chat", "serve", "evaluate", "merge", "export", "data", "data check",
        "constitution", "constitution check", "judge", "judge audit", "keys", "keys add", "keys list", "keys revoke",
    }  # fmt: skip


def test_version(capsys: pytest.CaptureFixture[str]):
    assert exit_code(["--version"]) == 0
    assert capsys.readouterr().out == f"posttrain {__version__}\n"


@pytest.fixture(scope="module")
def playground(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run, wrong files, and nothing that is right."""
    folder = tmp_path_factory.mktemp("playground")
    copied_run(folder / "run")
    (folder / "unfinished").mkdir()
    (folder / "unfinished" / "recipe.toml").write_text((finished_run() / "recipe.toml").read_text())
    (folder / "empty").mkdir()
    (folder / "empty.jsonl").write_text("")
    (folder / "bad.jsonl").write_text("{}\n{\n")
    (folder / "columns.jsonl").write_text('{"a": 1}\n')
    (folder / "words.txt").write_text("words")
    (folder / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}\n')
    (folder / "bad.toml").write_text("name = ")
    (folder / "suite.toml").write_text('name = "mine"\n')
    (folder / "pickled").mkdir()
    (folder / "pickled" / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    return folder


MISTAKES = """
|
runn|
--nope|
run|
run --nope|
run none.toml|none.toml · there is no file
run empty|empty is a folder
run bad.toml|bad.toml · not TOML
run words.txt|words.txt · not TOML
run bad.jsonl|bad.jsonl · not TOML
run TINY --set|
run TINY --set x|--set · "x" · STAGE.FIELD=VALUE
run TINY --set sft.lr=1|stage "sft" · unknown setting "lr"
run TINY --set nope.lr=1|"nope" is neither a stage nor a table
run TINY --set sft.batch=many|batch = 'many'
run TINY --until dop|--until · "dop" is not a stage · there is: sft, dpo, rm, ppo · did you mean "dpo"?
run TINY --until dop --dry-run|--until · "dop" is not a stage
run TINY --out words.txt|words.txt · a file is where a folder should be
run TINY --set sft.data=none.jsonl --out new|data "none.jsonl" · there is no such file
run TINY --set sft.data=columns.jsonl --out new|data "columns.jsonl"
run TINY --set base.model=pickled --out new|only pickle files (pytorch_model.bin)
run TINY --set evaluation.suites=["none"] --out new|"none" is not a suite
run TINY --set evaluation.suites=["suite.toml"] --out new|suite suite.toml · "task" is missing
report|
report none|none · not a run folder
report empty|empty · not a run folder
show|
show none|none
show empty|empty
show run/nope|run/nope
compare|
compare run/sft|
compare run/sft run/nope|run/nope
compare none/a none/b|none
chat|
chat none|neither a folder, a .gguf file, a package nor a hub id
chat run/nope|run/nope · no finished stage · there is: base, sft, dpo, ppo
chat unfinished/dpo|unfinished/dpo · no finished stage · there is: base
chat run/sft --compare base,nope|no stage "nope" · there is: base, sft, dpo, ppo
chat run/sft --temperature -1|
chat run/sft --temperature warm|
chat run/sft --temperature nan|
chat run/sft --max-new-tokens 0|
chat random:tiny --template nope|"nope"
chat package:nope|no package "nope"
chat none.gguf|there is no such file
evaluate|
evaluate none|neither a folder
evaluate run/sft --suite none|"none" is not a suite
evaluate run/sft --suite none.toml|there is no file none.toml
evaluate run/sft --limit -1|
evaluate run/sft --limit many|
merge|
merge run/sft|
merge run/nope --out new|run/nope · no finished stage
merge run/sft --out empty.jsonl|empty.jsonl
export|
export run/sft --to hf|
export run/sft --out new|
export run/sft --to onnx --out new|
export run/nope --to hf --out new|run/nope · no finished stage
export run/rm --to peft --out new|run/rm · is a reward model: it scores answers and writes none · there is: base, sft, dpo, ppo
export run/base --to hf --out new|the base itself has nothing to export
export run/sft --to ollama --out empty.jsonl|empty.jsonl · exists already
data|
data look|
data check|
data check none.jsonl|data "none.jsonl" · there is no such file
data check empty.jsonl|data "empty.jsonl" · no rows
data check bad.jsonl|data "bad.jsonl" · line 2 · not JSON
data check columns.jsonl|data "columns.jsonl" · columns a
data check latin.jsonl|data "latin.jsonl" · line 1 · not UTF-8
data check empty|data "empty"
data check starter/none.jsonl|no such starter file · there is: starter/demonstrations.jsonl
data check starter/../LICENSE|no such starter file
data check starter/demonstrations.jsonl --stage sft|--stage · "sft" without a recipe · add --recipe
data check starter/demonstrations.jsonl --recipe none.toml|none.toml · there is no file
data check starter/demonstrations.jsonl --recipe TINY --stage dpo|--stage · "dpo" for a file of demonstrations · there is: sft
data check starter/demonstrations.jsonl --model none|neither a folder
keys|
keys look|
keys add new.json|
keys add new.json --name a/b|--name · 'a/b'
keys add none/new.json --name ann|none/new.json · cannot be written
keys list none.json|none.json · cannot be read
keys list bad.jsonl|bad.jsonl · mode
keys revoke none.json ann|none.json · cannot be read
"""
LINES = [line.partition("|")[::2] for line in MISTAKES.strip("\n").split("\n")]


@pytest.mark.parametrize(("line", "message"), LINES, ids=[line or "nothing" for line, _ in LINES])
def test_a_mistake_is_one_line_of_error_and_exit_code_2(
    playground: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], line: str, message: str
):
    monkeypatch.chdir(playground)
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    before = sorted(p.name for p in playground.iterdir())
    assert exit_code([str(TINY) if word == "TINY" else word for word in line.split()]) == 2
    captured = capsys.readouterr()
    assert "Traceback" not in captured.err
    assert len([one for one in captured.err.splitlines() if "error: " in one]) == 1
    last = captured.err.splitlines()[-1]
    assert last.startswith("error: " if message else "posttrain")
    assert message in last
    assert sorted(p.name for p in playground.iterdir()) == before


def test_a_defect_of_ours_ends_with_1_and_a_traceback():
    code = "import sys, posttrain.cli as c; c._report = lambda o: 1 / 0; sys.exit(c.main(['report', 'x']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr


WAITING = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
import posttrain.cli as cli
cli._report = lambda options: (print("on", flush=True), time.sleep(60))
sys.exit(cli.main(["report", "x"]))
"""


def test_ctrl_c_where_nothing_needs_saving_ends_without_a_traceback():
    process = subprocess.Popen([sys.executable, "-c", WAITING], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "on\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=30)
    assert errors == "stopped\n"
    assert process.returncode == 130


def test_a_reader_that_goes_away_is_no_mistake():
    run = finished_run()
    process = subprocess.Popen(
        [sys.executable, "-m", "posttrain.cli", "run", str(TINY), "--out", str(run)],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    process.stdout.close()
    assert process.stderr is not None
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait() == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_onto_a_full_disk_is_a_clear_error():
    command = [sys.executable, "-m", "posttrain.cli", "run", str(TINY), "--out", str(finished_run())]
    with open("/dev/full", "w") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0].startswith("error: standard output · the disk is full")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("columns", [60, 100, 200])
def test_the_table_is_as_wide_as_the_terminal(
    columns: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    run = finished_run()
    capsys.readouterr()  # what making it printed
    monkeypatch.setenv("COLUMNS", str(columns))
    assert main(["run", str(TINY), "--out", str(run)]) == 0
    rules = [line for line in capsys.readouterr().out.splitlines() if line.startswith("─")]
    assert max(map(len, rules)) <= columns
    assert len(rules) == {60: 5, 100: 3, 200: 1}[columns]
