"""Reward functions in a process of their own: what they are given, what they may return, and how to get them wrong."""

import json
import os
from pathlib import Path

import pytest
from planted_rewards import SECRET, share
from tiny_stages import preferences, rows_of

from posttrain.artifacts import hash_file
from posttrain.cli import main
from posttrain.errors import Interrupted, RecipeError, TrainingError
from posttrain.judge.function_source import source_hash
from posttrain.judge.functions import FunctionWorker, check_function
from posttrain.stop import StopSignal


@pytest.fixture(autouse=True)
def found_by_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Reward functions of tests are found as a user's are: by PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(Path(__file__).parent))


def call(function: str, completions: list[str], timeout: float = 30.0) -> list[float]:
    worker = FunctionWorker(f"planted_rewards:{function}", timeout=timeout, where='stage "ppo"')
    try:
        return worker.score(["a prompt"] * len(completions), completions, where='stage "ppo", iteration 4')
    finally:
        worker.close()


def test_a_function_gets_prompts_and_completions_and_may_print() -> None:
    texts = ["abc", "ABC", "", "ünï\n\x00"]
    assert call("proxy", texts) == share(texts)
    assert call("short", texts) == [-3.0, -3.0, 0.0, -5.0], "whole numbers will do"
    assert call("asks", texts) == [8.0] * 4
    assert call("reads_input", texts) == [0.0] * 4, "there is none"


def test_a_function_may_use_up_its_lists_and_return_numbers_of_any_library() -> None:
    texts = ["abc", "ABC", "", "ünï\n\x00"]
    assert call("empties", texts) == [3.0, 3.0, 0.0, 5.0]
    assert call("array", texts) == [3.0, 3.0, 0.0, 5.0]
    assert call("of_libraries", ["a"] * 7) == [1.0] * 7


@pytest.mark.parametrize(
    "function, found",
    [
        ("raises", r"raised ValueError at planted_rewards.py:\d+, first at completion 3 of 4"),
        ("not_a_number", "returned nan, first at completion 3 of 4"),
        ("infinite", "returned inf, first at completion 3 of 4"),
        ("nothing", "returned a NoneType that is no finite number, first at completion 3 of 4"),
        ("too_few", "returned 3 scores for 4 completions, first at completion 4 of 4"),
        ("one_number", "returned a float"),
        ("raises_late", r"raised ValueError at planted_rewards.py:\d+, first at completion 3 of 4"),
        ("endless", "returned more than 4 scores for 4 completions"),
        ("too_large", "returned a int that is no finite number, first at completion 3 of 4"),
        ("unordered", "returned a set"),
        ("dies", r"ended its process \(exit code 7\)"),
        ("appends", "returned more than 4 scores for 4 completions"),
        ("leaves_one", "returned 1 scores for 4 completions, first at completion 2 of 4"),
        ("empties_and_raises", r"raised ValueError at planted_rewards.py:\d+, first at completion 3 of 4"),
        ("nested", "returned a list that is no finite number, first at completion 1 of 4"),
        ("column", "returned a ndarray that is no finite number, first at completion 1 of 4"),
        ("texts", "returned a str that is no finite number, first at completion 1 of 4"),
        ("by_name", "returned a dict"),
        ("endless_rows", "returned more than 4 scores for 4 completions"),
    ],
)
def test_a_function_that_fails_is_told_by_name_iteration_and_completion(function: str, found: str) -> None:
    with pytest.raises(
        TrainingError, match=f'"ppo", iteration 4 · the reward function "planted_rewards:{function}" {found}'
    ) as told:
        call(function, ["a", "b", SECRET, "d"])
    assert SECRET not in str(told.value), "an error never quotes a completion"


def test_a_function_that_hangs_is_ended() -> None:
    worker = FunctionWorker("planted_rewards:hangs", timeout=5, where="here")
    worker.timeout = 0.3
    with pytest.raises(TrainingError, match=r'"planted_rewards:hangs" took longer than timeout = 0.3 seconds'):
        worker.score(["p"], ["c"], where="here")
    assert worker._process.poll() is not None, "its process is gone"


def test_a_function_that_hangs_ends_with_whoever_called_it() -> None:
    """As after a kill of the run: its standard input ends."""
    worker = FunctionWorker("planted_rewards:hangs", timeout=30, where="here")
    pipe = worker._process.stdin
    assert pipe is not None
    worker._send(b'{"prompts": ["p"], "completions": ["c"]}\n')
    pipe.close()
    assert worker._process.wait(timeout=30) == 0
    worker.close()


def test_a_run_that_is_asked_to_stop_does_not_wait_for_a_function() -> None:
    stop = StopSignal()
    worker = FunctionWorker("planted_rewards:hangs", timeout=60, where="here", stop=stop)
    stop.asked = True
    with pytest.raises(Interrupted, match="stopped while a reward function worked"):
        worker.score(["p"], ["c"], where="here")


