"""The ppo stage on the tiny model: exact at its start, learns what is rewarded, goes on where it was stopped."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_stages import StopAt, digest, newest, preferences, rows_of, write_rows

from posttrain.data.chat import ChatFormat
from posttrain.data.prompts import prepare_prompts
from posttrain.errors import DataError, Interrupted, RecipeError, TrainingError
from posttrain.models.files import Policies, load_adapter
from posttrain.models.heads import new_head
from posttrain.models.load import BaseModel
from posttrain.models.lora import LoraSettings
from posttrain.recipe import parse_recipe
from posttrain.settings import Recipe
from posttrain.train.ppo import train_ppo
from posttrain.train.reward import train_reward
from posttrain.train.signals import StopSignal
from posttrain.train.stage import StageContext, StageResult

SMALL: dict[str, Any] = {
    "iterations": 3, "prompts": 6, "minibatch": 3, "max_new_tokens": 8, "learning_rate": 1e-3, "missing_eos_penalty": 0.0,
}  # fmt: skip


def recipe_of(data: Path, *, dropout: float = 0.0, **stage: Any) -> Recipe:
    rm = {"kind": "reward", "name": "rm", "data": str(data), "epochs": 6, "batch": 8, "validation": 0.0, "learning_rate": 1e-3}
    ppo = {"kind": "ppo", "name": "ppo", "reward": "rm", "data": str(data), **SMALL, **stage}
    adapter = {"rank": 4, "dropout": dropout}
    return parse_recipe({"name": "t", "base": {"model": "random:tiny"}, "adapter": adapter, "stage": [rm, ppo], "seed": 3})


def random_reward_model(base: BaseModel) -> None:
    """A reward model in memory whose scores differ, made without training."""
    adapter = base.adapters.create("rm", LoraSettings(4, 8.0, 0.0, "all", "standard"), seed=0)
    generator = torch.Generator().manual_seed(1)
    for parameter in adapter.parameters().values():
        parameter.data.normal_(std=0.05, generator=generator)
    adapter.head = new_head(64, seed=1, device=base.device)


def run_ppo(base: BaseModel, folder: Path, *, stop_at: int = 0, **stage: Any) -> StageResult:
    """Train against the reward model in memory, resuming what is in the folder."""
    recipe = recipe_of(preferences(folder.parent / "p.jsonl", rows=20), **stage)
    if "rm" not in base.adapters:
        random_reward_model(base)
    folder.mkdir(parents=True, exist_ok=True)
    stopper = StopAt(stop_at)
    context = StageContext(base, Policies(base, folder.parent), recipe, folder, stopper.stop, (stopper,))
    return train_ppo(context, recipe.stage[1])  # type: ignore[arg-type]


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_before_the_first_step_of_an_iteration_nothing_has_moved(estimator: str, base: BaseModel, tmp_path: Path) -> None:
    run_ppo(base, tmp_path / "ppo", estimator=estimator, completions=1 if estimator == "gae" else 3)
    rows = rows_of(tmp_path / "ppo")
    assert len(rows) == 3 * 2 * 2, "iterations, passes, minibatches"
    for row in rows[::4]:
        assert row["ppo/ratio"] == 1.0
        assert row["ppo/approximate_kl"] == 0.0
        assert row["ppo/clip_fraction"] == 0.0
    assert rows[0]["ppo/kl"] == 0.0, "policy and reference are the same"
    assert rows[-1]["ppo/kl"] != 0.0
    assert all(row["ppo/mismatch"] == 0.0 for row in rows), "sampler and trainer agree in float32"
    assert rows[1]["ppo/approximate_kl"] > 0
    assert ("ppo/value_loss" in rows[0]) == (estimator == "gae")


@pytest.mark.parametrize("estimator", ["gae", "rloo", "grpo"])
def test_it_raises_the_score_of_its_reward_model(estimator: str, base: BaseModel, tmp_path: Path) -> None:
    """Means over 128 completions of two tokens, standard error 0.1; by 0.5 and more, at a KL of a few nats."""
    recipe = recipe_of(preferences(tmp_path / "p.jsonl", rows=20))
    (tmp_path / "rm").mkdir()
    train_reward(StageContext(base, Policies(base, tmp_path), recipe, tmp_path / "rm", StopSignal()), recipe.stage[0])  # type: ignore[arg-type]
    load_adapter(tmp_path / "rm", "rm", base)
    run_ppo(
        base, tmp_path / "ppo", estimator=estimator, iterations=12, prompts=16, minibatch=8, completions=8, max_new_tokens=2,
        learning_rate=1e-2, kl_coef=0.01, value_coef=1.0,
    )  # fmt: skip
    scores = [row["ppo/score"] for row in rows_of(tmp_path / "ppo")][::4]
    assert len(scores) == 12
    assert sum(scores[-3:]) / 3 > scores[0] + 0.5, scores
    assert 0 < rows_of(tmp_path / "ppo")[-1]["ppo/kl"] < 5


@pytest.mark.parametrize("estimator", ["gae", "rloo"])
def test_0_of_10_random_stops_change_the_run(estimator: str, base: BaseModel, tmp_path: Path) -> None:
    """Stops inside of iterations and of passes; with a coefficient that moves, which an iteration takes from the one before."""
    stage = {"estimator": estimator, "completions": 1 if estimator == "gae" else 2, "target_kl": 0.05, "kl_horizon": 30}
    straight = run_ppo(base, tmp_path / "straight", **stage)
    wanted = digest(tmp_path / "straight")
    different = 0
    for k in random.Random(estimator).sample(range(1, straight.fit.steps), 10):
        folder = tmp_path / f"stopped-{k}"
        with pytest.raises(Interrupted):
            run_ppo(base, folder, stop_at=k, **stage)
        run_ppo(base, folder, **stage)
        different += digest(folder) != wanted
        different += (folder / "samples.jsonl").read_bytes() != (tmp_path / "straight/samples.jsonl").read_bytes()
    assert f"{different} of 10" == "0 of 10"
    coefficients = {row["ppo/kl_coef"] for row in rows_of(tmp_path / "straight")}
    assert len(coefficients) == 3


def test_fewer_prompts_than_asked_for_are_all_there_is(base: BaseModel, tmp_path: Path) -> None:
    result = run_ppo(base, tmp_path / "ppo", prompts=64, minibatch=8)
    assert result.fit.steps == 3 * 2 * 3, "twenty prompts are three minibatches"


def test_dropout_is_off_in_ppo(base: BaseModel, tmp_path: Path) -> None:
    run_ppo(base, tmp_path / "ppo", dropout=0.3, iterations=1)
    assert rows_of(tmp_path / "ppo")[0]["ppo/ratio"] == 1.0


def test_the_kl_ceiling_ends_the_stage(base: BaseModel, tmp_path: Path) -> None:
    result = run_ppo(base, tmp_path / "ppo", iterations=9, learning_rate=2e-2, max_kl=0.5)
    assert result.fit.steps % 4 == 0, "before the first step of an iteration"
    assert 4 <= result.fit.steps < 36
    assert newest(tmp_path / "ppo").state["finished"]
    again = run_ppo(base, tmp_path / "ppo", iterations=9, learning_rate=2e-2, max_kl=0.5)
    assert again.fit == result.fit


def test_rollouts_that_are_gone_are_told(base: BaseModel, tmp_path: Path) -> None:
    folder = tmp_path / "ppo"
    with pytest.raises(Interrupted):
        run_ppo(base, folder, stop_at=2)
    (kept,) = (folder / "checkpoints/rollouts").glob("step-*")
    data = bytearray((kept / "state.safetensors").read_bytes())
    data[-3] ^= 1
    (kept / "state.safetensors").write_bytes(data)
    with pytest.raises(TrainingError, match="the rollouts of iteration 1 are missing or damaged"):
        run_ppo(base, folder)


def test_a_sampler_that_is_not_the_trainer_is_told(base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A sampler whose probabilities are a fifth off: the trainer's own differ by more than a tenth for every token."""
    import posttrain.train.ppo as module

    real = module.generate

    def off(*args: Any, **named: Any) -> Any:
        from dataclasses import replace

        return [replace(r, logprobs=tuple(p - 0.2 for p in r.logprobs)) for r in real(*args, **named)]

    monkeypatch.setattr(module, "generate", off)
    with pytest.raises(
        TrainingError, match=r"100\.0% of the sampled tokens have another probability in training · at most 40%"
    ):
        run_ppo(base, tmp_path / "ppo")


