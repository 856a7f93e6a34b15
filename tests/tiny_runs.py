"""Runs of recipes/tiny.toml through the command line: one that is made once and shared by whoever only reads it, and others."""

import functools
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from posttrain.cli import main

ROOT = Path(__file__).parents[1]
TINY = ROOT / "recipes" / "tiny.toml"
# A run of seconds: two steps a stage, two items a task.
SMALL = (
    "--set",
    "sft.epochs=0.05",
    "--set",
    "dpo.epochs=0.05",
    "--set",
    "rm.epochs=0.05",
    "--set",
    "ppo.iterations=1",
    "--set",
    "evaluation.limit=2",
    "--set",
    'evaluation.samples=["Hi"]',
)


@functools.cache
def finished_run() -> Path:
    """The folder of the run. Nobody writes into it: copy it with `copied_run` first."""
    run = Path(tempfile.mkdtemp(prefix="posttrain-tiny-")) / "tiny"
    assert main(["run", str(TINY), "--out", str(run)]) == 0
    return run


def copied_run(target: Path) -> Path:
    """A copy of the finished run that may be changed."""
    shutil.copytree(finished_run(), target)
    return target


def command(run: Path, *more: str) -> list[str]:
    return ["run", str(TINY), "--out", str(run), *SMALL, *more]


@functools.cache
def undisturbed_run() -> Path:
    """A finished run of `command`, to compare others with."""
    run = Path(tempfile.mkdtemp(prefix="posttrain-tiny-")) / "small"
    assert main(command(run)) == 0
    return run


def posttrain(*arguments: str, env: dict[str, str] | None = None) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        [sys.executable, "-m", "posttrain.cli", *arguments], capture_output=True, text=True, env={**os.environ, **(env or {})}
    )


def plan_of(capsys: pytest.CaptureFixture[str], run: Path, *more: str, recipe: Path = TINY) -> dict[str, tuple[str, str]]:
    """Status and reason of every step, from --dry-run --json."""
    capsys.readouterr()
    assert main(["run", str(recipe), "--out", str(run), "--dry-run", "--json", *more]) == 0
    return {step["step"]: (step["status"], step["why"]) for step in json.loads(capsys.readouterr().out)["steps"]}


def content(folder: Path) -> dict[str, bytes]:
    """Every file of a folder but the lock."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file() and p.name != ".lock"}


def weights(run: Path) -> dict[str, bytes]:
    """What was learned: the same bits whatever happened on the way."""
    names = [f"{stage}/adapter_model.safetensors" for stage in ("sft", "dpo", "rm", "ppo")]
    scores = [f"evaluate/{policy}/scores.jsonl" for policy in ("base", "sft", "dpo", "ppo")]
    return {name: (run / name).read_bytes() for name in names + scores}
