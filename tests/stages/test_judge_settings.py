"""What of a judge belongs to the fingerprint of a stage, and when its rows may still be used."""

from pathlib import Path
from typing import Any

import pytest

from posttrain.constitution.documents import judged_documents
from posttrain.errors import ModelError, RecipeError
from posttrain.stages.critique import KIND as CRITIQUE
from posttrain.stages.critique import CritiqueStage
from posttrain.stages.judge_settings import JudgeSettings
from posttrain.stages.label import KIND as LABEL
from posttrain.stages.label import LabelStage


def critique(**settings: Any) -> CritiqueStage:
    return CritiqueStage(kind="critique", name="c", data="d.jsonl", **settings)


def label(**settings: Any) -> LabelStage:
    return LabelStage(kind="label", name="l", data="d.jsonl", **{"judge": "policy:base", **settings})


@pytest.mark.parametrize(
    ("setting", "value"),
    [("key", "OTHER"), ("concurrency", 1), ("timeout", 1.0), ("retries", 0), ("max_requests", 9), ("max_tokens", 9)],
)
def test_how_a_server_is_asked_does_not_change_the_result(setting: str, value: Any) -> None:
    plain = JudgeSettings(name="http://localhost:1/v1", model="m")
    other = plain.model_copy(update={setting: value})
    assert label(judge=plain).effective() == label(judge=other).effective()


@pytest.mark.parametrize(
    ("setting", "value"), [("model", "n"), ("name", "http://other/v1"), ("reasoning", 3), ("clamp", 0.1), ("template", "plain")]
)
def test_who_is_asked_and_how_it_answers_does(setting: str, value: Any) -> None:
    plain = JudgeSettings(name="http://localhost:1/v1", model="m")
    other = plain.model_copy(update={setting: value})
    assert label(judge=plain).effective() != label(judge=other).effective()


def test_names_and_permissions_are_left_out_of_every_class() -> None:
    one, other = critique(gate="stop"), critique(gate="report", allow_weak_judge=True).model_copy(update={"name": "x"})
    assert one.effective() == other.effective()
    assert one.effective() != critique(rounds=3).effective()


def test_rows_of_a_refused_judge_or_gate_may_not_be_used_by_a_strict_recipe() -> None:
    weak, failed = {"judge": {"allowed_weak": True}}, {"gate": {"passes": False}, "judge": {"allowed_weak": False}}
    assert "allow_weak_judge is false" in LABEL.refuses(label(), weak)
    assert LABEL.refuses(label(allow_weak_judge=True), weak) == ""
    assert "did not pass the gate" in CRITIQUE.refuses(critique(), failed)
    assert CRITIQUE.refuses(critique(gate="report"), {**failed, **weak}) == ""
    assert "allow_weak_judge is false" in CRITIQUE.refuses(critique(), {**weak, "gate": {"passes": True}})
    assert CRITIQUE.refuses(critique(), {"gate": {"passes": True}, "judge": {"allowed_weak": False}}) == ""


def test_the_weights_of_a_judge_outside_of_the_run_are_an_input(tmp_path: Path) -> None:
    assert judged_documents(label(judge="random:tiny"))["judge random:tiny"]
    assert not any(name.startswith("judge") for name in judged_documents(label()))
    with pytest.raises(ModelError):
        judged_documents(label(judge=str(tmp_path / "nowhere")))
    with pytest.raises(RecipeError, match="is made by the run"):
        judged_documents(label(gold="stage:pairs"))
