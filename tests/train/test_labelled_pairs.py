"""The probability of a pair's label reaches the losses of dpo and of reward models, and the pairs of a prompt one ranking."""

import json
from pathlib import Path

import pytest
import torch
from tiny_stages import digest, preferences, rows_of, run_stage, write_rows

from posttrain.data.formats import read_preferences
from posttrain.data.prepare import prepare_pairs
from posttrain.data.rankings import rank_prompts
from posttrain.models.base_model import BaseModel
from posttrain.train.reward import micro_batches

SHORT = {"epochs": 1, "batch": 7, "validation": 0.0}


def pairs(path: Path, **more: object) -> str:
    """The pairs of `preferences` with further columns."""
    rows = [json.loads(line) | more for line in preferences(path).read_text(encoding="utf-8").splitlines()]
    return str(write_rows(path, rows))


def test_dpo_reads_probabilities_and_no_margins(base: BaseModel, tmp_path: Path) -> None:
    """Labels of one half: at the start the loss is log 2 and no weight is pulled anywhere."""
    run_stage(base, tmp_path / "half", "dpo", data=pairs(tmp_path / "p.jsonl", probability=0.5), **SHORT)
    first = rows_of(tmp_path / "half")[0]
    assert first["dpo/loss"] == pytest.approx(0.693147, abs=1e-5)
    assert first["train/grad_norm"] < 1e-5
    data = pairs(tmp_path / "m.jsonl", margin=-1)
    run_stage(base, tmp_path / "hard", "dpo", data=data, **SHORT)
    assert rows_of(tmp_path / "hard")[0]["train/grad_norm"] > 1e-3


def test_a_column_of_ones_changes_no_bit(base: BaseModel, tmp_path: Path) -> None:
    run_stage(base, tmp_path / "a" / "dpo", "dpo", data=pairs(tmp_path / "a" / "p.jsonl"), **SHORT)
    run_stage(base, tmp_path / "b" / "dpo", "dpo", data=pairs(tmp_path / "b" / "p.jsonl", probability=1.0), **SHORT)
    assert digest(tmp_path / "a" / "dpo") == digest(tmp_path / "b" / "dpo")


@pytest.mark.parametrize("kind", ["dpo", "reward"])
def test_a_label_that_is_surely_wrong_is_the_opposite_label(kind: str, base: BaseModel, tmp_path: Path) -> None:
    data = pairs(tmp_path / "p.jsonl", probability=0.0)
    run_stage(base, tmp_path / "zero", kind, data=data, **SHORT)
    rows = [json.loads(line) for line in Path(data).read_text(encoding="utf-8").splitlines()]
    turned = [{**row, "chosen": row["rejected"], "rejected": row["chosen"], "probability": 1.0} for row in rows]
    run_stage(base, tmp_path / "turned", kind, data=str(write_rows(tmp_path / "t.jsonl", turned)), **SHORT)
    zero, one = rows_of(tmp_path / "zero"), rows_of(tmp_path / "turned")
    for a, b in zip(zero, one, strict=True):
        assert a[f"{kind}/loss"] == pytest.approx(b[f"{kind}/loss"], rel=1e-4)
        assert a["train/grad_norm"] == pytest.approx(b["train/grad_norm"], rel=1e-3)


def test_three_pairs_of_a_prompt_are_one_ranking_with_their_own_probabilities(base: BaseModel, tmp_path: Path) -> None:
    """As a label stage writes them: the answers a, b and c of a prompt in three rows."""
    three = [("1-2", "a", "b", 0.9), ("1-3", "c", "a", 0.6), ("2-3", "c", "b", 0.75)]
    rows = [
        {"id": f"p/{name}", "prompt": [{"role": "user", "content": "Which?"}], "chosen": chosen, "rejected": rejected,
         "probability": probability, "principles": ["short"]}
        for name, chosen, rejected, probability in three
    ]  # fmt: skip
    read = read_preferences(str(write_rows(tmp_path / "p.jsonl", rows)), seed=0, margins=True, probabilities=True)
    prepared = prepare_pairs(read, base.chat, max_tokens=512, validation=0.0, allow_dropped=0.0, evaluation_prompts=())
    (ranked,) = rank_prompts(prepared.train)
    assert len(ranked.completions) == 3
    assert [pair.id for pair in ranked.pairs] == ["p/1-2", "p/1-3", "p/2-3"]
    (micro,) = micro_batches(base, [ranked])
    batch = micro.payload
    assert torch.equal(batch.probability_P, torch.tensor([0.9, 0.6, 0.75]))
    assert batch.share_P.tolist() == pytest.approx([1 / 3] * 3)
    assert batch.batch.rows == 3, "each answer is computed once"
