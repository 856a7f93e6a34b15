"""A finished run of recipes/tiny.toml, made once through the command line and shared by whoever only reads it."""

import functools
import shutil
import tempfile
from pathlib import Path

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
