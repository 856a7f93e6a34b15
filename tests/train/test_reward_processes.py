"""Reward functions that fork, write into pipes, close descriptors or outlive their run: no score of another call, no process
that stays.
"""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from posttrain.errors import RecipeError, TrainingError
from posttrain.judge.function_source import read_source, source_hash
from posttrain.judge.functions import FunctionWorker


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in; functions are found by PYTHONPATH."""
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def open_worker(function: str, timeout: float = 30.0) -> FunctionWorker:
    return FunctionWorker(f"planted_processes:{function}", timeout=timeout, where="stage")


@pytest.mark.parametrize("function", ["forks_and_returns", "forks_and_raises", "forks_and_exits", "threads"])
def test_scores_are_those_of_their_call_whatever_a_function_starts(function: str) -> None:
    worker = open_worker(function)
    try:
        for completions in (["a", "bb", "ccc"], ["dddd", "eeeee", "f"], ["g"]):
            assert worker.score(["p"] * len(completions), completions, where="here") == [len(c) for c in completions]
    finally:
        worker.close()


@pytest.mark.parametrize(
    "function, found",
    [
        ("noise", "wrote something else into the pipe that its answers go through"),
        ("noise_without_end", "wrote something else into the pipe that its answers go through"),
        ("earlier", "answered call 0 of 3 completions instead of this one"),
        ("closes", "closed the pipe that its answers go through"),
        ("closes_and_hangs", "closed the pipe that its answers go through"),
        ("replaces", "closed the pipe that its answers go through"),
        ("segfaults", r"ended its process \(by signal 11\)"),
        ("leaves_a_child", r"ended its process \(exit code 7\)"),
    ],
)
def test_a_function_that_disturbs_its_pipes_is_ended_by_name(function: str, found: str, place: Path) -> None:
    (place / "own.txt").touch()
    worker = open_worker(function)
    with pytest.raises(TrainingError, match=f'here · the reward function "planted_processes:{function}" {found}'):
        worker.score(["p"] * 3, ["a", "bb", "ccc"], where="here")
    assert worker._process.poll() is not None
    assert (place / "own.txt").read_text() == "", "no answer goes into a file of the function's"
    child = place / "child"
    assert not child.exists() or gone(int(child.read_text()))


RUN = """
import sys
from posttrain.judge.functions import FunctionWorker
worker = FunctionWorker(sys.argv[1], timeout=600, where="stage")
print(worker._process.pid, flush=True)
worker.score(["p"], ["c"], where="here")
"""


def gone(process: int) -> bool:
    """Whether a process is no more; one that nobody waited for yet is."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] in "ZX"
    except FileNotFoundError:
        return True


@pytest.mark.skipif(sys.platform != "linux", reason="a parent's death is noticed by Linux's own signal")
@pytest.mark.parametrize(
    "function, waits",
    [
        ("sleeps_in_c", ("worker",)),
        ("deaf", ("worker",)),
        ("forks_twice", ("worker", "child", "daemon")),
        ("is_stopped", ("worker",)),
    ],
)
@pytest.mark.parametrize("guard_stopped", [False, True])
def test_no_process_stays_when_a_run_is_killed(function: str, waits: tuple[str, ...], guard_stopped: bool, place: Path) -> None:
    run = subprocess.Popen([sys.executable, "-c", RUN, f"planted_processes:{function}"], stdout=subprocess.PIPE, text=True)
    assert run.stdout is not None
    guard = int(run.stdout.readline())
    while not all((place / name).exists() and (place / name).read_text() for name in waits):
        time.sleep(0.01)
    if guard_stopped:
        os.kill(guard, signal.SIGSTOP)
    run.kill()
    run.communicate()
    processes = [guard, *(int((place / name).read_text()) for name in waits)]
    until = time.monotonic() + 20
    while not all(map(gone, processes)) and time.monotonic() < until:
        time.sleep(0.01)
    assert [process for process in processes if not gone(process)] == []


def test_closing_ends_a_worker_that_is_stopped_with_all_that_it_started(place: Path) -> None:
    worker = open_worker("forks_twice", timeout=5)
    worker.timeout = 1.0
    with pytest.raises(TrainingError, match="took longer than timeout = 1 seconds"):
        worker.score(["p"], ["c"], where="here")
    assert all(gone(int((place / name).read_text())) for name in ("worker", "child", "daemon"))


# --- the source that was planned is the source that is imported --------------------------------------------------------

SCORE = "from beside import worth\ndef score(prompts, completions):\n    return [float(worth) for _ in completions]\n"


def test_a_source_is_the_module_and_what_it_imports_from_beside_it(place: Path) -> None:
    (place / "mine.py").write_text(SCORE)
    (place / "beside.py").write_text("import json\nworth = 1\n")
    (place / "unused.py").write_text("worth = 1\n")
    assert set(read_source("mine:score").files) == {"mine", "beside"}
    before = source_hash("mine:score")
    (place / "unused.py").write_text("worth = 2\n")
    assert source_hash("mine:score") == before
    (place / "beside.py").write_text("import json\nworth = 2\n")
    assert source_hash("mine:score") != before
    package = place / "pack"
    (package / "deep").mkdir(parents=True)
    texts = {
        "__init__": "",
        "one": "from .deep import two",
        "deep/__init__": "",
        "deep/two": "from .. import three",
        "three": "",
    }
    for name, text in texts.items():
        (package / f"{name}.py").write_text(text + "\n")
    assert set(read_source("pack.one:f").files) == {"pack", "pack.one", "pack.deep", "pack.deep.two", "pack.three"}
    assert set(read_source("json.decoder:f").files) == {"json.decoder"}, "what is installed changes with its version"


@pytest.mark.parametrize("edited", ["mine.py", "beside.py"])
def test_a_source_that_was_edited_after_planning_is_refused_by_name(edited: str, place: Path) -> None:
    (place / "mine.py").write_text(SCORE)
    (place / "beside.py").write_text("worth = 1\n")
    planned = source_hash("mine:score")
    FunctionWorker("mine:score", timeout=30, where="stage", planned=planned).close()
    (place / edited).write_text((place / edited).read_text().replace("worth", "wealth"))
    found = 'stage · the reward function "mine:score": its source was edited after this run was planned · run the same command'
    (place / "beside.py").write_text((place / "beside.py").read_text() + "worth = wealth = 2\n")
    with pytest.raises(RecipeError, match=found):
        FunctionWorker("mine:score", timeout=30, where="stage", planned=planned)


def test_what_is_imported_is_what_was_hashed_and_no_compiled_file(place: Path) -> None:
    """An edit of one second and one length is not seen by Python's own compiled files."""
    (place / "beside.py").write_text("worth = 1\n")
    os.utime(place / "beside.py", (1e9, 1e9))
    subprocess.run([sys.executable, "-c", "import beside"], check=True, cwd=place)
    (place / "beside.py").write_text("worth = 2\n")
    os.utime(place / "beside.py", (1e9, 1e9))
    (place / "mine.py").write_text(SCORE)
    worker = FunctionWorker("mine:score", timeout=30, where="stage", planned=source_hash("mine:score"))
    try:
        assert worker.score(["p"], ["c"], where="here") == [2.0]
    finally:
        worker.close()
