"""The whole command, killed and asked to stop while it trains: it goes on where it was, to the same numbers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from kill_runs import REWARDED, SFT, Watched, write_recipe
from tiny_stages import rows_of


def run_hits(folder: Path, how: str, tries: int, size: int, stages: tuple[str, ...] = SFT) -> dict[str, dict[str, int]]:
    program = str(Path(__file__).parent / "kill_runs.py")
    command = [sys.executable, program, str(folder), how, str(tries), str(size), *stages]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    assert {stage: count["tries"] for stage, count in found.items()} == dict.fromkeys(stages, tries)
    return found


def check(found: dict[str, dict[str, int]], *, inside: int, sampling: int = 0) -> None:
    """Nothing was lost, at any stage; so many signals in all came inside a save, and so many while rollouts were made."""
    for stage, count in found.items():
        for what in ("unusable", "badly ended", "not saved"):
            assert f"{stage}: {count[what]} of {count['tries']} {what}" == f"{stage}: 0 of {count['tries']} {what}"
        runs = count["runs"]
        assert f"{stage}: {count['different']} of {runs} runs different" == f"{stage}: 0 of {runs} runs different"
        assert count["refused"] == 0
    assert sum(count["inside"] for count in found.values()) >= inside
    assert sum(count["sampling"] for count in found.values()) >= sampling


def test_0_of_4_kills_and_sigterms_of_each_stage_change_a_run(tmp_path: Path):
    check(run_hits(tmp_path, "kill+kill+term", 4, 4, (*SFT, *REWARDED)), inside=3)


@pytest.mark.slow
def test_0_of_200_kills_of_a_run_change_it(tmp_path: Path):
    check(run_hits(tmp_path, "kill", 200, 40), inside=100)


@pytest.mark.slow
def test_0_of_50_sigterms_lose_a_step(tmp_path: Path):
    check(run_hits(tmp_path, "term", 50, 40), inside=0)


@pytest.mark.slow
def test_0_of_25_kills_each_change_a_reward_model_and_what_learns_from_it(tmp_path: Path):
    check(run_hits(tmp_path, "kill", 25, 30, REWARDED), inside=20, sampling=3)


@pytest.mark.slow
def test_0_of_25_sigterms_each_change_a_reward_model_and_what_learns_from_it(tmp_path: Path):
    check(run_hits(tmp_path, "term", 25, 30, REWARDED), inside=0)


@pytest.mark.slow
def test_0_of_50_second_sigterms_tear_a_file(tmp_path: Path):
    check(run_hits(tmp_path, "twice", 50, 40), inside=0)


def test_a_fresh_process_saves_on_sigterm_and_its_successor_goes_on(tmp_path: Path):
    """The same with `python -m posttrain.cli`, nothing imported before."""
    recipe, run = write_recipe(tmp_path, SFT, 300), tmp_path / "run"
    command = [sys.executable, "-m", "posttrain.cli", "run", str(recipe), "--out", str(run)]
    watched = Watched(run, "sft")
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
