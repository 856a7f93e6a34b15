"""`posttrain audit`: why a row was trained, and the figures of the stages that make rows, against values worked by hand."""

import json
from pathlib import Path
from typing import Any

import numpy
import pytest
from statsmodels.stats.inter_rater import cohens_kappa as of_statsmodels

import written_trails as hand
from loaded_modules import loaded_by
from posttrain.cli import main
from posttrain.constitution.evasion import evasion, only_refuses
from posttrain.constitution.label_figures import left_out_labels
from posttrain.constitution.trail_files import JudgedRecord, RoundRecord
from posttrain.constitution.word_diff import as_text, changed_share, word_diff
from posttrain.evaluate.kappa import cohens_kappa
from posttrain.evaluate.stats import wilson


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trail")
    return hand.write_trail(folder / "run", folder / "files")


def audited(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    capsys.readouterr()
    assert main(["audit", *arguments]) == 0
    return capsys.readouterr().out


def figures(capsys: pytest.CaptureFixture[str], run: Path, stage: str) -> dict[str, Any]:
    (only,) = json.loads(audited(capsys, str(run), "--stage", stage, "--json"))["stages"]
    return {**only, **(only.get("revisions") or only.get("labels") or only.get("contrast"))}


def share(hits: float, n: int) -> dict[str, float]:
    low_high = wilson(hits, n)
    return {"value": round(hits / n, 6), "low": round(low_high.low, 6), "high": round(low_high.high, 6), "n": n}


# --- the figures of critique and revision -----------------------------------------------------------------------------


def test_what_each_principle_found_and_changed(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`short` was drawn for p1, p2, p3 and p4: found in two of the three answers that are not empty, one revision kept."""
    by = figures(capsys, run, "revised")["by_principle"]
    short, kind = by["short"], by["kind"]
    assert (short["title"], short["drawn"], short["nothing_found"], short["dropped"]) == ("Answer in few words", 4, 1, 2)
    assert short["found"] == share(2, 3)
    assert short["changed"] == share(1, 4)
    assert short["length_change"] == {"value": 7 - 18, "low": -11, "high": -11, "n": 1}
    assert short["preferred"] == share(1, 1)
    assert (kind["found"], kind["changed"], kind["dropped"]) == (share(2, 3), share(2, 4), 1)
    # +11 characters for p2, 30 − 63 for p3.
    assert kind["length_change"]["value"] == -11
    assert kind["length_change"]["low"] <= -33 < 11 <= kind["length_change"]["high"]
    assert (kind["refusals"]["before"], kind["refusals"]["after"]) == (share(1, 2), share(1, 2))
    assert kind["refusals"]["change"]["value"] == 0
    assert kind["preferred"] == share(1, 1), "the third revision was not asked about"


def test_rounds_categories_and_the_whole(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, run, "revised")
    assert (found["by_round"]["1"]["changed"], found["by_round"]["2"]["changed"]) == (share(2, 4), share(1, 4))
    assert found["whole"]["found"] == share(3, 3)
    assert found["whole"]["changed"] == share(3, 4)
    assert (found["whole"]["refusals"]["before"], found["whole"]["refusals"]["after"]) == (share(1, 4), share(1, 4))
    violence, none = found["by_category"]["violence"], found["by_category"][""]
    assert violence["held_out"] == ["no-violence"]
    assert none["held_out"] == []
    assert (violence["prompts"], violence["found"]) == (2, share(2, 2))
    assert (violence["refusals"]["before"], violence["refusals"]["after"]) == (share(0, 2), share(1, 2))
    assert found["dropped"] == {"an empty answer": 2, "empty": 1}
    assert found["judge"] == hand.JUDGE
    assert found["gate"] == hand.GATE


def test_evasion_shows_refusals_and_boilerplate(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answers, first, second = figures(capsys, run, "revised")["evasion"]
    assert [one["texts"] for one in (answers, first, second)] == [4, 2, 1]
    assert [one["only_refuse"]["value"] for one in (answers, first, second)] == [0, 0.5, 0]
    assert only_refuses(hand.REFUSAL)
    assert not only_refuses(hand.LONG_REFUSAL)
    assert not only_refuses(hand.HELP)


def test_repeated_openings_and_phrases_are_counted_without_those_of_prompts() -> None:
    texts = [
        "I can not help you with this.",
        "I can not help you today.",
        "I CAN not help you  today.",
        "Tell me where to dig.",
    ]
    rows = [
        RoundRecord.model_validate(hand.round_row(f"q{i}", 1, "kind", "x", **hand.revised("c", text, 0.9)))
        for i, text in enumerate(texts)
    ]
    _, first = evasion(rows)
    assert first["distinct"] == 0.75, "case and white space do not count"
    assert first["openings"] == [["i can not help you", 3]]
    assert first["phrases"][:2] == [["can not help you", 3], ["i can not help", 3]]
    # Shared four-word phrases: 2 of 4, 3 of 3, 3 of 3, 0 of 2.
    assert first["shared_phrases"] == pytest.approx((0.5 + 1 + 1 + 0) / 4)
    known = {"prompt": [{"role": "user", "content": "So I can not help you, you say?"}]}
    rows = [
        row.model_copy(update={"prompt": RoundRecord.model_validate({**rows[0].model_dump(), **known}).prompt}) for row in rows
    ]
    assert evasion(rows)[1]["openings"] == []


# --- the figures of labels --------------------------------------------------------------------------------------------


def test_votes_abstentions_and_the_answer_shown_first(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, run, "ai")
    a, b, c = (found["by_principle"][name] for name in "abc")
    assert [(p["votes"], p["decisive"], p["abstained"], p["tied"]) for p in (a, b, c)] == [
        (4, 3, 1, 0), (4, 2, 2, 0), (4, 1, 3, 0),
    ]  # fmt: skip
    # c of p1: .6 and 1 − .3; of p2: .8 and 1 − .6.
    assert c["first"] == share(3, 4)
    assert c["why"] == {"the orders contradict each other": 3}
    assert (a["with_label"], b["with_label"]) == (share(2, 3), share(1, 2))
    assert found["outcomes"] == {"labelled": 3, "abstained": 1}
    assert found["unexplained"] == 0
    assert found["confidence"]["value"] == pytest.approx((1.9 / 3 + 0.6 + 0.9) / 3, abs=1e-6)


def test_agreement_counts_only_pairs_with_two_decisive_votes(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """p1: a and b differ. p2: b and c agree, a differs from both. p3 has one decisive vote, p4 none."""
    agreement = figures(capsys, run, "ai")["agreement"]
    assert agreement["items"] == 2
    assert agreement["mean"]["value"] == pytest.approx((0 + 1 / 3) / 2, abs=1e-6)
    assert agreement["unanimous"] == share(0, 2)
    assert agreement["decisive_votes"] == {"0": 1, "1": 1, "2": 1, "3": 1}


def test_labels_without_a_principle_flip_or_vanish(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Without a: p1 becomes b's 0.3, p2 stays above 1/2, p3 has no vote. Without b: p2 is (2 · 0.4 + 0.7) / 3 = 1/2."""
    by = figures(capsys, run, "ai")["by_principle"]
    assert by["a"]["without"] == {"labels": 3, "flip": 1, "vanish": 1}
    assert by["b"]["without"] == {"labels": 2, "flip": 0, "vanish": 1}
    assert by["c"]["without"] == {"labels": 1, "flip": 0, "vanish": 0}
    assert left_out_labels("d", [JudgedRecord.model_validate(row) for row in hand.JUDGED])["labels"] == 0


def test_kappa_with_people_over_what_both_decided(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """People prefer A for p1 and B for p2. Principle a says the same, b the opposite, and the labels say A twice."""
    found = figures(capsys, run, "ai")
    kappas = {name: found["by_principle"][name]["human"]["kappa"] for name in "abc"}
    assert [kappas[name]["value"] for name in "abc"] == [1, -1, 0]
    assert [kappas[name]["n"] for name in "abc"] == [2, 2, 1]
    assert found["human"]["kappa"]["value"] == 0
    assert found["human"]["alike"] == share(1, 2)


def test_kappa_equals_the_hand_worked_value_and_statsmodels() -> None:
    """20 both yes, 15 both no, 5 and 10 apart: p_o = 0.7, p_e = 0.5 · 0.6 + 0.5 · 0.4 = 0.5, kappa = 0.4."""
    cells = [((True, True), 20), ((True, False), 5), ((False, True), 10), ((False, False), 15)]
    pairs = [cell for cell, count in cells for _ in range(count)]
    kappa = cohens_kappa([a for a, _ in pairs], [b for _, b in pairs])
    assert kappa is not None
    assert kappa.value == pytest.approx(0.4)
    assert (kappa.n, kappa.alike) == (50, 0.7)
    random = numpy.random.default_rng(3)
    for table in ([[20, 5], [10, 15]], *(random.integers(1, 40, (2, 2)).tolist() for _ in range(50))):
        both = [(i == 0, j == 0) for i in (0, 1) for j in (0, 1) for _ in range(table[i][j])]
        mine, theirs = cohens_kappa([a for a, _ in both], [b for _, b in both]), of_statsmodels(numpy.asarray(table))
        assert mine is not None
        assert mine[:3] == pytest.approx((theirs.kappa, max(-1, theirs.kappa_low), min(1, theirs.kappa_upp)), abs=1e-9)
    assert cohens_kappa([], []) is None
    alike = cohens_kappa([True, True], [True, True])
    assert alike is not None
    assert alike.value is None, "chance alone agrees"


def test_the_figures_of_contrast(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = figures(capsys, run, "pairs")
    assert (found["by_principle"]["kind"]["drawn"], found["by_principle"]["short"]["drawn"]) == (2, 1)
    assert found["total"]["length_change"]["value"] == ((24 - 10) + (4 - 13)) / 2
    assert (found["total"]["refusals"]["before"], found["total"]["refusals"]["after"]) == (share(0, 2), share(1, 2))
    assert found["dropped"] == {"with equal answers": 2}


# --- one row ----------------------------------------------------------------------------------------------------------


def test_a_revision_leads_to_its_principle_its_judge_and_those_who_trained_on_it(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    found = json.loads(audited(capsys, str(run), "p2/r1", "--json"))
    (made,) = found["made"]
    assert (made["stage"], made["kind"], made["seed"], made["fingerprint"]) == ("revised", "critique", 7, "print-revised")
    assert made["answered_by"] == [{"name": "sft", "fingerprint": "print-sft"}]
    assert made["base"] == {"model": "m", "weights_hash": "w" * 64}
    assert made["constitution"]["version"] == "3"
    assert made["judge"]["accuracy"]["n"] == 40
    assert [path.rsplit("/", 1)[-1] for path in made["sources"]] == ["prompts.jsonl"]
    first, second = made["rows"]
    assert (first["asked"], first["principle"], first["title"], first["gate"]) == (True, "kind", "Be kind", 0.6)
    assert [(r["stage"], r["use"], r["as"]) for r in first["read_by"]] == [("sl", "trained on it", "p2/r1")]
    assert (second["asked"], second["outcome"], second["reason"], second["read_by"]) == (False, "dropped", "empty", [])
    assert first["diff"] == [["removed", "Take a knife."], ["added", hand.REFUSAL]]
    text = audited(capsys, str(run), "p2/r1")
    for part in (
        "made by revised (critique)", "kind: Be kind", "70.0% that the answer has the fault", "better with 60.0%",
        "what changed  100% of the words: rewritten", "sl (sft), fingerprint print-sl: trained on it",
        "policy:sft: passed its audit: accuracy 75 % (60–86), n 40", "hand version 3", "category violence",
    ):  # fmt: skip
        assert part in text, part
    assert max(map(len, text.splitlines())) <= 100
    assert "one two [-three four-]" in audited(capsys, str(run), "p1/r1")


def test_a_prompt_leads_to_all_its_rows_and_its_file(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(audited(capsys, str(run), "p1", "--json"))
    assert [made["stage"] for made in found["made"]] == ["revised", "ai", "pairs"]
    assert [[row["id"] for row in made["rows"]] for made in found["made"]] == [["p1/r1", "p1/r2"], ["p1/1-2"], ["p1"]]
    (file,) = found["files"]
    assert file["path"].endswith("prompts.jsonl")
    assert not file["changed"]
    assert {r["stage"] for r in file["read_by"]} == {"revised", "ai", "pairs"}
    only = json.loads(audited(capsys, str(run), "p1", "--stage", "ai", "--json"))
    assert [made["stage"] for made in only["made"]] == ["ai"]
    assert [r["stage"] for r in only["files"][0]["read_by"]] == ["ai"]


def test_a_label_leads_to_the_votes_in_both_orders(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = audited(capsys, str(run), "p1/1-2")
    for part in (
        "A is better with 63.3%", "people        prefer A with 100%", "the orders contradict each other",
        "A by sl, fingerprint print-sl, chosen", "B by sft, rejected", "A of p1",
        "dpo (dpo), fingerprint print-dpo: trained on it",
    ):  # fmt: skip
        assert part in text, part
    (line,) = [line for line in text.splitlines() if line.strip().startswith("c  ")]
    assert line.split()[:5] == ["c", "1", "–", "60.0%", "30.0%"]
    assert max(map(len, text.splitlines())) <= 100


def test_a_row_of_a_file_leads_to_the_file_and_its_readers(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(audited(capsys, str(run), "d2", "--json"))
    assert found["made"] == []
    (file,) = found["files"]
    assert file["texts"] == [["user", "Say 2."], ["assistant", "2"]]
    assert [(r["stage"], r["use"]) for r in file["read_by"]] == [("sft", "trained on it"), ("sl", "trained on it")]


def test_what_was_held_out_dropped_copied_or_changed_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    held = {"settings": {"seed": 7, "stage": {"validation": 0.999999}}}
    run = hand.write_trail(tmp_path / "run", tmp_path / "files", sft=held)
    recipe = (run / "recipe.toml").read_text()
    weighted = recipe.replace('"stage:revised"', '{path = "stage:revised", weight = 2}')
    (run / "recipe.toml").write_text(weighted)
    report = {
        "dropped_rows": [{"source": "d", "row": "d2", "reason": "longer than max_tokens = 8"}],
        "contaminated_rows": ["d3"],
    }
    (run / "sl" / "data_report.json").write_text(json.dumps(report))
    uses = {
        row: [(r["stage"], r["use"]) for r in json.loads(audited(capsys, str(run), row, "--json"))["files"][0]["read_by"]]
        for row in ("d1", "d2", "d3")
    }
    held_out = ("sft", "held out for validation")
    assert uses["d1"] == [held_out, ("sl", "trained on it")]
    assert uses["d2"] == [held_out, ("sl", "dropped: longer than max_tokens = 8")]
    assert uses["d3"] == [held_out, ("sl", "left out: it repeats an evaluation prompt")]
    (made,) = json.loads(audited(capsys, str(run), "p1/r1#2", "--json"))["made"]
    assert [r["as"] for r in made["rows"][0]["read_by"]] == ["p1/r1", "p1/r1#2"]
    hand.lines(tmp_path / "files" / "demos.jsonl", [*hand.DEMOS, {"id": "new", "prompt": "Say 4.", "completion": "4"}])
    assert "the file was changed after it was read" in audited(capsys, str(run), "d1")


# --- mistakes ---------------------------------------------------------------------------------------------------------


def test_an_unknown_row_gets_near_ids_and_exit_code_2(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["audit", str(run), "p2/r7"]) == 2
    told = capsys.readouterr().err
    assert 'row "p2/r7" · no row of this run has this id · near: p2/r2, p2/r1' in told
    assert main(["audit", str(run), "p1", "--stage", "revise"]) == 2
    assert 'did you mean "revised"?' in capsys.readouterr().err
    assert main(["audit", str(run), "zzzzzz"]) == 2
    assert "rows are known" in capsys.readouterr().err


def test_a_run_without_rows_and_a_folder_without_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    assert main(["audit", str(run)]) == 2
    assert "not a run folder" in capsys.readouterr().err
    (run / "recipe.toml").write_text('name = "r"\n[[stage]]\nkind = "sft"\nname = "s"\ndata = "nowhere.jsonl"\n')
    assert main(["audit", str(run)]) == 2
    assert "no finished stage makes rows" in capsys.readouterr().err
    assert main(["audit", str(run), "x"]) == 2
    told = capsys.readouterr().err
    assert "no row of this run has this id" in told
    assert "not searched" in told


def test_a_damaged_file_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = hand.write_trail(tmp_path / "run", tmp_path / "files")
    rows = [dict(hand.ROUNDS[0], gate="high"), *hand.ROUNDS[1:]]
    hand.lines(run / "revised" / "rounds.jsonl", rows)
    assert main(["audit", str(run)]) == 2
    told = capsys.readouterr().err
    assert "rounds.jsonl · row 1 · gate: input should be a valid number" in told
    (run / "revised" / "rounds.jsonl").unlink()
    assert main(["audit", str(run)]) == 2
    assert "rounds.jsonl · is missing" in capsys.readouterr().err


def test_a_stage_whose_judge_was_refused_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = hand.write_trail(tmp_path / "run", tmp_path / "files")
    accuracy = {"value": 0.51, "low": 0.36, "high": 0.66, "n": 40}
    (run / "ai").rename(run / ".ai.partial")
    (run / ".ai.partial" / "manifest.json").unlink()
    (run / ".ai.partial" / "judge_audit.json").write_text(json.dumps({"passes": False, "accuracy": accuracy}))
    text = audited(capsys, str(run))
    assert "ai (label) · The judge was refused: accuracy 51 % (36–66), n 40." in text
    found = json.loads(audited(capsys, str(run), "--json"))
    assert [one["stage"] for one in found["unfinished"]] == ["ai"]


# --- the text ---------------------------------------------------------------------------------------------------------


def test_the_summary_fits_100_columns_and_prints_no_prompt(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = audited(capsys, str(run))
    assert max(map(len, text.splitlines())) <= 100
    assert "Question p" not in text
    assert "knife" not in text
    assert "Revisions are preferred in 100 % (34–100) of 2 decided comparisons: not shown to be above chance." in text
    assert "left out of the constitution: no-violence" in text
    assert "its principle" in next(line for line in text.splitlines() if line.startswith("violence"))


def test_a_weak_judge_is_stamped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    weak = {**hand.JUDGE, "passes": False, "allowed_weak": True}
    run = hand.write_trail(tmp_path / "run", tmp_path / "files", ai={"judge": weak})
    text = audited(capsys, str(run), "--stage", "ai")
    assert "WEAK JUDGE ALLOWED" in text
    assert "policy:sft: failed its audit and was used anyway: accuracy 75 % (60–86), n 40" in text
    assert "WEAK JUDGE ALLOWED" in audited(capsys, str(run), "p1/1-2")


def test_a_word_diff_gives_both_texts_back() -> None:
    before, after = "Take the long way\nhome.", "Take a short way\nhome, now."
    pieces = word_diff(before, after)
    assert "".join(p.text for p in pieces if p.kind != "added") == before
    assert "".join(p.text for p in pieces if p.kind != "removed") == after
    assert as_text(pieces) == "Take [-the long-] {+a short+} way\n[-home.-]{+home, now.+}"
    assert word_diff("same text", "same text") == [("same", "same text")]
    assert word_diff("", "") == []
    assert as_text(word_diff("one two three", "one two")) == "one two [-three-]"
    assert as_text(word_diff("one two", "one two three")) == "one two {+three+}"
    # Of four and four words, two are common.
    assert changed_share("a b c d", "a x y d") == 0.5
    assert changed_share("", "") == 0


def test_the_audit_loads_no_torch() -> None:
    code = "import posttrain.constitution.trail, posttrain.constitution.trail_text"
    assert loaded_by(code) & {"torch", "transformers", "datasets", "pyarrow"} == set()
