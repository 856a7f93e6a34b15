"""The reference of DPO and PPO: the policy starts at it, it never moves, and a damaged or foreign one is refused."""

from math import log
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import random_adapter, run_ppo
from rollout_kl import kl_of_rollouts
from tiny_stages import hashes, preferences, rows_of, run_stage

from posttrain.errors import Interrupted, TrainingError
from posttrain.models.adapter_files import full_state
from posttrain.models.base_model import BaseModel
from posttrain.train.checkpoint import Checkpoint, load_newest, save_checkpoint

LORA: dict[str, Any] = {}
FULL: dict[str, Any] = {"kind": "full"}


def kept(folder: Path) -> dict[str, str]:
    saved = load_newest(folder / "checkpoints" / "reference")
    assert saved is not None
    return hashes(saved.tensors)


@pytest.mark.parametrize("adapter", [LORA, FULL], ids=["lora", "full"])
def test_the_policy_starts_at_a_reference_that_never_moves(adapter: dict[str, Any], base: BaseModel, tmp_path: Path):
    stage = {"data": str(preferences(tmp_path / "p.jsonl")), "epochs": 3, "validation": 0}
    folder = tmp_path / "dpo"
    with pytest.raises(Interrupted):
        run_stage(base, folder, "dpo", adapter=adapter, stop_at=1, **stage)
    first = rows_of(folder)[0]
    assert first["dpo/loss"] == pytest.approx(log(2), abs=1e-6)
    assert 0 <= first["dpo/kl"] <= 1e-6
    assert abs(first["dpo/chosen_log_ratio"]) <= 1e-4
    at_start = kept(folder)
    with pytest.raises(Interrupted):
        run_stage(base, folder, "dpo", adapter=adapter, stop_at=6, **stage)
    assert kept(folder) == at_start
    run_stage(base, folder, "dpo", adapter=adapter, **stage)
    assert kept(folder) == at_start
    last = rows_of(folder)[-1]
    assert last["dpo/kl"] > 1e-4, "the policy has moved, the reference has not"
    run_stage(base, tmp_path / "again", "dpo", adapter=adapter, **stage)
    assert kept(tmp_path / "again") == at_start


def test_below_an_epoch_the_reference_answers_for_what_is_seen(base: BaseModel, tmp_path: Path):
    folder = tmp_path / "dpo"
    run_stage(base, folder, "dpo", data=str(preferences(tmp_path / "p.jsonl", rows=40)), epochs=0.2, validation=0)
    seen = len(rows_of(folder)) * 4
    assert len(kept(folder)) == seen == 8


def test_a_reference_of_another_machine_is_refused_before_a_step(base: BaseModel, tmp_path: Path):
    stage = {"data": str(preferences(tmp_path / "p.jsonl"))}
    folder = tmp_path / "dpo"
    with pytest.raises(Interrupted):
        run_stage(base, folder, "dpo", stop_at=1, **stage)
    reference = folder / "checkpoints" / "reference"
    saved = load_newest(reference)
    assert saved is not None
    save_checkpoint(reference, 0, Checkpoint({n: t * 1.01 for n, t in saved.tensors.items()}, saved.state))
    with pytest.raises(TrainingError, match=r'stage "dpo" · policy and reference differ by .* nats a token before the first'):
        run_stage(base, folder, "dpo", **stage)
    assert len(rows_of(folder)) == 1


def test_a_damaged_reference_is_computed_again(base: BaseModel, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    stage = {"data": str(preferences(tmp_path / "p.jsonl"))}
    folder = tmp_path / "dpo"
    with pytest.raises(Interrupted):
        run_stage(base, folder, "dpo", stop_at=1, **stage)
    before = kept(folder)
    path = folder / "checkpoints" / "reference" / "step-00000000" / "state.safetensors"
    data = bytearray(path.read_bytes())
    data[-7] ^= 1
    path.write_bytes(data)
    run_stage(base, folder, "dpo", **stage)
    assert "reference/step-00000000 refused: state.safetensors does not match its sha256" in capsys.readouterr().err
    assert kept(folder) == before


def test_dropout_is_off_where_nothing_is_learned(base: BaseModel, tmp_path: Path):
    """With dropout the validation loss of a policy is a property of the policy: twice the same number."""
    from rows_of_ids import train_rows

    from posttrain.models.lora import LoraSettings
    from posttrain.train.sft import mean_loss

    adapter = base.adapters.create("p", LoraSettings(4, 8.0, 0.5, "all", "standard"), seed=0)
    for parameter in adapter.parameters().values():
        parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(0))
    adapter.requires_grad_(True)
    state = torch.get_rng_state()
    found = {mean_loss(base, "p", train_rows()) for _ in range(3)}
    assert len(found) == 1
    assert torch.equal(torch.get_rng_state(), state)  # validating more or less often does not change the run


class Watch:
    """A tracker that takes a hash of the base and of an adapter after every step, before its checkpoint is written."""

    def __init__(self, base: BaseModel, adapter: str) -> None:
        self.base, self.adapter, self.found = base, adapter, list[dict[str, str]]()

    def log(self, metrics: dict[str, float], step: int) -> None:
        own = self.base.adapters.get(self.adapter).parameters() if self.adapter != "base" else {}
        self.found.append(hashes({**full_state(self.base), **own}))

    def close(self) -> None:
        """Nothing to close."""


@pytest.mark.parametrize("init", ["sft", "base"])
def test_the_reference_of_ppo_is_the_same_at_every_checkpoint(init: str, base: BaseModel, tmp_path: Path) -> None:
    """1 hash over the 12 steps of a run that was stopped once, and each iteration's KL is to a copy made before the run."""
    if init == "sft":
        random_adapter(base, "sft")
        base.adapters.copy("sft", "before")
    watch, folder, stage = Watch(base, init), tmp_path / "ppo", {"init": init, "checkpoint_every": 1, "learning_rate": 1e-2}
    with pytest.raises(Interrupted):
        run_ppo(base, folder, stop_at=6, trackers=(watch,), **stage)
    run_ppo(base, folder, trackers=(watch,), **stage)
    assert len(watch.found) == 12
    different = sum(found != watch.found[0] for found in watch.found)
    assert f"{different} of 12 different" == "0 of 12 different"
    rows = rows_of(folder)
    assert [row["ppo/kl"] for row in rows[:4]] == [0.0] * 4, "the policy starts at it"
    assert rows[-1]["ppo/kl"] > 0.1, "the policy has moved, the reference has not"
    for iteration in (1, 2):
        found = kl_of_rollouts(base, "before" if init == "sft" else "base", folder, iteration)
        assert found == pytest.approx(rows[iteration * 4]["ppo/kl"], rel=1e-4, abs=1e-5)
