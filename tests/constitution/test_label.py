"""The label stage: answers, votes of principles, drop reasons, labels, who may judge, and what is trained on the rows."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest
from labelled_runs import LABELS, RULE, lines, manifest, recipe_text, worker_path, write_inputs

from posttrain.artifacts import read_recipe
from posttrain.cli import main
from posttrain.constitution import contrast_pairs, label
from posttrain.constitution.label import agreement_with_people, pair_rows, preference, voted
from posttrain.constitution.label_data import AuthoredAnswer, LabelItem
from posttrain.constitution.principles import Principle, load_constitution
from posttrain.constitution.trail import open_trail, summary, trace
from posttrain.data.prompts import PromptRow
from posttrain.errors import RecipeError
from posttrain.judge.verdict import Verdict
from posttrain.records import Message
from posttrain.stages import label as label_kind
from posttrain.stages.kind import Earlier
from posttrain.stages.label import LabelStage


@pytest.fixture(scope="module", autouse=True)
def small_parts() -> Iterator[None]:
    """Rules that workers find, and parts of which a stage has several."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", worker_path())
        patch.syspath_prepend(str(Path(__file__).parent))
        patch.setattr(label, "PART", 4)
        patch.setattr(label, "COMPARISONS", 8)
        patch.setattr(contrast_pairs, "PART", 4)
        yield


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All label stages, and the stages that train on them. Nobody writes into it."""
    folder = tmp_path_factory.mktemp("labelled")
    write_inputs(folder)
    (folder / "recipe.toml").write_text(recipe_text(folder, LABELS, trained=True), encoding="utf-8")
    assert main(["run", str(folder / "recipe.toml"), "--out", str(folder / "run")]) == 0
    return folder / "run"


def count(text: str) -> int:
    return len(text.split())


# --- votes by hand ----------------------------------------------------------------------------------------------------


def principles(**weights: float) -> list[Principle]:
    return [Principle(id=name, title=name, comparison="Which?", weight=weight) for name, weight in weights.items()]


def item(*answers: AuthoredAnswer, human: float | None = None) -> LabelItem:
    prompt = (Message("user", "Hi"),)
    return LabelItem(PromptRow("p1", [1, 2], "Hi", prompt, "p.jsonl", "words"), [], answers, human)


def row_of(*answers: str) -> dict[str, Any]:
    return pair_rows(item(), [AuthoredAnswer(text, "sft") for text in answers], 3)[0]


def verdicts(**probabilities: float | None) -> list[tuple[Principle, Verdict]]:
    weights = {"one": 1.0, "three": 3.0, "half": 0.5}
    return [
        (p, Verdict(q, q, q) if q is not None else Verdict(None, 0.9, 0.2, "the orders contradict each other"))
        for p, q in zip(principles(**{name: weights[name] for name in probabilities}), probabilities.values(), strict=True)
    ]


def test_the_label_is_the_weighted_mean_of_the_votes_of_principles_that_did_not_abstain() -> None:
    row = voted(row_of("long answer", "short"), verdicts(one=0.9, three=0.3))
    assert row["probability"] == pytest.approx((0.9 + 3 * 0.3) / 4)  # 0.45: b is better
    assert [vote["weight"] for vote in row["votes"]] == [1.0, 3.0]
    labelled = preference(row)
    assert (labelled["chosen"], labelled["rejected"]) == ("short", "long answer")
    assert labelled["probability"] == pytest.approx(0.55)
    assert labelled["principles"] == ["three"], "those that voted for the label"
    abstaining = voted(row_of("long answer", "short"), verdicts(one=0.9, three=None, half=0.6))
    assert abstaining["probability"] == pytest.approx((0.9 + 0.5 * 0.6) / 1.5)
    assert preference(abstaining)["principles"] == ["one", "half"]
    assert abstaining["votes"][1]["why"] == "the orders contradict each other"
    assert (abstaining["votes"][1]["first"], abstaining["votes"][1]["second"]) == (0.9, 0.2)


def test_a_pair_on_which_all_principles_abstain_has_no_label() -> None:
    row = voted(row_of("a b", "c"), verdicts(one=None, three=None))
    assert (row["outcome"], row["reason"], row["probability"]) == (
        "abstained", "the orders contradict each other", None,
    )  # fmt: skip
    assert len(row["votes"]) == 2


def test_tied_votes_give_no_label() -> None:
    row = voted(row_of("a b", "c"), verdicts(one=0.8, three=0.4))
    assert (row["outcome"], row["reason"], row["probability"]) == ("abstained", "the votes are tied", 0.5)


@pytest.mark.parametrize("probability", [1.0, 0.0, 0.999, 0.501])
def test_labels_are_never_clamped(probability: float) -> None:
    labelled = preference(voted(row_of("a", "b"), verdicts(one=probability)))
    assert labelled["probability"] == max(probability, 1 - probability)
    assert labelled["chosen"] == ("a" if probability >= 0.5 else "b")


def test_pairs_that_are_not_judged_say_why() -> None:
    texts = [("a", "x"), ("", "x"), ("a", "y"), ("b", "y"), ("c", "y")]
    answers = [AuthoredAnswer(text, by, ended=text != "c") for text, by in texts]
    rows = pair_rows(item(), answers, 3)
    assert [row["id"] for row in rows] == [f"p1/{i}-{j}" for i, j in combinations(range(1, 6), 2)]
    reasons = {row["id"][3:]: row["reason"] for row in rows}
    assert reasons["1-2"] == reasons["2-3"] == reasons["2-5"] == "an empty answer"
    assert reasons["1-5"] == reasons["4-5"] == "an answer that does not end"
    assert reasons["1-3"] == "equal answers"
    assert reasons["1-4"] == ""
    assert reasons["3-4"] == "the answers of an earlier pair"
    assert Counter(row["outcome"] for row in rows) == {"dropped": 9, "labelled": 1}
    assert (rows[2]["a_by"], rows[2]["b_by"], rows[2]["category"], rows[2]["seed"]) == ("x", "y", "words", 3)


def test_agreement_with_people_counts_pairs_in_which_both_prefer_one() -> None:
    """Four alike of five that both decided: chance is 0.6 * 0.4 + 0.4 * 0.6, so kappa is (0.8 - 0.48) / 0.52."""
    pairs = [(0.9, 1.0), (0.7, 1.0), (0.2, 0.0), (0.1, 0.2), (0.8, 0.0), (0.5, 1.0), (None, 1.0), (0.9, None), (0.9, 0.5)]
    found = agreement_with_people([{"probability": p, "human": h} for p, h in pairs])["agreement_with_people"]
    assert (found["value"], found["n"]) == (0.8, 5)
    assert found["kappa"] == pytest.approx((0.8 - (0.6 * 0.4 + 0.4 * 0.6)) / (1 - (0.6 * 0.4 + 0.4 * 0.6)), abs=1e-4)
    assert agreement_with_people([{"probability": 0.9, "human": None}]) == {}


# --- whole stages -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["ai", "three", "both", "human"])
def test_the_rule_decides_every_label(run: Path, name: str) -> None:
    judged, made = lines(run / name / "judged.jsonl"), lines(run / name / "rows.jsonl")
    assert {row["outcome"] for row in judged} >= {"labelled"}
    for row in judged:
        a, b = count(row["a"]), count(row["b"])
        if row["outcome"] != "dropped":
            assert row["probability"] == (None if a == b else float(a > b))
            assert row["outcome"] == ("abstained" if a == b else "labelled")
            assert len(row["votes"]) == (1 if name == "three" else 2)
    labelled = {row["id"]: row for row in judged if row["outcome"] == "labelled"}
    assert [row["id"] for row in made] == list(labelled)
    for row in made:
        pair = labelled[row["id"]]
        assert {row["chosen"], row["rejected"]} == {pair["a"], pair["b"]}
        assert count(row["chosen"]) > count(row["rejected"])
        assert row["probability"] == 1.0
        assert row["principles"] == [vote["principle"] for vote in pair["votes"]]
    found = manifest(run, name)
    outcomes = Counter(row["outcome"] for row in judged)
    dropped = Counter(row["reason"] for row in judged if row["outcome"] == "dropped")
    assert found["items"] == len(made)
    assert found["pairs"] == {
        "labelled": outcomes["labelled"], "abstained": outcomes["abstained"], "dropped": dict(dropped),
    }  # fmt: skip
    assert found["labelled_by"] == "judge"
    assert found["judge"]["name"] == "rule:label_rules:words"
    assert found["judge"]["passes"] is True
    assert found["constitution"]["name"] == "two"
    lost = len(judged) - len(made)
    assert any(warning.startswith(f"{lost} of {len(judged)} pairs have no label: ") for warning in found["warnings"]) == (
        lost > 0
    )


def test_two_answers_make_one_pair_and_three_answers_three(run: Path) -> None:
    prompts = [f"p{n}" for n in range(9)]
    assert [row["id"] for row in lines(run / "ai" / "judged.jsonl")] == [f"{p}/1-2" for p in prompts]
    three = lines(run / "three" / "judged.jsonl")
    assert [row["id"] for row in three] == [f"{p}/{pair}" for p in prompts for pair in ("1-2", "1-3", "2-3")]
    voters = Counter(vote["principle"] for row in three for vote in row["votes"])
    assert voters.keys() == {"full", "useful"}, "one principle is drawn for each prompt"
    assert all(len({vote["principle"] for r in three if r["prompt_id"] == p for vote in r["votes"]}) <= 1 for p in prompts)


def test_several_policies_answer_each_prompt(run: Path) -> None:
    judged = lines(run / "both" / "judged.jsonl")
    assert {(row["a_by"], row["b_by"]) for row in judged} == {("sft", "other")}
    assert manifest(run, "both")["inputs"].keys() == {"sft", "other"}
    assert {(row["a_by"], row["b_by"]) for row in lines(run / "ai" / "judged.jsonl")} == {("sft", "sft")}


def test_pairs_of_the_data_are_judged_and_compared_with_people(run: Path) -> None:
    """Six of seven decided pairs have the longer answer as chosen; the eighth has answers of equal length."""
    judged = {row["id"]: row for row in lines(run / "human" / "judged.jsonl")}
    assert list(judged) == [f"h{n}/1-2" for n in range(8)]
    assert {(row["a_by"], row["b_by"]) for row in judged.values()} == {("data", "data")}
    assert len({row["a"] for row in judged.values()}) > 2, "which answer comes first is drawn"
    assert judged["h1/1-2"]["human"] == (1.0 if judged["h1/1-2"]["a"] == "old and new" else 0.0)
    assert judged["h0/1-2"]["human"] == pytest.approx(0.8 if judged["h0/1-2"]["a"] == "old and new" else 0.2)
    assert judged["h7/1-2"]["outcome"] == "abstained"
    found = manifest(run, "human")
    assert found["agreement_with_people"]["value"] == round(6 / 7, 4)
    assert found["agreement_with_people"]["n"] == 7
    assert found["inputs"] == {}, "no policy answers"


def test_a_weak_judge_is_stamped_and_its_probabilities_reach_the_rows(run: Path) -> None:
    found = manifest(run, "weak")
    assert (found["judge"]["passes"], found["judge"]["allowed_weak"]) == (False, True)
    assert any("failed its audit" in warning for warning in found["warnings"])
    probabilities = [row["probability"] for row in lines(run / "weak" / "rows.jsonl")]
    assert all(0.5 <= p < 1 for p in probabilities)
    assert (run / "weak" / "judge_audit.json").exists()


def test_a_refused_judge_leaves_its_place_to_contrast(run: Path) -> None:
    found = manifest(run, "contrasted")
    assert found["labelled_by"] == "contrast"
    assert "the judge policy:base failed its audit" in found["labelled_by_why"]
    assert (found["judge"]["passes"], found["judge"]["allowed_weak"]) == (False, False)
    assert any("contrast labels these pairs" in warning for warning in found["warnings"])
    assert not (run / "contrasted" / "judged.jsonl").exists()
    assert all("probability" not in row for row in lines(run / "contrasted" / "rows.jsonl"))


@pytest.mark.parametrize("name", ["rm-ai", "dpo"])
def test_labels_and_human_preferences_mix(run: Path, name: str) -> None:
    found = manifest(run, name)
    folder = run.parent
    assert found["rows"] == {"stage:ai": len(lines(run / "ai" / "rows.jsonl")), str(folder / "human.jsonl"): 8}
    assert found["inputs"]["ai"] == manifest(run, "ai")["fingerprint"]


def test_the_audit_has_the_votes_of_every_row_and_who_trained_on_it(run: Path) -> None:
    trail = open_trail(run, read_recipe(run)[0])
    for row in lines(run / "ai" / "rows.jsonl"):
        (made,) = [entry for entry in trace(trail, row["id"])["made"] if entry["stage"] == "ai"]
        (asked,) = [entry for entry in made["rows"] if entry["asked"]]
        assert asked[asked["chosen"]] == row["chosen"]
        assert [(reader["stage"], reader["use"]) for reader in asked["read_by"]] == [
            ("rm-ai", "trained on it"), ("dpo", "trained on it"),
        ]  # fmt: skip
    stages = {stage["stage"]: stage for stage in summary(trail)["stages"]}
    kappa = stages["human"]["labels"]["human"]["kappa"]
    assert (round(kappa["value"], 4), kappa["n"]) == (manifest(run, "human")["agreement_with_people"]["kappa"], 7)
    assert [stage["labels"]["unexplained"] for stage in stages.values() if "labels" in stage] == [0] * 5
    assert stages["contrasted"]["contrast"]["pairs"] == len(lines(run / "contrasted" / "rows.jsonl"))


# --- resume and fingerprints ------------------------------------------------------------------------------------------


def test_stops_among_the_answers_and_among_the_votes_change_no_byte(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "three")
    parts: list[str] = []
    in_parts = label.in_parts

    def stopping(context: Any, items: Any, work: Any, *, name: str, doing: str, size: int) -> Any:
        def counted(part: Any, number: int) -> Any:
            made = work(part, number)
            parts.append(f"{re.sub('-[0-9a-f]{16}$', '', name)} {number}")
            context.stop.asked |= parts[-1] in ("three-answers-sft 1", "three-judged 1")
            return made

        return in_parts(context, items, counted, name=name, doing=doing, size=size)

    monkeypatch.setattr(label, "in_parts", stopping)
    for finished in (False, False, True):
        assert main(["run", str(run.parent / "recipe.toml"), "--out", str(copy), "--until", "three"]) == 0
        assert (copy / "three").exists() == finished
    wanted = [*(f"three-answers-sft {n}" for n in range(3)), *(f"three-judged {n}" for n in range(4))]
    assert parts == wanted, "no part is made twice"
    for file in ("judged.jsonl", "rows.jsonl"):
        assert (copy / "three" / file).read_bytes() == (run / "three" / file).read_bytes()


@pytest.mark.parametrize(
    ("file", "old", "new", "why"),
    [("two.toml", "says more", "says less", "data constitution"), ("gold.jsonl", "no no", "no no no", "data gold")],
)
def test_another_constitution_or_other_gold_pairs_make_the_labels_again(
    run: Path, capsys: pytest.CaptureFixture[str], file: str, old: str, new: str, why: str
) -> None:
    path = run.parent / file
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(old, new), encoding="utf-8")
    try:
        assert main(["run", str(run.parent / "recipe.toml"), "--out", str(run), "--dry-run", "--json"]) == 0
    finally:
        path.write_text(text, encoding="utf-8")
    steps = {step["step"]: step for step in json.loads(capsys.readouterr().out)["steps"]}
    assert (steps["sft"]["status"], steps["ai"]["status"], steps["dpo"]["status"]) == ("done", "due", "due")
    assert why in steps["ai"]["why"]


# --- mistakes ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ('judge = "policy:nobody"', 'judge = "nobody" is not an earlier policy stage'),
        ('judge = "reward:sft"', 'judge = "reward:sft" is not an earlier reward stage · there is: rm'),
        ('judge = "rule:words"', 'judge = "rule:words" does not name a function'),
        ('judge = "rule:label_rules:nothing"', "label_rules"),
        (f'{RULE}\npolicies = ["nobody"]', 'policies = "nobody" is not an earlier policy stage'),
        (f'{RULE}\npolicies = ["sft"]', 'the policy "sft" answers twice'),
        (f'{RULE}\nanswers = 0\npolicies = ["other"]', "policies with answers = 0"),
        (f"{RULE}\nanswers = 1", "answers = 1 of one policy"),
        (f"{RULE}\ntemperature = 0.0", "temperature = 0 with answers = 2, which are all equal"),
        (f'{RULE}\nallow_weak_judge = true\nif_judge_refused = "contrast"', "allow_weak_judge = true with if_judge_refused"),
        (f"{RULE}\nanswers = 0", "columns"),
        (f'{RULE}\nleave_out = ["harm"]', 'leave_out = "harm" is neither an id nor a tag'),
        (f'{RULE}\nleave_out = ["full", "help"]', "leave_out removes every principle"),
        ("", '"judge" is missing'),
    ],
)
def test_mistakes_are_told_before_weights_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], more: str, message: str
) -> None:
    write_inputs(tmp_path)
    text = recipe_text(tmp_path, {"ai": more}).replace("temperature = 0.7\n", "")
    (tmp_path / "recipe.toml").write_text(text, encoding="utf-8")
    assert main(["run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert message in told
    assert "loading" not in told
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("name", ["comparison", "gold"])
def test_files_that_cannot_be_used_are_told_before_weights_load(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    write_inputs(tmp_path)
    text = (tmp_path / "two.toml").read_text(encoding="utf-8")
    if name == "comparison":
        (tmp_path / "two.toml").write_text(text.replace('comparison = "Which answer is more useful?"\n', ""), encoding="utf-8")
    else:
        (tmp_path / "gold.jsonl").unlink()
    (tmp_path / "recipe.toml").write_text(recipe_text(tmp_path, {"ai": RULE}), encoding="utf-8")
    assert main(["run", str(tmp_path / "recipe.toml"), "--out", str(tmp_path / "run")]) == 2
    told = capsys.readouterr().err
    assert ('principle "useful" has no comparison' if name == "comparison" else "gold.jsonl") in told
    assert "loading" not in told
    assert not (tmp_path / "run").exists()


def test_a_principle_without_a_question_may_be_left_out(tmp_path: Path) -> None:
    write_inputs(tmp_path)
    text = (tmp_path / "two.toml").read_text(encoding="utf-8")
    (tmp_path / "two.toml").write_text(text.replace('comparison = "Which answer is more useful?"\n', ""), encoding="utf-8")
    constitution = load_constitution(str(tmp_path / "two.toml"))
    assert [p.id for p in constitution.without(["help"], "w").having("comparison", "w")] == ["full"]
    with pytest.raises(RecipeError, match="has no comparison"):
        constitution.having("comparison", "w")


def test_with_0_answers_only_rows_that_are_preferences_can_be_judged() -> None:
    stage = LabelStage(kind="label", name="ai", data="stage:made", judge="rule:a:b", answers=0)
    label_kind.KIND.check(stage, Earlier("r", False, (), (), {"made": "preferences"}))
    with pytest.raises(RecipeError, match='"stage:made" makes demonstrations, and answers = 0 needs pairs'):
        label_kind.KIND.check(stage, Earlier("r", False, (), (), {"made": "demonstrations"}))


def test_a_judge_that_fails_its_audit_stops_the_run_before_an_answer_is_sampled(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """If it is allowed all the same, its audit is not repeated; if it decides no pair, the error has the reasons."""
    copy, recipe = tmp_path / "run", tmp_path / "recipe.toml"
    shutil.copytree(run, copy)
    recipe.write_text(recipe_text(run.parent, {"ai": 'judge = "policy:base"'}), encoding="utf-8")
    command = ["run", str(recipe), "--out", str(copy), "--until", "ai"]
    assert main(command) == 2
    told = capsys.readouterr().err
    assert 'error: stage "ai" · the judge "policy:base" decided none of 3 gold pairs' in told
    assert "allow_weak_judge" in told
    assert "contrast" in told
    assert not list((copy / ".ai.partial").glob("checkpoints/*answers*"))
    audited = (copy / ".ai.partial" / "judge_audit.json").stat().st_mtime_ns
    assert main([*command, "--set", "ai.allow_weak_judge=true"]) == 2
    assert "none of 9 pairs has a label (" in capsys.readouterr().err
    assert (copy / ".ai.partial" / "judge_audit.json").stat().st_mtime_ns == audited
    assert list((copy / ".ai.partial").glob("checkpoints/*answers*"))
