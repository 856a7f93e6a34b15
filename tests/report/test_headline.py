"""The sentence at the top says what the verdicts say, with the sizes that can be done by hand, and no more."""

from pathlib import Path

import pytest
from pages import Page
from written_runs import scores, write_run

from posttrain.report.headline import headline
from posttrain.report.run import load_run

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
    assert "No loss of capability is shown: −2.5 points in facts [" in text
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
    assert "Also worse: 50.0 points in instructions followed" in text


@pytest.mark.parametrize("tokens", [5.0, 90.0])
def test_length_is_neither_gain_nor_loss(tmp_path: Path, tokens: float):
    assert "Also" not in sentence(tmp_path, tokens=tokens)
