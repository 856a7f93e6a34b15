"""The page: every section, escaping, no request and no script, the same bytes, runs that are partial or strange, errors."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pages import Page
from planted_texts import HOSTILE, edit, planted
from written_runs import scores, write_run

from posttrain.cli import main
from posttrain.errors import ArtifactError
from posttrain.report.render import POLICY, SECTIONS, render, write_report
from posttrain.report.run import load_run
from posttrain.stages import KINDS
from tiny_runs import copied_run, finished_run

BASE = scores("base", follows=4, facts=20)
SAME = scores("sft", follows=4, facts=20)


def page_of(run: Path) -> Page:
    return Page(render(load_run(run)))


def test_a_finished_run_has_every_section_and_every_number_of_its_scorecard():
    run = finished_run()
    page = Page((run / "report.html").read_text())
    # The run has no stage that makes rows.
    of_rows = {section.anchor for kind in KINDS.values() if kind.makes == "rows" for section in kind.sections}
    anchors = [anchor for anchor, _, _ in SECTIONS if anchor not in of_rows]
    assert [a["id"] for a in page.having("section")] == anchors
    assert [a["href"] for a in page.having("a")] == [f"#{anchor}" for anchor in anchors]
    stages = json.loads((run / "scorecard.json").read_text())["stages"]
    for stage in stages:
        for entry in stage["measures"].values():
            assert entry["title"] in page.text
            shown = f"{entry['value'] * 100:.1f} %" if entry["unit"] == "share" else f"{entry['value']:.3f}"
            assert shown.replace("\u202f", " ") in page.text or entry["unit"] == "tokens"
    for policy in ("base", "sft", "dpo", "ppo"):
        rows = [json.loads(line) for line in (run / "evaluate" / policy / "samples.jsonl").read_text().splitlines()]
        assert all(row["prompt"] in page.text for row in rows)
    assert len(page.having("article")) == 6
    assert len(page.having("div", **{"class": "answer"})) == 6 * 4


def test_the_page_asks_for_nothing_and_runs_nothing():
    html = (finished_run() / "report.html").read_text()
    page = Page(html)
    assert page.having("meta", **{"http-equiv": "Content-Security-Policy"})[0]["content"] == POLICY
    assert "script" not in POLICY
    assert POLICY.startswith("default-src 'none'; img-src data:; style-src 'unsafe-inline'")
    active = {"script", "iframe", "object", "embed", "img", "form", "base", "video", "audio", "foreignobject", "image"}
    assert not active & {tag for tag, _ in page.elements}
    for tag, attrs in page.elements:
        assert not any(name.startswith("on") or name in ("src", "srcset", "action") for name in attrs), tag
        for name in ("href", "xlink:href"):
            assert attrs.get(name, "#")[0] == "#" or attrs[name] == "data:,"
        assert "url(" not in attrs.get("style", "") or "url(#" in attrs["style"]
    assert "://" not in html
    assert "@import" not in html


def test_ids_are_there_once_and_every_reference_leads_to_one():
    page = Page((finished_run() / "report.html").read_text())
    ids = [attrs["id"] for _, attrs in page.elements if "id" in attrs]
    assert len(ids) == len(set(ids)), sorted(i for i in ids if ids.count(i) > 1)
    uses = {attrs["xlink:href"][1:] for _, attrs in page.elements if "xlink:href" in attrs}
    clips = {attrs["clip-path"][5:-1] for _, attrs in page.elements if "clip-path" in attrs}
    assert uses
    assert clips
    assert uses | clips <= set(ids)


def test_0_of_15_hostile_texts_become_markup(tmp_path: Path):
    """The page of hostile texts has the elements and attributes of the page of harmless ones, and shows every text."""
    assert len(HOSTILE) == 15
    harmless = tuple(f"w{number:08}" for number in range(15))
    tame = page_of(planted(copied_run(tmp_path / "harmless"), harmless))
    wild = page_of(planted(copied_run(tmp_path / "hostile"), HOSTILE))
    assert wild.structure == tame.structure
    shown = [" ".join(text.replace("\x00", "�").split()) for text in HOSTILE]
    assert (
        sum(wild.text.count(text) < 8 for text in shown) == 0
    )  # samples, warning, source, dropped, example, metric, setting …


def test_the_same_artifacts_give_the_same_bytes_wherever_they_lie(tmp_path: Path):
    run = finished_run()
    first = (run / "report.html").read_bytes()
    copy = copied_run(tmp_path / "another name")
    (copy / "report.html").unlink()
    assert write_report(copy).read_bytes() == first
    code = "import sys, pathlib; from posttrain.report.render import write_report; write_report(pathlib.Path(sys.argv[1]))"
    subprocess.run(
        [sys.executable, "-c", code, str(copy)], check=True, env={**os.environ, "PYTHONHASHSEED": "7", "TZ": "Asia/Tokyo"}
    )
    assert (copy / "report.html").read_bytes() == first


def test_the_report_is_written_without_torch_or_transformers(tmp_path: Path):
    run = copied_run(tmp_path / "run")
    code = (
        "import sys, pathlib; from posttrain.report.render import write_report; from posttrain.report.show import show; "
        "run = pathlib.Path(sys.argv[1]); write_report(run); show(run); show(run / 'dpo'); "
        "print([name for name in ('torch', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code, str(run)], check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


def test_a_run_with_the_base_alone_says_so_and_shows_what_is_missing(tmp_path: Path):
    stages = [
        {"name": "sft", "data": "d.jsonl", "manifest": None},
        {"name": "dpo", "kind": "dpo", "init": "sft", "manifest": None},
    ]
    run = write_run(tmp_path / "run", {"base": BASE}, stages)
    (run / ".sft.partial").mkdir()
    page = page_of(run)
    assert "no stage has been evaluated yet" in page.text
    assert "Unfinished stages: sft (unfinished), dpo (not made yet)." in page.text
    assert page.section("pipeline")
    assert page.section("scorecard")
    assert not page.section("tax")
    assert not page.section("training")


def test_a_stage_kind_that_is_not_known_is_drawn_all_the_same(tmp_path: Path):
    metrics = [
        {"step": i, "newkind/surprise": 1 / i, "newkind/validation_surprise": 2 / i, "train/grad_norm": 1.0} for i in (1, 2, 3)
    ]
    metrics[0] |= {"memory/base": 512.0, "memory/activations": 80.0}
    metrics[1] |= {"memory/base": 512.0, "memory/activations": 90.5}
    metrics.append({"step": 4, "newkind/surprise": None})
    stages = [{"name": "odd", "kind": "newkind", "prompts": "p.jsonl", "metrics": metrics}]
    page = page_of(write_run(tmp_path / "run", {"base": BASE, "odd": scores("odd", follows=9, facts=20)}, stages))
    assert page.section("training")
    assert "surprise" in page.text
    assert "newkind" in page.text
    assert "training 0.3333" in page.text  # the last finite value
    assert "memory: base 512.0, activations 90.5 MiB" in page.text  # the largest of a stage
    assert "held out 0.6667" in page.text


def test_eight_stages_with_branches_fit(tmp_path: Path):
    made = ["a", "b", "c", "d", "e", "f", "g", "h"]
    parents = ["base", "a", "a", "b", "d", "e", "f", "base"]
    stages = [
        {"name": n, "init": p, "data": "d.jsonl", "metrics": [{"step": 1, "sft/loss": 1.0}]} for n, p in zip(made, parents)
    ]
    policies = {"base": BASE} | {n: scores(n, follows=5 + i, facts=20) for i, n in enumerate(made)}
    html = render(load_run(write_run(tmp_path / "run", policies, stages)))
    page = Page(html)
    assert "taken through h" in page.text
    assert "a (sft) from base; b (sft) from a; c (sft) from a; d (sft) from b" in " ".join(
        a.get("aria-label", "") for _, a in page.elements
    )
    assert len(html) < 1_500_000


def test_a_long_run_stays_small(tmp_path: Path):
    metrics = [{"step": i, "dpo/loss": 1 / i + (i * 7919 % 13) / 50, "dpo/margin": float(i % 7)} for i in range(1, 20_001)]
    stages = [{"name": "dpo", "kind": "dpo", "metrics": metrics}]
    html = render(load_run(write_run(tmp_path / "run", {"base": BASE, "dpo": scores("dpo", follows=9, facts=20)}, stages)))
    plots = [part.split("</svg>")[0] for part in html.split('<svg class="plot"')[1:]]
    assert len(plots) >= 3
    assert max(map(len, plots)) < 60_000


def test_what_a_reader_must_know_stands_at_the_top(tmp_path: Path):
    run = write_run(tmp_path / "run", {"base": BASE, "sft": SAME, "dpo": SAME},
                    [{"name": "sft"}, {"name": "dpo", "init": "sft", "manifest": {"warnings": ["chosen fell"]}}])  # fmt: skip
    assert "dpo: chosen fell" in page_of(run).text
    edit(run / "sft" / "manifest.json", lambda m: m.update(fingerprint="new"))
    edit(run / "scorecard.json", lambda s: s.update(fingerprints=["print-sft", "print-dpo", "print-base"]))
    text = page_of(run).text
    assert "dpo was made from an earlier sft" in text
    assert "Newer than this scorecard: sft." in text


def broken(run: Path, name: str, content: str | None) -> None:
    (run / name).unlink()
    if content is not None:
        (run / name).write_text(content)


@pytest.mark.parametrize(
    ("name", "content", "found"),
    [
        ("recipe.toml", None, "not a run folder"),
        ("recipe.toml", "name = ", "recipe.toml · not readable as TOML"),
        ("recipe.toml", 'name = "x"\nstage = 3\n', "recipe.toml · stages without a valid name"),
        ("recipe.toml", '[[stage]]\nname = "../../elsewhere"\n', "recipe.toml · stages without a valid name"),
        ("scorecard.json", None, "no scorecard.json: nothing was evaluated yet"),
        ("scorecard.json", '{"stages": [', "scorecard.json · not readable as JSON"),
        ("scorecard.json", '{"stages": []}', "scorecard.json · not a scorecard"),
        ("scorecard.json", "[1]", "scorecard.json · not a JSON object"),
        ("sft/manifest.json", "{", "manifest.json · not readable as JSON"),
        ("sft/metrics.jsonl", None, "metrics.jsonl · is missing"),
        ("sft/metrics.jsonl", '{"step": 1}\nx\n', "metrics.jsonl · not readable as JSON lines"),
        ("sft/data_report.json", None, "data_report.json · is missing"),
        ("sft/data_report.json", "", "data_report.json · not readable as JSON"),
        ("evaluate/base/samples.jsonl", None, "samples.jsonl · is missing"),
        ("evaluate/base/samples.jsonl", "3\n", "samples.jsonl · not rows of JSON objects"),
    ],
)
def test_a_damaged_run_is_refused_by_name(tmp_path: Path, capsys: Any, name: str, content: str | None, found: str):
    run = copied_run(tmp_path / "run")
    broken(run, name, content)
    (run / "report.html").unlink()
    assert main(["report", str(run)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert found in error
    assert "run" in error.split(" · ")[-1]  # what to do
    assert not (run / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(ArtifactError, match="not a run folder"):
        write_report(tmp_path)
    with pytest.raises(ArtifactError, match="not a run folder"):
        write_report(tmp_path / "nowhere")


def test_one_table_has_one_sign_and_the_last_stage_first(tmp_path: Path):
    """Facts 20 -> 8 of 40 are −30 points everywhere, never +30 of a cost; prose +0.2 nats is worse with its own sign."""
    run = write_run(
        tmp_path / "run",
        {"base": BASE, "sft": scores("sft", follows=24, facts=20), "dpo": scores("dpo", follows=24, facts=8, prose=3.2)},
        [{"name": "sft"}, {"name": "dpo", "init": "sft"}],
    )
    html = render(load_run(run))
    table = Page(html.split('id="tax"')[1].split("<table")[1].split("</table>")[0]).text
    assert "change dpo vs sft dpo vs base sft vs base" in table
    facts = table.split("facts")[1].split("prose")[0]
    assert facts.split("capability")[0].strip() == "↑"
    assert facts.count("▼ worse −30.0") == 2
    assert "+30.0" not in html
    prose = table.split("prose, nats a token")[1]
    assert prose.startswith("\u00a0 ↓") or prose.strip().startswith("↓")
    assert prose.count("▼ worse +0.200") == 2
    assert "−0.200" not in table
