"""Files of a run whose values have another type: every command that reads them ends with 2 and names the file."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from posttrain.cli import main
from tiny_runs import finished_run

MANIFEST, CARD = "sft/manifest.json", "scorecard.json"
METRICS = "sft/metrics.jsonl"
COMMANDS = {
    "show": ["show", "RUN"],
    "stage": ["show", "RUN/sft"],
    "compare": ["compare", "RUN/base", "RUN/sft"],
    "report": ["report", "RUN"],
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run without what only training needs."""
    copy = tmp_path_factory.mktemp("types") / "run"
    return Path(shutil.copytree(finished_run(), copy))


def changed(value: Any, path: tuple[str | int, ...], new: Any) -> Any:
    """The value with another one at a path."""
    if not path:
        return new
    copy = value.copy()
    copy[path[0]] = changed(value[path[0]], path[1:], new)
    return copy


@pytest.mark.parametrize(
    ("file", "path", "new", "commands"),
    [
        (MANIFEST, ("fingerprint",), 5, "show stage report"),
        (MANIFEST, ("metrics",), ["x"], "show stage report"),
        (MANIFEST, ("metrics", "sft/loss"), "low", "show stage report"),
        (MANIFEST, ("files",), {"a": 1}, "show stage report"),
        (MANIFEST, ("inputs",), "base", "show stage report"),
        (MANIFEST, ("steps",), "many", "show stage report"),
        (MANIFEST, ("warnings",), "none", "show stage report"),
        (MANIFEST, (), [1], "show stage report"),
        (CARD, ("stages", 1, "measures", "starter/stops", "value"), "high", "show compare report"),
        (CARD, ("stages", 1, "measures", "starter/stops", "changes"), {}, "show compare report"),
        (CARD, ("stages", 1, "name"), 1, "show compare report"),
        (CARD, ("stages",), {}, "show compare report"),
        (CARD, ("tax",), 1, "show compare report"),
    ],
)
def test_a_value_of_another_type_is_named(
    run: Path, file: str, path: tuple[str | int, ...], new: Any, commands: str, capsys: pytest.CaptureFixture[str]
):
    place = run / file
    before = place.read_bytes()
    place.write_text(json.dumps(changed(json.loads(before), path, new)))
    try:
        for name in commands.split():
            capsys.readouterr()
            assert main([part.replace("RUN", str(run)) for part in COMMANDS[name]]) == 2, name
            error = capsys.readouterr().err
            assert str(place) in error or place.name in error, name
            assert "remove" in error
    finally:
        place.write_bytes(before)


@pytest.mark.parametrize("row", ['{"step": [1]}', "[1]", '{"step": {"a": 1}}', "1"])
def test_metrics_that_are_no_numbers_are_named(run: Path, row: str, capsys: pytest.CaptureFixture[str]):
    place = run / METRICS
    before = place.read_bytes()
    place.write_bytes(before + row.encode() + b"\n")
    try:
        assert main(["report", str(run)]) == 2
        assert "metrics.jsonl" in capsys.readouterr().err
    finally:
        place.write_bytes(before)


def test_untouched_files_are_read_by_every_command(run: Path, capsys: pytest.CaptureFixture[str]):
    for arguments in COMMANDS.values():
        assert main([part.replace("RUN", str(run)) for part in arguments]) == 0
