"""A data file that is replaced while a run works: the stage that would read it ends the run by name and publishes nothing."""

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

import posttrain
from posttrain.artifacts import hash_file, read_manifest
from tiny_runs import SMALL, TINY

STARTER = Path(posttrain.__file__).parent / "starter"


def test_a_file_that_is_replaced_while_an_earlier_stage_trains_is_not_trained_on(tmp_path: Path):
    run, pairs = tmp_path / "run", tmp_path / "pairs.jsonl"
    shutil.copyfile(STARTER / "preferences.jsonl", pairs)
    planned = hash_file(pairs)
    command = [
        sys.executable, "-m", "posttrain.cli", "run", str(TINY), "--out", str(run), *SMALL, "--set", f"dpo.data={pairs}",
        "--until", "dpo",
    ]  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        while not (run / ".sft.partial").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.01)
        lines = pairs.read_text(encoding="utf-8").splitlines(keepends=True)
        other = tmp_path / "other.jsonl"
        other.write_text("".join(lines[:-1]), encoding="utf-8")
        other.replace(pairs)
        _, error = process.communicate()
    assert process.returncode == 2, error
    assert "pairs.jsonl" in error.splitlines()[-1]
    assert "was changed during the run" in error.splitlines()[-1]
    assert read_manifest(run / "sft") is not None
    assert read_manifest(run / "dpo") is None
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    manifest = json.loads((run / "dpo" / "manifest.json").read_text())
    report = json.loads((run / "dpo" / "data_report.json").read_text())
    assert manifest["data"][str(pairs)] == hash_file(pairs) != planned
    assert [source["sha256"] for source in report["sources"]] == [hash_file(pairs)]
