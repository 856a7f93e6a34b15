"""The sections on critique and revision, contrast and labels: their figures, their stamp, and where texts of prompts stand."""

import json
from collections.abc import Mapping
from html.parser import HTMLParser
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
from pages import Page
from planted_texts import HOSTILE
from written_runs import scores, write_run

import written_trails as hand
from browsers import CHROMIUM, NO_BROWSER
from posttrain.report.constitution import contrasts, labels, revisions
from posttrain.report.render import render, write_report
from posttrain.report.run import RunRecord, load_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

BASE = scores("base", follows=4, facts=20)


def written(folder: Path, **manifests: Mapping[str, Any]) -> Path:
    """A run with scores of the base, and stages of rows."""
    tables = [{**table, "manifest": None} for table in hand.tables(folder / "files")]
    hand.write_files(folder / "files")
    run = write_run(folder / "run", {"base": BASE}, tables)
    hand.write_stages(run, folder / "files", **manifests)
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunRecord:
    return load_run(written(tmp_path_factory.mktemp("constitution")))


class Collapsed(HTMLParser):
    """The text outside of <details>, apart from their summaries."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.depth, self.summary, self.open = 0, False, ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.depth += tag == "details"
        self.summary |= tag == "summary"

    def handle_endtag(self, tag: str) -> None:
        self.depth -= tag == "details"
        self.summary &= tag != "summary"

    def handle_data(self, data: str) -> None:
        if not self.depth or self.summary:
            self.open += data


def test_the_section_on_revisions_says_what_was_found(run: RunRecord) -> None:
    page = Page(str(revisions(run)))
    assert page.section("revisions")
    text = page.text.replace("\u202f", " ")
    for part in (
        "Revisions are preferred in 100 % (34–100) of 2 decided comparisons: not shown to be above chance.",
        "The policy found a fault in 67 % (30–90) of the answers and 75 % (30–95) of 4 prompts have a revision.",
        "Refusals go from 25 % to 25 %: no change is shown",
        "Judge policy:sft: passed its audit: accuracy 75 % (60–86), n 40.",
        "short Answer in few words 4 67 % (21–94) 25 % (5–70) 2 −11 (n 1)",
        "violence left out of the constitution 2", "Not used: principles with the id or tag no-violence.",
        "dropped: 2 an empty answer, 1 empty",
    ):  # fmt: skip
        assert part in text, part
    assert page.having("svg")[0]["aria-label"].startswith("revised, shares by round")


def test_three_examples_show_what_changed_inside_collapsed_blocks_alone(run: RunRecord) -> None:
    html = str(revisions(run))
    page = Page(html)
    assert page.text.count("example: ") == 3
    assert "<del>Take a knife.</del><ins>I cannot help with that.</ins>" in html
    outside = Collapsed(html).open
    assert "Question p" not in outside
    assert "knife" not in outside
    assert "example: p2/r1 · kind · category violence" in outside
    assert not any("open" in attributes for attributes in page.having("details"))


def test_the_section_on_labels_says_how_far_people_agree(run: RunRecord) -> None:
    page = Page(str(labels(run)))
    text = page.text.replace("\u202f", " ")
    for part in (
        "3 of 4 pairs are labelled (1 abstained).", "Labels agree with people on 50 % (9–91), n 2; kappa 0.00",
        "2 pairs with at least two decisive votes", "1 flip, 1 vanish of 3", "the audit of the judge",
    ):  # fmt: skip
        assert part in text, part
    assert "Question p" not in page.text


def test_the_section_on_contrast_claims_no_judgement(run: RunRecord) -> None:
    text = Page(str(contrasts(run))).text.replace("\u202f", " ")
    assert "2 pairs. The answer with principles is chosen by assumption: no judge compared the two." in text
    assert "dropped: 2 with equal answers" in text


def test_a_weak_judge_is_stamped_and_a_refused_one_is_told(tmp_path: Path) -> None:
    weak = {**hand.JUDGE, "passes": False, "allowed_weak": True}
    run = written(tmp_path, revised={"judge": weak, "gate": hand.GATE})
    (run / "ai").rename(run / ".ai.partial")
    (run / ".ai.partial" / "manifest.json").unlink()
    accuracy = {"value": 0.51, "low": 0.36, "high": 0.66, "n": 40}
    (run / ".ai.partial" / "judge_audit.json").write_text(json.dumps({"passes": False, "accuracy": accuracy}))
    loaded = load_run(run)
    page = Page(str(revisions(loaded)))
    assert page.having("span", **{"class": "stamp"})
    assert "weak judge allowed" in page.text
    assert not Page(str(contrasts(loaded))).having("span", **{"class": "stamp"})
    told = Page(str(labels(loaded))).text.replace("\u202f", " ")
    assert "The judge was refused: accuracy 51 % (36–66), n 40." in told
    assert "Nothing was trained on its rows." in told


def test_pairs_of_a_contrast_in_place_of_labels_are_told(tmp_path: Path) -> None:
    failed = {**hand.JUDGE, "passes": False, "accuracy": {"value": 0.51, "low": 0.36, "high": 0.66, "n": 40}}
    made = {"judge": failed, "labelled_by": "contrast", "labelled_by_why": "the judge failed its audit"}
    loaded = load_run(written(tmp_path, pairs=made))
    told = Page(str(labels(loaded))).text.replace("\u202f", " ")
    assert "The judge was refused. policy:sft: failed its audit and was not used: accuracy 51 % (36–66), n 40." in told
    assert not Page(str(contrasts(loaded))).having("span", **{"class": "stamp"})


def test_a_run_without_such_stages_has_no_such_section(tmp_path: Path) -> None:
    loaded = load_run(write_run(tmp_path / "run", {"base": BASE, "sft": scores("sft", follows=8, facts=20)}))
    assert [str(part(loaded)) for part in (revisions, labels, contrasts)] == ["", "", ""]


def test_hostile_texts_stay_text(tmp_path: Path) -> None:
    run = written(tmp_path)
    whole = " ".join(HOSTILE)
    rounds = [{**row, "answer": whole, "category": whole, "principle": whole} for row in hand.ROUNDS]
    rounds = [{**row, "revision": whole[::-1], "critique": whole} if row["outcome"] == "revised" else row for row in rounds]
    hand.lines(run / "revised" / "rounds.jsonl", rounds)
    plain = Page(str(revisions(load_run(written(tmp_path / "plain")))))
    page = Page(str(revisions(load_run(run))))
    assert {tag for tag, _ in page.elements} <= {tag for tag, _ in plain.elements}


@pytest.fixture(scope="module")
def page_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A page with all three sections. Their kinds may not be wired in yet, so they are put into the page here."""
    run = written(tmp_path_factory.mktemp("browser"))
    path = write_report(run)
    loaded = load_run(run)
    html = str(render(loaded))
    for part in (revisions, labels, contrasts):
        made = str(part(loaded))
        html = html if made in html else html.replace("</main>", f"{made}</main>")
    path.write_text(html, encoding="utf-8")
    return path


@pytest.mark.browser
@pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER)
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_sections_fit_wide_and_narrow_screens(browser: "Browser", page_file: Path, width: int, scheme: Any) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    # Nothing is cut: a part wider than its box scrolls inside of it.
    wide = "[...document.querySelectorAll('section *')].filter(e => e.scrollWidth > e.clientWidth + 1 && e.clientWidth)"
    hidden = page.evaluate(f"{wide}.filter(e => getComputedStyle(e).overflowX === 'hidden').length")
    assert hidden == 0
    assert said == []
    page.close()
