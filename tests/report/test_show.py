"""`posttrain show`: a run, a stage with its lineage, the base; as text and as JSON; what is not there is refused."""

import json
from pathlib import Path

import pytest
from written_runs import scores, write_run

from posttrain.artifacts import hash_file, read_manifest
from posttrain.cli import main
from posttrain.report.show import show
from tiny_runs import finished_run

BASE = scores("base", follows=4, facts=20)


def shown(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["show", *arguments]) == 0
    return capsys.readouterr().out


def test_a_run_is_its_scorecard_and_its_stages(capsys: pytest.CaptureFixture[str]):
    run = finished_run()
    text = shown(capsys, str(run))
    assert "instructions" in text
    rows = [
        line.split() for line in text.splitlines() if line.startswith(("sft ", "dpo ", "rm ", "ppo ")) and "finished" in line
    ]
    assert [row[:5] for row in rows] == [
        ["sft", "sft", "base", "finished", "yes"], ["dpo", "dpo", "sft", "finished", "yes"],
        ["rm", "reward", "sft", "finished", "yes"], ["ppo", "ppo", "sft", "finished", "yes"],
    ]  # fmt: skip
    found = json.loads(shown(capsys, str(run), "--json"))
    assert found["scorecard"] == json.loads((run / "scorecard.json").read_text())
    assert [(s["name"], s["status"], s["evaluated"]) for s in found["stages"]] == [
        ("sft", "finished", True),
        ("dpo", "finished", True),
        ("rm", "finished", True),
        ("ppo", "finished", True),
    ]
    manifest = read_manifest(run / "dpo")
    assert manifest is not None
    assert {k: found["stages"][1][k] for k in ("steps", "tokens", "seconds", "fingerprint")} == {
        k: manifest[k] for k in ("steps", "tokens", "seconds", "fingerprint")
    }


def test_a_stage_leads_back_to_the_bytes_of_its_data(capsys: pytest.CaptureFixture[str]):
    import posttrain

    run = finished_run()
    text = shown(capsys, str(run / "dpo"))
    lineage = text[text.index("lineage") :].splitlines()
    starter = Path(posttrain.__file__).parent / "starter"
    pairs, demonstrations = (hash_file(starter / name) for name in ("preferences.jsonl", "demonstrations.jsonl"))
    rows = [len((starter / name).read_text().splitlines()) for name in ("preferences.jsonl", "demonstrations.jsonl")]
    assert lineage[1].split()[0] == "dpo"
    assert lineage[2].strip() == f"data starter/preferences.jsonl: {rows[0]} rows, sha256 {pairs}"
    assert lineage[3].split()[0] == "sft"
    assert lineage[4].strip() == f"data starter/demonstrations.jsonl: {rows[1]} rows, sha256 {demonstrations}"
    assert lineage[5].startswith("  base random:tiny: weights ")
    assert "stage.beta" in text
    found = json.loads(shown(capsys, str(run / "dpo"), "--json"))
    assert [m["name"] for m in found["lineage"]] == ["dpo", "sft"]
    assert found["manifest"] == read_manifest(run / "dpo")


def test_the_base_can_be_shown(capsys: pytest.CaptureFixture[str]):
    assert "weights_hash" in shown(capsys, str(finished_run() / "base"))


def test_a_run_that_is_not_done_says_what_stands(tmp_path: Path):
    stages = [{"name": "sft", "data": "d.jsonl"}, {"name": "dpo", "kind": "dpo", "init": "sft", "manifest": None}]
    run = write_run(tmp_path / "run", {"base": BASE}, stages)
    (run / "scorecard.json").unlink()
    found, text = show(run)
    assert [(s["name"], s["status"], s["evaluated"]) for s in found["stages"]] == [
        ("sft", "finished", False),
        ("dpo", "not made yet", False),
    ]
    assert found["scorecard"] is None
    assert "no scorecard yet" in text


def test_an_earlier_input_is_told(tmp_path: Path):
    stages = [{"name": "sft"}, {"name": "dpo", "init": "sft", "manifest": {"inputs": {"sft": "older"}}}]
    run = write_run(tmp_path / "run", {"base": BASE}, stages)
    assert "made from an earlier sft: older" in show(run / "dpo")[1]


@pytest.mark.parametrize(
    ("target", "found"),
    [
        ("run/nope", "run/nope · no stage of this run · there is: base, sft"),
        ("run/dpo", "run/dpo · not finished · there is: base, sft"),
        ("run/evaluate", "run/evaluate · no stage of this run"),
        ("nowhere", "nowhere · not a run folder"),
        ("nowhere/sft", "nowhere/sft · not a run folder"),
    ],
)
def test_what_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], target: str, found: str):
    write_run(tmp_path / "run", {"base": BASE}, [{"name": "sft"}, {"name": "dpo", "manifest": None}])
    assert main(["show", str(tmp_path / target)]) == 2
    assert found in capsys.readouterr().err
