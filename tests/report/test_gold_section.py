"""The section on over-optimisation, from evaluations written by hand: what a hump, a rise and a run of two rows say."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy
import pytest
from pages import Page
from written_runs import scores, write_run

from posttrain.errors import ArtifactError
from posttrain.evaluate.table import change_numbers
from posttrain.report.render import render
from posttrain.report.run import load_run

BASE = scores("base", follows=4, facts=20)
KL_E = [0.0, 0.6, 1.5, 3.0, 5.0, 7.5, 10.5, 14.0, 18.0]


def rows_of(
    name: str, kl_E: list[float], *, alpha: float, beta: float, prompts: int = 80, seed: int = 0
) -> list[dict[str, Any]]:
    """Evaluations on the best-of-n law of gold, with a score that goes on rising; prompts differ by 0.3."""
    random = numpy.random.default_rng(seed)
    noise_B, found = random.normal(size=prompts), []
    for iteration, kl in enumerate(kl_E):
        d = math.sqrt(kl)
        values = {"kl": kl * (1 + 0.2 * noise_B), "score": d + 0.3 * random.normal(size=prompts)}
        values["gold"] = 0.2 + d * (alpha - beta * d) + 0.3 * random.normal(size=prompts)
        row: dict[str, Any] = {"policy": name, "iteration": iteration}
        for key, value_B in values.items():
            row |= {key: float(value_B.mean()), f"{key}_se": float(value_B.std(ddof=1) / math.sqrt(prompts))}
            row[f"{key}_B"] = value_B.tolist()
        found.append(row)
    return found


def written(run: Path, rows: list[dict[str, Any]], published: Sequence[dict[str, Any]] = (), **manifest: Any) -> Path:
    metrics = [
        {"step": step, "ppo/loss": 0.1, "ppo/score": 0.1 * step, "ppo/score/rm": 0.1, "ppo/score/mine.f": -1.0}
        for step in (1, 2)
    ]
    ppo = {
        "kind": "ppo",
        "name": "ppo",
        "data": "d.jsonl",
        "reward": "rm",
        "metrics": metrics,
        "gold_rows": rows,
        "published_rows": list(published),
        "manifest": manifest,
    }
    dpo = {"kind": "dpo", "name": "dpo", "data": "d.jsonl"}
    return write_run(
        run, {"base": BASE, "dpo": scores("dpo", follows=6, facts=20), "ppo": scores("ppo", follows=9, facts=19)}, [dpo, ppo]
    )


def hump() -> list[dict[str, Any]]:
    """Gold peaks at d = 2.5 with 0.2 + 1.25; a dpo policy at KL 4 is 0.5 worse than this one there."""
    (dpo,) = rows_of("dpo", [4.0], alpha=0.76, beta=0.2, seed=1)
    return [*rows_of("ppo", KL_E, alpha=1.0, beta=0.2), {**dpo, "iteration": 0}]


def test_a_hump_is_told_with_its_peak_and_others_at_equal_kl(tmp_path: Path) -> None:
    warning = "over-optimisation: gold fell by 0.3 ± 0.05; stopped after iteration 8, published is the policy after iteration 5"
    page = Page(render(load_run(written(tmp_path / "run", hump(), warnings=[warning]))))
    assert page.section("gold")
    assert "highest gold of 9 (ringed) 4 5.12 ± 0.22 " in page.text
    assert "Over-optimised: gold fell by 0.3 ± 0.05; stopped after iteration 8" in page.text
    assert "best of n: d (α − β d)" in page.text
    assert "no peak shown" not in page.text
    peak = float(page.text.split("best of n: d (α − β d)")[1].split(") ")[2].split(" (")[0])
    assert peak == pytest.approx(2.5**2, rel=0.1)
    assert "ppo at equal KL" in page.text
    assert "▼ worse" in page.text.split("ppo at equal KL")[1]
    titles = [a["aria-label"] for a in page.having("svg") if "against distance" in a.get("aria-label", "")]
    assert titles == ["ppo, gold against distance", "ppo, score against distance"]


def test_the_published_policy_is_reported_from_fresh_answers(tmp_path: Path) -> None:
    """The evaluations that chose say 1.45; fresh answers say 1.2 against 0.2 of the start."""
    fresh = rows_of("ppo", [0.0, 5.0], alpha=0.85, beta=0.18, seed=7)
    published = [{**fresh[0], "policy": "sft"}, {**fresh[1], "iteration": 4}]
    run = load_run(written(tmp_path / "run", hump(), published=published))
    page = Page(render(run))
    section = page.text.split("Over-optimisation", 2)[2]
    assert section.index("answered again") < section.index("evaluations that chose after iteration")
    assert "The same 80 held-out prompts, answered again by both after the policy was chosen." in section
    gain = run.scorecard["gains"][0]["gold"]["change"]
    told, low, high = change_numbers(gain)
    assert f"▲ better {told} {low} to {high}" in section
    assert "published, fresh answers" in section
    head = page.text.split("Pipeline")[0]
    assert "ppo against sft, its start, on fresh answers to 80 held-out prompts: score ▲ better +" in head
    assert f"gold ▲ better {told} (" in head
    assert "the best of 9 evaluations by gold" in head
    older = Page(render(load_run(written(tmp_path / "older", hump()))))
    assert "the maximum of the 9 evaluations that chose it, which is biased upwards" in older.text


def test_a_law_whose_interval_includes_0_is_not_drawn(tmp_path: Path) -> None:
    """Gold that does not move: slopes of either sign fit it."""
    flat = Page(render(load_run(written(tmp_path / "flat", rows_of("ppo", KL_E, alpha=0.0, beta=0.0)))))
    assert flat.text.count("not shown: the interval of α and of β includes 0") == 2
    assert "law of best of n" not in flat.text
    assert "law of RL" not in flat.text
    drawn = Page(render(load_run(written(tmp_path / "hump", hump()))))
    assert "law of best of n" in drawn.text


def test_a_rise_has_no_peak_and_two_rows_no_law(tmp_path: Path) -> None:
    rising = Page(render(load_run(written(tmp_path / "rise", rows_of("ppo", KL_E, alpha=1.0, beta=-0.05)))))
    assert "Not shown to be over-optimised." in rising.text
    assert "no peak shown" in rising.text
    assert "at equal KL" not in rising.text
    two = Page(render(load_run(written(tmp_path / "two", rows_of("ppo", [0.0, 1.0], alpha=1.0, beta=0.1)))))
    assert "Too few evaluations at different distances to fit a law." in two.text
    none = Page(render(load_run(written(tmp_path / "none", []))))
    assert not none.section("gold")


def test_a_policy_beyond_the_data_is_not_compared(tmp_path: Path) -> None:
    rows = [*rows_of("ppo", KL_E[:3], alpha=1.0, beta=0.2), *rows_of("dpo", [9.0], alpha=1.0, beta=0.2)]
    page = Page(render(load_run(written(tmp_path / "run", rows))))
    assert "not reached" in page.text


@pytest.mark.parametrize(
    "change",
    [{"gold": "much"}, {"gold_B": [1.0]}, {"policy": None}, {"score_B": None}, {"kl_B": ["x"] * 80}, {"iteration": 1.5}],
)
def test_damaged_evaluations_are_told(change: dict[str, Any], tmp_path: Path) -> None:
    rows = rows_of("ppo", KL_E[:3], alpha=1.0, beta=0.2)
    with pytest.raises(ArtifactError, match=r"gold\.jsonl · not rows of evaluations"):
        load_run(written(tmp_path / "run", [rows[0], {**rows[1], **change}, rows[2]]))


def test_the_parts_of_a_score_share_a_chart(tmp_path: Path) -> None:
    page = Page(render(load_run(written(tmp_path / "run", hump()))))
    assert "mean of each part" in page.text
    assert "rm 0.1" in page.text
    assert "mine.f -1" in page.text
