"""Runs on disks that refuse, moved runs, and runs that somebody has changed by hand."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from posttrain.artifacts import read_manifest
from posttrain.cli import main
from posttrain.errors import ArtifactError
from posttrain.models.target import open_target
from tiny_runs import TINY, command, content, copied_run, finished_run, plan_of, posttrain, undisturbed_run, weights


def test_an_output_folder_that_cannot_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "file").write_text("mine")
    for place in ("file", "file/below"):
        assert main(command(tmp_path / place)) == 2
        assert "a file is where a folder should be" in capsys.readouterr().err
    assert main(command(tmp_path / ("x" * 300))) == 2
    assert "the name is too long" in capsys.readouterr().err
    assert content(tmp_path) == {"file": b"mine"}
    assert main(command(Path("/proc/posttrain"))) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: /proc/posttrain · ")


LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]), resource.RLIM_INFINITY))
from posttrain.cli import main
sys.exit(main(sys.argv[2:]))
"""


@pytest.mark.parametrize(
    "size", [100, pytest.param(20_000, marks=pytest.mark.slow), pytest.param(2_000, marks=pytest.mark.slow)]
)
def test_a_disk_that_refuses_is_a_clear_error_and_room_lets_the_run_go_on(tmp_path: Path, size: int):
    run = tmp_path / "run"
    done = subprocess.run([sys.executable, "-c", LIMITED, str(size), *command(run)], capture_output=True, text=True)
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    assert "the file is too large for this disk · make room" in done.stderr.splitlines()[-1]
    for manifest in run.rglob("manifest.json"):
        assert read_manifest(manifest.parent) is not None
    assert main(command(run)) == 0
    assert weights(run) == weights(undisturbed_run())


@pytest.mark.slow
@pytest.mark.parametrize("kib", [4, 64, 160])
def test_a_full_disk(tmp_path: Path, kib: int):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = os.geteuid() == 0 and shutil.which("mount") is not None
    mounted = mounted and subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={kib}k", "tmpfs", str(disk)]).returncode == 0
    if not mounted:
        pytest.skip("a small disk can only be mounted by root")
    try:
        done = posttrain(*command(disk / "run"))
        assert done.returncode == 2, done.stderr
        assert done.stderr.splitlines()[-1].startswith("error: ")
        assert "the disk is full" in done.stderr
        assert "Traceback" not in done.stderr
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        assert main(command(disk / "run")) == 0
        assert weights(disk / "run") == weights(undisturbed_run())
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)  # weights stay mapped in this process


def test_a_run_folder_that_was_moved_works_where_it_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    run = copied_run(tmp_path / "elsewhere" / "my run")
    monkeypatch.chdir(tmp_path)
    before = content(run)
    assert main(["run", str(TINY), "--out", str(run)]) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert content(run) == before
    assert main(["run", str(run / "recipe.toml"), "--out", str(run)]) == 0  # its own recipe makes the same plan
    assert "nothing to do" in capsys.readouterr().out
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 0
    assert capsys.readouterr().out == f"report: {run / 'report.html'}\n"
    assert (run / "report.html").stat().st_size > 10_000
    assert main(["show", str(run / "dpo"), "--json"]) == 0
    assert "sft" in capsys.readouterr().out
    target = open_target(str(run / "dpo"))
    assert target.names == ("base", "sft", "dpo", "ppo")
    assert target.policies.activate("dpo") == "dpo"


def test_a_payload_that_was_edited_by_hand_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = copied_run(tmp_path / "run")
    path = run / "sft" / "adapter_model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # one bit of one weight: nothing else would notice
    path.write_bytes(data)
    message = f"{path} · was changed after it was made · remove {run / 'sft'} and run the recipe again"
    with pytest.raises(ArtifactError) as refused:
        open_target(str(run / "sft")).policies.activate("sft")
    assert str(refused.value) == message
    capsys.readouterr()
    assert main(["run", str(TINY), "--out", str(run), "--set", "dpo.beta=0.2"]) == 2
    assert capsys.readouterr().err.splitlines()[-1] == f"error: {message}"
    path.unlink()
    assert plan_of(capsys, run)["sft"] == ("due", "adapter_model.safetensors is missing")
    assert main(["run", str(TINY), "--out", str(run)]) == 0
    assert weights(run) == weights(finished_run())


def test_scores_that_were_edited_by_hand_are_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = copied_run(tmp_path / "run")
    path = run / "evaluate" / "sft" / "scores.jsonl"
    path.write_text(path.read_text().replace('"value": 0.0', '"value": 1.0'))
    assert main(["run", str(TINY), "--out", str(run)]) == 2
    assert f"{path} · was changed after it was made" in capsys.readouterr().err


def test_a_damaged_manifest_is_named_and_removing_the_stage_mends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    run = copied_run(tmp_path / "run")
    (run / "dpo" / "manifest.json").write_text("{")
    assert main(["run", str(TINY), "--out", str(run)]) == 2
    message = f"{run / 'dpo' / 'manifest.json'} · not readable as JSON · remove {run / 'dpo'} and run the recipe again"
    assert capsys.readouterr().err == f"error: {message}\n"
    shutil.rmtree(run / "dpo")
    assert main(["run", str(TINY), "--out", str(run)]) == 0
    assert weights(run) == weights(finished_run())


def test_a_report_or_scorecard_that_is_gone_is_written_again(tmp_path: Path):
    run = copied_run(tmp_path / "run")
    (run / "report.html").unlink()
    (run / "scorecard.json").write_text("{torn")
    assert main(["run", str(TINY), "--out", str(run)]) == 0
    scorecards: list[Any] = [json.loads((r / "scorecard.json").read_text()) for r in (run, finished_run())]
    assert scorecards[0] == scorecards[1]
    assert (run / "report.html").exists()
