"""The sentence at the top says what the verdicts say, with the sizes that can be done by hand, and no more."""

import json
from pathlib import Path

import pytest
from pages import Page
from written_runs import scores, write_run

from posttrain.evaluate.stats import paired_shares
from posttrain.report import formatting
from posttrain.report.headline import headline
from posttrain.report.run import load_run
from posttrain.report.show import compare, show

BASE = scores("base", follows=4, facts=20)


def sentence(tmp_path: Path, **last: float) -> str:
    made = scores("sft", **{"follows": 4, "facts": 20, **last})  # type: ignore[arg-type]
    run = load_run(write_run(tmp_path / "run", {"base": BASE, "sft": made}))
    page = Page(headline(run))
    return page.text.replace("\u202f", " ")


def test_a_gain_and_a_loss_are_both_told(tmp_path: Path):
    # 4 -> 24 of 40 followed is +50 points; 20 -> 8 of 40 facts is -30 points: told as sizes, without a sign
    text = sentence(tmp_path, follows=24, facts=8)
    assert "m , taken through sft , gained 50.0 points in instructions followed [" in text
    assert ", and lost 30.0 points in facts [" in text
    assert "10.0 % → 60.0 % ▲ better +50.0" in text
    assert "50.0 % → 20.0 % ▼ worse −30.0" in text


def test_a_cost_in_nats_is_a_loss_too(tmp_path: Path):
    assert "and lost 0.200 nats in prose, nats a token [0.200 to 0.200]" in sentence(tmp_path, follows=24, prose=3.2)


def test_a_gain_without_a_shown_loss_says_what_is_left_open(tmp_path: Path):
    # facts 20 -> 19 of 40: -2.5 points, an interval around 0
    text = sentence(tmp_path, follows=24, facts=19)
    assert "gained 50.0 points in instructions followed" in text
    assert "No loss of capability is shown against base: −2.5 points in facts [" in text
    assert "points is not excluded." in text
    assert "lost" not in text.split("No loss")[0]


def test_nothing_shown_is_told_as_nothing(tmp_path: Path):
    text = sentence(tmp_path)
    assert "is not shown to have gained anything: 0.0 points in instructions followed [" in text
    assert "· not shown 0.0" in text
    assert "better" not in text.split("Changes are paired")[0]


def test_a_capability_that_rose_is_no_loss(tmp_path: Path):
    assert "and lost no capability: it gained 40.0 points in facts [" in sentence(tmp_path, follows=24, facts=36)


def test_a_gain_that_became_a_loss_is_told(tmp_path: Path):
    run = write_run(
        tmp_path / "run", {"base": scores("base", follows=30, facts=20), "sft": scores("sft", follows=10, facts=20)}
    )
    text = Page(headline(load_run(run))).text
    assert "is not shown to have gained anything" in text
    assert "sft against base , its parent: ▼ instructions followed −50.0 points" in text


def three(tmp_path: Path) -> Path:
    """base -> sft -> ppo; ppo keeps half of what sft gained, and a little of sft's prose is lost."""
    made = {
        "base": BASE,
        "sft": scores("sft", follows=32, facts=20),
        "ppo": scores("ppo", follows=18, facts=20, prose=3.05),
    }
    stages = [{"name": "sft"}, {"name": "ppo", "kind": "ppo", "init": "sft"}]
    return write_run(tmp_path / "run", made, stages)


def test_losses_against_the_parent_are_told_first_and_no_tile_is_green_over_them(tmp_path: Path):
    html = headline(load_run(three(tmp_path)))
    text = Page(html).text
    # 32 -> 18 of 40 is -35 points against sft; 4 -> 18 is +35 against the base
    lost = "ppo against sft , its parent: ▼ instructions followed −35.0 points"
    assert lost in text
    assert "▼ prose, nats a token +0.050 nats [+0.050 to +0.050]" in text
    assert "ppo against base : ▼ prose, nats a token +0.050 nats" in text
    assert text.index(lost) < text.index("gained 35.0 points in instructions followed")
    assert "No loss of capability" not in text
    first = str(html).split('<div class="tile')[2]
    assert first.startswith(" worse")
    tile = Page('<div class="tile' + first).text
    assert "instructions followed" in tile
    assert "▼ worse −35.0 vs sft ▲ better +35.0 vs base" in tile


def test_every_stages_losses_against_its_parent_are_listed_the_last_stages_first(tmp_path: Path):
    made = {
        "base": BASE, "sft": scores("sft", follows=32, facts=4), "dpo": scores("dpo", follows=12, facts=4),
        "ppo": scores("ppo", follows=20, facts=4),
    }  # fmt: skip
    stages = [{"name": "sft"}, {"name": "dpo", "init": "sft"}, {"name": "ppo", "init": "sft"}]
    card = json.loads((write_run(tmp_path / "run", made, stages) / "scorecard.json").read_text())
    assert [(row["stage"], row["against"], row["is_parent"], list(row["measures"])) for row in card["losses"]] == [
        ("ppo", "sft", True, ["t/follows"]), ("ppo", "base", False, ["t/facts"]),
        ("dpo", "sft", True, ["t/follows"]), ("sft", "base", True, ["t/facts"]),
    ]  # fmt: skip


def test_terminal_show_and_compare_tell_the_same_losses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    run = three(tmp_path)
    change = paired_shares([1.0] * 32 + [0.0] * 8, [1.0] * 18 + [0.0] * 22)
    told = f"instructions followed {formatting.change_words(change._asdict(), 'share')}"
    assert "−35.0 points (" in told
    table = show(run)[1]
    assert table.splitlines()[0] == "Significant losses with 95 % intervals:"
    assert table.splitlines()[1].startswith(f"  ppo against sft, its parent: ▼ {told}; ▼ prose")
    assert f"ppo against sft, its parent: ▼ {told}" in show(run / "ppo")[1]
    found, text = compare(run / "sft", run / "ppo")
    assert found["losses"] == ["t/follows", "t/prose"]
    assert f"Losses of B against A: ▼ {told}; ▼ prose" in text.replace("\u202f", " ")
    assert [row["stage"] for row in show(run)[0]["losses"]] == ["ppo", "ppo"]


def test_a_run_without_a_shown_loss_says_so_and_that_this_is_not_zero(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "120")
    assert "No loss is shown of any stage against its parent, or of sft against base." in sentence(tmp_path, follows=24)
    lines = show(tmp_path / "run")[1].splitlines()
    assert "This does not prove zero loss" in lines[0] + lines[1]


@pytest.mark.parametrize("tokens", [5.0, 90.0])
def test_length_is_neither_gain_nor_loss(tmp_path: Path, tokens: float):
    assert "Also" not in sentence(tmp_path, tokens=tokens)
