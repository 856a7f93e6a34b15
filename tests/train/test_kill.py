"""The whole command, killed and asked to stop while it trains: it goes on where it was, to the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_runs import RECIPE, Watched
from tiny_stages import demonstrations, rows_of


def run_hits(folder: Path, how: str, tries: int, epochs: int) -> dict[str, int]:
    command = [sys.executable, str(Path(__file__).parent / "kill_runs.py"), str(folder), how, str(tries), str(epochs)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, int] = json.loads(done.stdout.splitlines()[-1])
    assert found["tries"] == tries
    return found


def check(found: dict[str, int], *, inside: int) -> None:
    tries = found["tries"]
    assert f"{found['unusable']} of {tries} unusable" == f"0 of {tries} unusable"
    assert f"{found['badly ended']} of {tries} badly ended" == f"0 of {tries} badly ended"
    assert f"{found['not saved']} of {tries} not saved" == f"0 of {tries} not saved"
    assert f"{found['different']} of {found['runs']} runs different" == f"0 of {found['runs']} runs different"
    assert found["refused"] == 0
    assert found["inside"] >= inside


def test_0_of_12_kills_and_sigterms_change_a_run(tmp_path: Path):
    check(run_hits(tmp_path, "kill+kill+term", 12, 8), inside=3)


@pytest.mark.slow
def test_0_of_200_kills_of_a_run_change_it(tmp_path: Path):
    check(run_hits(tmp_path, "kill", 200, 40), inside=100)


@pytest.mark.slow
def test_0_of_50_sigterms_lose_a_step(tmp_path: Path):
    check(run_hits(tmp_path, "term", 50, 40), inside=0)


@pytest.mark.slow
def test_0_of_50_second_sigterms_tear_a_file(tmp_path: Path):
    check(run_hits(tmp_path, "twice", 50, 40), inside=0)


def test_a_fresh_process_saves_on_sigterm_and_its_successor_goes_on(tmp_path: Path):
    """The same with `python -m posttrain.cli`, nothing imported before."""
    recipe, run = tmp_path / "recipe.toml", tmp_path / "run"
    recipe.write_text(RECIPE.format(data=demonstrations(tmp_path / "d.jsonl"), epochs=300), encoding="utf-8")
    command = [sys.executable, "-m", "posttrain.cli", "run", str(recipe), "--out", str(run)]
    watched = Watched(run)
    steps = []
    for _ in range(2):
        child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        while watched.saved() <= (steps[-1] if steps else 0) and child.poll() is None:
            time.sleep(0.002)
        os.kill(child.pid, signal.SIGTERM)
        _, said = child.communicate()
        assert child.returncode == 0, said[-2000:]
        steps.append(watched.saved())
        assert f"sft: stopped after step {steps[-1]} of " in said
        assert rows_of(watched.partial)[-1]["step"] == steps[-1]
    assert steps[1] > steps[0]
    assert [row["step"] for row in rows_of(watched.partial)] == list(range(1, steps[1] + 1))
