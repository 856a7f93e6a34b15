"""PPO's value function: where it starts, what it stands on, and that it leaves no trace in what is published."""

import json
from pathlib import Path

import pytest
import torch
from ppo_runs import first_gradient, random_adapter, random_reward_model, run_ppo
from safetensors.torch import load_file
from tiny_stages import newest, rows_of

from posttrain.errors import AdapterError
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import pack_trees
from posttrain.train.checkpoint import load_step


def first_values(base: BaseModel, folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The values of the first iteration's tokens, and what the reward model says at the same places [N]."""
    kept = load_step(folder / "checkpoints/rollouts", 0)
    assert kept is not None
    found = []
    with torch.no_grad():
        for prompt, group in zip(kept.state["prompts"], kept.state["completions"], strict=True):
            batch = pack_trees([(prompt, group)], base.device)
            hidden_TD = base.hidden(batch.ids_T, batch.positions_T, batch.segments, "rm")
            found.append(base.scores(hidden_TD[batch.source_N], "rm"))
    return kept.tensors["value"], torch.cat(found)


def test_it_starts_as_the_reward_model_unless_told(base: BaseModel, tmp_path: Path) -> None:
    run_ppo(base, tmp_path / "ppo", iterations=1)
    values_N, reward_N = first_values(base, tmp_path / "ppo")
    assert torch.allclose(values_N, reward_N, atol=1e-5)
    assert float(values_N.std()) > 0.1
    random_reward_model(base, "rm2", seed=5)
    run_ppo(base, tmp_path / "other", iterations=1, value_init="rm2")
    values_N, reward_N = first_values(base, tmp_path / "other")
    assert not torch.allclose(values_N, reward_N, atol=0.1)
    run_ppo(base, tmp_path / "same", iterations=1, value_init="reward")
    assert rows_of(tmp_path / "same") == rows_of(tmp_path / "ppo")


@pytest.mark.parametrize("value", ["own", "shared"])
def test_a_start_at_the_policy_knows_nothing_and_learns(value: str, base: BaseModel, tmp_path: Path) -> None:
    stage = {"learning_rate": 3e-3, "iterations": 1, "ppo_epochs": 6, "value_clip": 0.0}
    run_ppo(base, tmp_path / "ppo", value=value, value_init="policy", init="base", **stage)
    values_N, _ = first_values(base, tmp_path / "ppo")
    assert (values_N == 0).all()
    rows = rows_of(tmp_path / "ppo")
    first, losses = rows[0], [row["ppo/value_loss"] for row in rows]
    assert first["ppo/explained_variance"] == pytest.approx(0.0, abs=1e-5)
    assert first["ppo/value_clip_fraction"] == 0.0
    assert sum(losses[-2:]) < sum(losses[:2]), "the last pass over the same completions"
    names = {n.removeprefix("weight/") for n in newest(tmp_path / "ppo").tensors if n.startswith("weight/value.")}
    assert (names == {"value.score.weight"}) == (value == "shared")


def test_a_shared_value_moves_the_policys_adapter_and_is_not_published(base: BaseModel, tmp_path: Path) -> None:
    """At a head of zeros no gradient reaches the adapter through it; from the second step on it does."""
    own = first_gradient(base, tmp_path / "own", value_init="policy")
    shared = first_gradient(base, tmp_path / "shared", value="shared")
    policy = [name for name in shared if not name.startswith("value.")]
    assert len(shared) == len(policy) + 1
    assert all(torch.equal(own[name], shared[name]) for name in policy)
    run_ppo(base, tmp_path / "weak", value="shared", value_coef=1e-6, learning_rate=1e-2)
    run_ppo(base, tmp_path / "strong", value="shared", value_coef=10.0, learning_rate=1e-2)
    weights = [load_file(tmp_path / name / "adapter_model.safetensors") for name in ("weak", "strong")]
    assert not any("score" in name for name in weights[0])
    assert json.loads((tmp_path / "weak/adapter_config.json").read_text())["task_type"] == "CAUSAL_LM"
    assert any(not torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_a_start_without_a_head_is_told(base: BaseModel, tmp_path: Path) -> None:
    random_reward_model(base)
    random_adapter(base, "rm2")
    with pytest.raises(AdapterError, match='stage "ppo" · value_init = "rm2" has no head · a reward model, or policy'):
        run_ppo(base, tmp_path / "ppo", value_init="rm2")
