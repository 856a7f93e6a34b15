"""recipes/hh.toml, made for hub data, on local files of the same layouts."""

import json
from pathlib import Path

import pytest

from posttrain.cli import main

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"


FILES = {"sft": DATA / "demonstrations" / "oasst_threads.jsonl", "dpo": DATA / "preferences" / "hh_harmless.jsonl"}
SMALL = ("base.model=random:tiny", "evaluation.limit=2", "evaluation.max_new_tokens=4", "evaluation.sample_tokens=4")
needs_data = pytest.mark.skipif(not DATA.is_dir(), reason=f"real data is not there: {DATA}")


def command(run: Path, share: float) -> list[str]:
    """The recipe on a share of the local files."""
    changes = [f'{stage}.data=[{{path="{path}", weight={share}}}]' for stage, path in FILES.items()]
    parts = [part for change in (*changes, *SMALL) for part in ("--set", change)]
    return ["run", str(ROOT / "recipes" / "hh.toml"), "--out", str(run), "--json", *parts]


@needs_data
def test_the_plan_on_threads_and_transcripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*command(tmp_path / "hh", 0.1), "--dry-run"]) == 0
    rows = {step["step"]: step["rows"] for step in json.loads(capsys.readouterr().out)["steps"]}
    assert rows["sft"] == pytest.approx(204 * 0.1 * 0.95, rel=0.5)
    assert rows["dpo"] == pytest.approx(1808 * 0.1 * 0.95, rel=0.3)


@needs_data
@pytest.mark.slow
def test_the_path_on_threads_and_transcripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main(command(tmp_path / "hh", 0.1)) == 0
    assert [s["name"] for s in json.loads(capsys.readouterr().out)["stages"]] == ["base", "sft", "dpo"]
    formats = [json.loads((tmp_path / "hh" / stage / "data_report.json").read_text())["formats"] for stage in FILES]
    assert "hh-rlhf" in str(formats[1])


@needs_data
def test_the_plan_of_the_reward_model_on_transcripts(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    data = DATA / "preferences" / "hh_harmless.jsonl"
    changes = [f'rm.data=[{{path="{data}", weight=0.1}}]', "base.model=random:tiny", "rm.max_tokens=4096"]
    parts = [part for change in changes for part in ("--set", change)]
    command = ["run", str(ROOT / "recipes" / "hh_reward.toml"), "--out", str(tmp_path / "hh"), "--json", "--dry-run", *parts]
    assert main(command) == 0
    rows = {step["step"]: step.get("rows") for step in json.loads(capsys.readouterr().out)["steps"]}
    assert rows["rm"] == pytest.approx(1808 * 0.1 * 0.6, rel=0.3)
