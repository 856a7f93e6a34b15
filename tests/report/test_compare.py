"""`posttrain compare`: paired over shared items, hand-worked; the Pareto verdict; what cannot be compared is refused."""

import json
from math import isclose
from pathlib import Path

import pytest
from written_runs import N, scores, write_run

from posttrain.cli import main
from posttrain.errors import ArtifactError
from posttrain.evaluate.stats import paired_shares
from posttrain.report.compare import compare
from tiny_runs import finished_run

BASE = scores("base", follows=4, facts=20)


def two(tmp_path: Path, **b: float) -> tuple[Path, Path]:
    made = scores("sft", **{"follows": 4, "facts": 20, **b})  # type: ignore[arg-type]
    run = write_run(tmp_path / "run", {"base": BASE, "sft": made})
    return run / "base", run / "sft"


def test_a_change_is_taken_item_by_item(tmp_path: Path):
    found, text = compare(*two(tmp_path, follows=24))
    row = found["measures"]["t/follows"]
    # the first 4 items are followed by both, 20 more by B alone, 16 by neither
    wanted = paired_shares([1.0] * 4 + [0.0] * 36, [1.0] * 24 + [0.0] * 16)
    assert (row["a"]["value"], row["b"]["value"], row["n"]) == (0.1, 0.6, N)
    assert row["change"]["value"] == 0.5
    assert isclose(row["change"]["low"], wanted.low, abs_tol=1e-6)
    assert isclose(row["change"]["high"], wanted.high, abs_tol=1e-6)
    assert row["change"]["verdict"] == "better"
    line = next(line for line in text.splitlines() if line.startswith("instructions followed ↑"))
    assert [cell in line for cell in ("10.0\u202f%", "60.0\u202f%", "+50.0", "▲ better", str(N))] == [True] * 5
    assert found["items"] == 3 * N


@pytest.mark.parametrize(
    ("b", "verdict"),
    [
        ({"follows": 24}, "B dominates A"),
        ({"facts": 4}, "A dominates B"),
        ({"follows": 24, "facts": 4}, "trade-off"),
        ({"follows": 24, "prose": 3.5}, "trade-off"),
        ({"follows": 5, "facts": 19}, "not shown to differ"),
        ({}, "not shown to differ"),
        ({"tokens": 90.0}, "not shown to differ"),  # length leans no way
        ({"follows": 24, "tokens": 90.0}, "B dominates A"),
    ],
)
def test_the_pareto_verdict(tmp_path: Path, b: dict[str, float], verdict: str):
    found, text = compare(*two(tmp_path, **b))
    assert found["verdict"] == verdict
    assert text.splitlines()[-1].startswith(f"{verdict}: ")


def test_the_other_way_round_is_the_mirror(tmp_path: Path):
    a, b = two(tmp_path, follows=24, facts=4)
    forth, back = compare(a, b)[0]["measures"], compare(b, a)[0]["measures"]
    for name in forth:
        assert isclose(forth[name]["change"]["value"], -back[name]["change"]["value"], abs_tol=1e-9)
        if forth[name]["unit"] == "share":
            assert isclose(forth[name]["change"]["low"], -back[name]["change"]["high"], abs_tol=1e-9)


def test_what_compare_says_is_what_the_scorecard_says(capsys: pytest.CaptureFixture[str]):
    run = finished_run()
    capsys.readouterr()
    assert main(["compare", str(run / "sft"), str(run / "dpo"), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    stages = {stage["name"]: stage["measures"] for stage in json.loads((run / "scorecard.json").read_text())["stages"]}
    assert list(found["measures"]) == list(stages["dpo"])
    for name, row in found["measures"].items():
        change = next(c for c in stages["dpo"][name]["changes"] if c["against"] == "sft")
        assert row["change"] == {key: change[key] for key in ("value", "low", "high", "verdict")}
        assert row["b"] == {key: stages["dpo"][name][key] for key in ("value", "low", "high")}


def test_two_runs_are_compared_on_the_items_of_both(tmp_path: Path):
    a = write_run(tmp_path / "a", {"base": BASE, "sft": scores("sft", follows=4, facts=20)})
    b = write_run(tmp_path / "b", {"base": BASE, "sft": scores("sft", follows=8, facts=10, n=10)}, settings={"suites": "other"})
    found, text = compare(a / "sft", b)  # a run is its last stage
    assert found["b"].endswith("b/sft")
    assert found["items"] == 30
    assert found["measures"]["t/follows"]["n"] == 10
    assert found["measures"]["t/follows"]["a"]["value"] == 0.4  # 4 of the 10 shared items
    assert "The suites differ; only the 30 shared items are compared." in text


def test_measures_in_tokens_need_the_same_tokenizer(tmp_path: Path):
    a = write_run(tmp_path / "a", {"base": BASE})
    b = write_run(tmp_path / "b", {"base": BASE}, tokenizer="another")
    found, text = compare(a / "base", b / "base")
    assert list(found["measures"]) == ["t/follows", "t/facts"]
    assert "The tokenizers differ" in text


def other_prompts() -> list[object]:
    from dataclasses import replace

    return [replace(score, prompt=f"{score.prompt}?") if score.item == "f3" else score for score in BASE]


def test_what_does_not_mean_the_same_is_refused(tmp_path: Path):
    a = write_run(tmp_path / "a", {"base": BASE}) / "base"
    asked = write_run(tmp_path / "asked", {"base": other_prompts()}) / "base"  # type: ignore[dict-item]
    with pytest.raises(ArtifactError, match=r"1 items have different prompts, first f3 of t/follows · the same prompt"):
        compare(a, asked)
    longer = write_run(tmp_path / "longer", {"base": BASE}, settings={"max_new_tokens": 16}) / "base"
    with pytest.raises(ArtifactError, match="evaluated with max_new_tokens = 64 and 16 · the same for both"):
        compare(a, longer)
    rest = [score for score in scores("base", follows=1, facts=1, n=N + 5) if int(score.item[1:]) >= N]
    with pytest.raises(ArtifactError, match="no items in common"):
        compare(a, write_run(tmp_path / "rest", {"base": rest}) / "base")
    turned = write_run(tmp_path / "turned", {"base": BASE})
    card = json.loads((turned / "scorecard.json").read_text())
    card["stages"][0]["measures"]["t/facts"]["better"] = "lower"
    (turned / "scorecard.json").write_text(json.dumps(card))
    with pytest.raises(ArtifactError, match="the suites define t/facts differently"):
        compare(a, turned / "base")


def test_changed_scores_are_refused(tmp_path: Path):
    a, b = two(tmp_path, follows=24)
    path = b.parent / "evaluate" / "sft" / "scores.jsonl"
    path.write_text(path.read_text().replace('"value": 0.0', '"value": 1.0'))
    with pytest.raises(ArtifactError, match="was changed after it was made"):
        compare(a, b)


@pytest.mark.parametrize(
    ("a", "b", "found"),
    [
        ("run/base", "run/nope", "run/nope · not evaluated · there is: base, sft"),
        ("run/nope", "run/sft", "run/nope · not evaluated · there is: base, sft"),
        ("none/a", "run/sft", "none · not a run folder"),
        ("run/base", "run/evaluate", "run/evaluate · not evaluated"),
    ],
)
def test_a_policy_that_is_not_there_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str], a: str, b: str, found: str):
    two(tmp_path)
    assert main(["compare", str(tmp_path / a), str(tmp_path / b)]) == 2
    assert found in capsys.readouterr().err