@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_a_temperature_is_the_same_everywhere(temperature: float, base: BaseModel, tmp_path: Path) -> None:
    run_ppo(base, tmp_path / "ppo", iterations=1, temperature=temperature)
    assert rows_of(tmp_path / "ppo")[0]["ppo/mismatch"] == 0.0


def test_completions_are_shown_with_their_scores(base: BaseModel, tmp_path: Path) -> None:
    import json

    run_ppo(base, tmp_path / "ppo")
    rows = [json.loads(line) for line in (tmp_path / "ppo/samples.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [1] * 5 + [2] * 5 + [3] * 5
    assert all(0 < row["tokens"] <= 8 for row in rows)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reward": "rmm"}, r'reward = "rmm" is not an earlier reward stage · there is: rm · did you mean "rm"\?'),
        ({"estimator": "grpo"}, 'estimator = "grpo" with completions = 1 · at least 2 completions of a prompt'),
        ({"estimator": "rloo", "completions": 2, "whiten_rewards": True}, 'whiten_rewards with estimator = "rloo"'),
        ({"kl_coef": -0.1}, "kl_coef = -0.1 · greater than or equal to 0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"reference": "rm"}, 'reference = "rm" is not an earlier policy stage'),
    ],
)
def test_what_a_ppo_stage_may_not_be(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path / "p.jsonl", **change)


@pytest.fixture
def chat(base: BaseModel) -> ChatFormat:
    return base.chat


def test_prompts_come_once_and_evaluations_are_left_out(chat: ChatFormat, tmp_path: Path) -> None:
    rows = [{"id": f"r{i}", "prompt": text, "completion": "x"} for i, text in enumerate(["a", "b", "a", "b" * 90, "asked"])]
    data = str(write_rows(tmp_path / "d.jsonl", rows))
    found = prepare_prompts(data, chat, seed=0, max_prompt_tokens=60, evaluation_prompts=("asked",))
    assert [row.id for row in found.train] == ["r0", "r1"]
    assert found.report["duplicates"] == 1
    assert found.report["contaminated"] == 1
    assert found.report["dropped"] == {"longer than max_prompt_tokens = 60": 1}
    with pytest.raises(DataError, match="no prompt of at most 3 tokens"):
        prepare_prompts(data, chat, seed=0, max_prompt_tokens=3, evaluation_prompts=())


def test_the_prompts_of_pairs_and_of_conversations_of_several_turns(chat: ChatFormat, tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "s"}, {"role": "user", "content": "u"}, {"role": "assistant", "content": "a"},
        {"role": "user", "content": "v"}, {"role": "assistant", "content": "b"},
    ]  # fmt: skip
    data = str(write_rows(tmp_path / "d.jsonl", [{"messages": turns}]))
    (row,) = prepare_prompts(data, chat, seed=0, max_prompt_tokens=90, evaluation_prompts=()).train
    text = chat.decode(row.ids, special=True)
    assert "u" in text
    assert "v" not in text
    pairs = preferences(tmp_path / "p.jsonl", rows=4)
    assert len(prepare_prompts(str(pairs), chat, seed=0, max_prompt_tokens=90, evaluation_prompts=()).train) == 4