@pytest.mark.parametrize(
    "reference, found",
    [
        ("no_such_module:f", "there is no module no_such_module"),
        ("planted_rewards.inside:f", "there is no module planted_rewards.inside"),
        ("planted_rewards:proxi", "no function proxi in planted_rewards"),
        ("planted_rewards:NO_FUNCTION", "no function NO_FUNCTION in planted_rewards"),
        (
            "planted_rewards:by_position",
            r"no function by_position\(prompts, completions\) in planted_rewards: missing a required argument: 'texts'",
        ),
        ("broken_module:f", "importing it raised ZeroDivisionError: division by zero"),
    ],
)
def test_a_function_that_is_not_there_is_told(
    reference: str, found: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "broken_module.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)  # the current folder is looked through, too
    with pytest.raises(RecipeError, match=f'stage "x" · the reward function "{reference}": {found}'):
        check_function(reference, timeout=30, where='stage "x"')


def test_a_run_that_names_no_function_that_is_leaves_no_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    data = preferences(tmp_path / "p.jsonl")
    (tmp_path / "r.toml").write_text(
        f'name = "r"\n[base]\nmodel = "random:tiny"\ntemplate = "gemma"\n[[stage]]\nkind = "ppo"\nname = "ppo"\n'
        f'data = "{data}"\nreward = "my_rewards:good"\n'
    )
    assert main(["run", "r.toml"]) == 2
    assert 'stage "ppo" · the reward function "my_rewards:good": there is no module my_rewards' in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


FAILING = """
def score(prompts, completions):
    if len(CALLS) > 0:
        raise KeyError(completions[0])
    CALLS.append(1)
    return [float(len(c)) for c in completions]


CALLS = []
"""


PAID_BY_FUNCTION = """
name = "r"
[base]
model = "random:tiny"
template = "gemma"
[[stage]]
kind = "ppo"
name = "ppo"
data = "{data}"
reward = "my_rewards:score"
iterations = 2
prompts = 4
minibatch = 4
max_new_tokens = 4
[evaluation]
suites = ["s.toml"]
samples = ["a"]
sample_tokens = 2
"""


def write_suite(folder: Path) -> None:
    (folder / "q.jsonl").write_text('{"id": "q", "question": "a", "choices": [" b", " c"], "answer": 0}\n')
    (folder / "s.toml").write_text('name = "s"\n[[task]]\nname = "q"\nanswer = "choices"\nitems = "q.jsonl"\n')


def test_a_mended_function_goes_on_and_an_edited_one_is_made_anew(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """By the command: the second iteration fails; the first one's steps are kept."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(FAILING)
    write_suite(tmp_path)
    (tmp_path / "r.toml").write_text(PAID_BY_FUNCTION.format(data=preferences(tmp_path / "p.jsonl")))
    assert main(["run", "r.toml"]) == 2
    assert 'iteration 2 · the reward function "my_rewards:score" raised KeyError at my_rewards.py:4' in capsys.readouterr().err
    kept = tmp_path / "runs/r/.ppo.partial/checkpoints/step-00000002"
    assert kept.is_dir()
    (tmp_path / "my_rewards.py").write_text(FAILING.replace("> 0", "> 9"))
    assert main(["run", "r.toml"]) == 0
    assert "ppo: unfinished work is there" in capsys.readouterr().err
    assert [row["step"] for row in rows_of(tmp_path / "runs/r/ppo")] == [1, 2, 3, 4]
    assert main(["run", "r.toml", "--dry-run"]) == 0
    assert "resume" not in capsys.readouterr().out
    (tmp_path / "my_rewards.py").write_text(FAILING.replace("> 0", "> 8"))
    assert main(["run", "r.toml", "--dry-run"]) == 0
    assert "changed: functions.my_rewards:score" in capsys.readouterr().out


EDITS_ITSELF = """
from pathlib import Path
source = Path(__file__).read_text()
if not source.endswith("again"):
    Path(__file__).write_text(source + "# again")
def score(prompts, completions):
    return [float(len(c)) for c in completions]
"""


def test_a_function_that_is_edited_while_the_run_works_is_refused_when_it_is_imported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is edited after the check of the data, and imported again for the first iteration."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my_rewards.py").write_text(EDITS_ITSELF)
    (tmp_path / "r.toml").write_text(PAID_BY_FUNCTION.format(data=preferences(tmp_path / "p.jsonl")))
    write_suite(tmp_path)
    (tmp_path / "runs/r").mkdir(parents=True)  # a new run is planned once more after the check
    assert main(["run", "r.toml"]) == 2
    found = 'stage "ppo" · the reward function "my_rewards:score": its source was edited after this run was planned'
    assert f"error: {found} · run the same command again" in capsys.readouterr().err
    assert main(["run", "r.toml"]) == 0
    manifest = json.loads((tmp_path / "runs/r/ppo/manifest.json").read_text())
    assert manifest["settings"]["functions"] == {"my_rewards:score": hash_file(tmp_path / "my_rewards.py")}


def test_an_edited_function_is_another_input(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert source_hash("my_rewards:good") == ""
    (tmp_path / "my_rewards.py").write_text("raise SystemExit  # nothing of it is run\n")
    before = source_hash("my_rewards:good")
    (tmp_path / "my_rewards.py").write_text("good = len\n")
    assert before != source_hash("my_rewards:good") != ""
    (tmp_path / "package").mkdir()
    (tmp_path / "package/inside.py").write_text("good = len\n")
    assert source_hash("package.inside:good") == source_hash("my_rewards:good")
    assert source_hash("my_rewards.inside:good") == ""
