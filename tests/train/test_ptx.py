"""PPO's pretraining mix: what eq. 2 adds to the gradient, rows by (seed, step), plain text or demonstrations, bad rows told."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import first_gradient, run_ppo
from tiny_stages import WORDS, demonstrations, rows_of, write_rows

from posttrain.data.prepare import PreparedRows
from posttrain.data.ptx import prepare_ptx
from posttrain.errors import DataError
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import batch_logprobs, pack_rows
from posttrain.settings import Source
from posttrain.stages.ppo import PpoStage
from posttrain.train.ptx import ptx_batches


def texts(path: Path, rows: int = 9) -> Path:
    return write_rows(path, [{"text": " ".join(WORDS[i % 5 : i % 5 + 3 + i])} for i in range(rows)])


def prepared(base: BaseModel, data: Any, *, asked: tuple[str, ...] = (), **changes: Any) -> PreparedRows:
    stage = PpoStage(kind="ppo", name="p", reward="rm", data="x", ptx_coef=1.0, ptx_data=data, **changes)
    return prepare_ptx(stage, base.chat, seed=0, evaluation_prompts=asked)


def test_plain_text_is_trained_whole_and_demonstrations_as_in_sft(base: BaseModel, tmp_path: Path) -> None:
    plain, turns = str(texts(tmp_path / "t.jsonl")), str(demonstrations(tmp_path / "d.jsonl"))
    found = prepared(base, (Source(path=plain), Source(path=turns)))
    first, last = found.train[0], found.train[-1]
    assert base.chat.decode(first.ids, special=True) == "<eos>red blue green", "this tokenizer puts no BOS in front"
    assert first.trained == [False] + [True] * (len(first.ids) - 1)
    assert 0 < sum(last.trained) < len(last.ids) - 1, "the question of a demonstration is not trained"
    assert found.report["rows"] == 9 + 14
    assert [s["layout"] for s in found.report["sources"]] == ["text", "messages"]


def test_long_texts_are_cut_and_asked_ones_left_out_and_counted(base: BaseModel, tmp_path: Path) -> None:
    found = prepared(base, str(texts(tmp_path / "t.jsonl")), asked=("red blue green",), ptx_max_tokens=20)
    assert max(len(row.ids) for row in found.train) == 20
    assert found.report["contaminated"] == 1
    assert found.report["truncated"] == sum(len(row.ids) == 20 for row in found.train)


@pytest.mark.parametrize(
    "rows, message",
    [
        ([{"text": "a"}, {"text": 3}], "1 of 2 rows cannot be trained on .1 rows: text is not text but int .first: row 2.."),
        ([{"text": " "}], "no row left to train on .1 rows: empty text"),
        ([{"story": "a"}], "columns story"),
        ([{"prompt": "a", "chosen": "b", "rejected": "c"}], "this is a preference file"),
    ],
)
def test_rows_that_cannot_be_learned_from_are_told(
    rows: list[dict[str, Any]], message: str, base: BaseModel, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=message):
        prepared(base, str(write_rows(tmp_path / "t.jsonl", rows)))


def test_every_row_comes_once_before_any_comes_twice_and_a_step_needs_no_state(base: BaseModel, tmp_path: Path) -> None:
    rows = prepared(base, str(texts(tmp_path / "t.jsonl"))).train
    ids = [[i for m in ptx_batches(base, rows, step, size=4, seed=5) for i in m.row_ids] for step in range(9)]
    flat = [i for step in ids for i in step]
    assert all(sorted(flat[k : k + 9]) == sorted(row.id for row in rows) for k in range(0, 36, 9))
    assert flat[:9] != flat[9:18], "another order in each round"
    again = [i for m in ptx_batches(base, rows, 7, size=4, seed=5) for i in m.row_ids]
    assert again == ids[7]
    assert ptx_batches(base, [], 0, size=4, seed=5) == []


def test_the_mix_adds_its_mean_token_likelihood_to_the_gradient(base: BaseModel, tmp_path: Path) -> None:
    """The gradient of a first step with the mix less that without is ptx_coef times the mix's own, to 1e-5 of its norm."""
    data, coef = str(texts(tmp_path / "t.jsonl", rows=3)), 0.7
    plain = first_gradient(base, tmp_path / "plain")
    mixed = first_gradient(base, tmp_path / "mixed", ptx_coef=coef, ptx_data=data)
    rows = prepared(base, data).train
    adapter = base.adapters.get("reference")
    adapter.requires_grad_(True)
    logprobs_N = batch_logprobs(base, pack_rows(rows, base.device), "reference")
    parameters = adapter.parameters()
    wanted = torch.autograd.grad(-coef * logprobs_N.mean(), list(parameters.values()))
    adapter.requires_grad_(False)
    norm = float(torch.cat([g.flatten() for g in wanted]).norm())
    for name, gradient in zip(parameters, wanted, strict=True):
        assert float((mixed[name] - plain[name] - gradient).norm()) < 1e-5 * norm, name
    row = rows_of(tmp_path / "mixed")[0]
    assert row["ppo/ptx_loss"] == pytest.approx(-float(logprobs_N.detach().mean()), rel=1e-5)
    assert row["ppo/loss"] == pytest.approx(row["ppo/policy_loss"] + 0.1 * row["ppo/value_loss"] + coef * row["ppo/ptx_loss"])


def test_the_mix_keeps_its_rows_likely(base: BaseModel, tmp_path: Path) -> None:
    """Twelve steps on nine texts: the loss of the mix falls by a nat a token, and without its weight by nothing like it."""
    data = str(texts(tmp_path / "t.jsonl"))
    run_ppo(base, tmp_path / "mixed", ptx_coef=1.0, ptx_data=data, learning_rate=1e-2)
    kept = [row["ppo/ptx_loss"] for row in rows_of(tmp_path / "mixed")]
    run_ppo(base, tmp_path / "weak", ptx_coef=1e-9, ptx_data=data, learning_rate=1e-2)
    weak = [row["ppo/ptx_loss"] for row in rows_of(tmp_path / "weak")]
    assert kept[-1] < kept[0] - 1
    assert weak[-1] > weak[0] - 0.3
