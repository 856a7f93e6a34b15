"""The ppo stage on the tiny model: exact at its start, learns what is rewarded, goes on where it was stopped."""

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from ppo_runs import first_gradient, recipe_of, run_ppo
from tiny_stages import demonstrations, digest, preferences, rows_of, write_rows

from posttrain.data.chat import ChatFormat
from posttrain.data.prompts import prepare_prompts
from posttrain.errors import DataError, Interrupted, RecipeError, TrainingError
from posttrain.models.adapter_files import Policies, load_adapter
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import MICRO_TOKENS
from posttrain.plan import make_plan
from posttrain.recipe import Recipe, parse_recipe
from posttrain.stop import StopSignal
from posttrain.train.reward import train_reward
from posttrain.train.stage import StageContext
from posttrain.train.value import value_source


def test_repetitions_differ_by_a_seed_of_the_stage(base: BaseModel, tmp_path: Path) -> None:
    """The recipe's seed is 3; another draws other samples, the same number the same ones."""
    ends = {}
    for name, extra in (("none", {}), ("same", {"seed": 3}), ("other", {"seed": 4})):
        run_ppo(base, tmp_path / name, **extra)
        ends[name] = digest(tmp_path / name)
    assert ends["same"] == ends["none"]
    assert ends["other"]["rows"][0]["ppo/score"] != ends["none"]["rows"][0]["ppo/score"]


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
        learning_rate=1e-2, kl_coef=0.01, **({"value_coef": 1.0} if estimator == "gae" else {}),
    )  # fmt: skip
    scores = [row["ppo/score"] for row in rows_of(tmp_path / "ppo")][::4]
    assert len(scores) == 12
    assert sum(scores[-3:]) / 3 > scores[0] + 0.5, scores
    assert 0 < rows_of(tmp_path / "ppo")[-1]["ppo/kl"] < 5


RESUMED: dict[str, dict[str, Any]] = {
    "gae": {"target_kl": 0.05, "kl_horizon": 30},
    "rloo": {"estimator": "rloo", "completions": 2, "target_kl": 0.05, "kl_horizon": 30},
    # three iterations take two passes of three, the fourth takes all
    "shared value, mix, passes left out": {
        "value": "shared",
        "ptx_coef": 1.0,
        "ppo_epochs": 3,
        "iterations": 4,
        "max_update_kl": 0.025,
    },
}


@pytest.mark.parametrize("kind", RESUMED)
def test_0_of_10_random_stops_change_the_run(kind: str, base: BaseModel, tmp_path: Path) -> None:
    """Stops inside of iterations and of passes: 0 of 30 differ in a bit of weights, moments, counters, metrics and samples.

    10 stops each: with a coefficient that moves, which an iteration takes from the one before (gae, rloo), and with a shared
    value head, a pretraining mix and passes that are left out.
    """
    stage = dict(RESUMED[kind])
    if "ptx_coef" in stage:
        stage["ptx_data"] = str(demonstrations(tmp_path / "d.jsonl", rows=8))
    straight = run_ppo(base, tmp_path / "straight", **stage)
    wanted = digest(tmp_path / "straight")
    steps = [row["step"] for row in wanted["rows"]]
    assert straight.fit.steps == len(steps)
    different = 0
    for k in random.Random(kind).sample(steps[:-1], 10):
        folder = tmp_path / f"stopped-{k}"
        with pytest.raises(Interrupted):
            run_ppo(base, folder, stop_at=k, **stage)
        again = run_ppo(base, folder, **stage)
        different += digest(folder) != wanted or again.fit.steps != straight.fit.steps
        different += (folder / "samples.jsonl").read_bytes() != (tmp_path / "straight/samples.jsonl").read_bytes()
    assert f"{different} of 10" == "0 of 10"
    assert len({row["ppo/kl_coef"] for row in wanted["rows"]}) == (3 if "target_kl" in stage else 1)
    if "max_update_kl" in stage:
        taken = [sum(k * 6 < step <= (k + 1) * 6 for step in steps) for k in range(4)]
        assert min(taken) < 6, "passes are left out"
        assert len(set(taken)) > 1, "not in every iteration the same"


def test_a_stage_goes_on_from_a_checkpoint_of_many_iterations_ago(base: BaseModel, tmp_path: Path) -> None:
    """The newest checkpoint is damaged and the one before lies four iterations back: its rollouts are still there."""
    stage = {"iterations": 5, "target_kl": 0.05}
    run_ppo(base, tmp_path / "straight", **stage)
    folder = tmp_path / "ppo"
    for k in (2, 18):
        with pytest.raises(Interrupted):
            run_ppo(base, folder, stop_at=k, **stage)
    (folder / "checkpoints/step-00000018/state.json").write_text("{}")
    run_ppo(base, folder, **stage)
    assert digest(folder) == digest(tmp_path / "straight")


def test_fewer_prompts_than_asked_for_are_all_there_is(base: BaseModel, tmp_path: Path) -> None:
    result = run_ppo(base, tmp_path / "ppo", prompts=64, minibatch=8)
    assert result.fit.steps == 3 * 2 * 3, "twenty prompts are three minibatches"


def test_dropout_is_off_in_ppo(base: BaseModel, tmp_path: Path) -> None:
    run_ppo(base, tmp_path / "ppo", dropout=0.3, iterations=1)
    assert rows_of(tmp_path / "ppo")[0]["ppo/ratio"] == 1.0


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
    import posttrain.train.sampling as module

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
    run_ppo(base, tmp_path / "several", completions=5, iterations=1)
    several = [json.loads(line) for line in (tmp_path / "several/samples.jsonl").read_text().splitlines()]
    assert len({row["prompt"] for row in several}) == 5, "of six prompts, five completions each"


@pytest.mark.parametrize(
    "change, message",
    [
        ({"reward": "rmm"}, r'reward = "rmm" is not an earlier reward stage · there is: rm, rm2 · did you mean "rm"\?'),
        ({"estimator": "grpo"}, 'estimator = "grpo" with completions = 1 · at least 2 completions of a prompt'),
        ({"estimator": "rloo", "completions": 2, "whiten_rewards": True}, 'whiten_rewards with estimator = "rloo"'),
        (
            {"estimator": "grpo", "completions": 2, "value": "own", "lam": 0.9},
            'lam, value with estimator = "grpo" · estimator = "gae"',
        ),
        ({"value_init": "sft"}, 'value_init = "sft" is not an earlier reward stage · there is: auto, reward, policy, rm, rm2'),
        ({"value": "shared", "value_init": "rm2"}, 'value_init = "rm2" with value = "shared" · auto or policy'),
        ({"value": "both"}, "value = 'both' · 'auto', 'own' or 'shared'"),
        ({"target_kl": 6.0, "kl_coef": 0.0}, "target_kl = 6 with kl_coef = 0, which a factor cannot change · kl_coef above 0"),
        ({"kl_horizon": 10_000}, "kl_horizon without target_kl · target_kl above 0"),
        ({"ptx_coef": 1.0}, "ptx_coef = 1 without ptx_data · both or neither"),
        ({"ptx_data": "starter/demonstrations.jsonl"}, "ptx_data with ptx_coef = 0 · both or neither"),
        ({"kl_coef": -0.1}, "kl_coef = -0.1 · greater than or equal to 0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0"),
        ({"reference": "rm"}, 'reference = "rm" is not an earlier policy stage'),
    ],
)
def test_what_a_ppo_stage_may_not_be(change: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=message):
        recipe_of(tmp_path / "p.jsonl", **change)


def named(names: str, **ppo: Any) -> Recipe:
    """Two reward stages of these names, and a ppo stage that is paid by the first."""
    rewards = [{"kind": "reward", "name": name, "data": "p.jsonl"} for name in names.split()]
    stage = {"kind": "ppo", "name": "ppo", "reward": rewards[0]["name"], "data": "p.jsonl", **ppo}
    return parse_recipe({"name": "t", "base": {"model": "random:tiny"}, "stage": [*rewards, stage]})


@pytest.mark.parametrize("word", ["auto", "reward", "policy"])
def test_a_reward_stage_called_like_a_word_of_value_init(word: str) -> None:
    """Nothing is in doubt until `value_init` says the word, and with `reward` where it is that very model."""
    assert value_source(named(f"rm {word}").stage[-1]) == "rm"  # type: ignore[arg-type]
    assert value_source(named(f"{word} rm").stage[-1]) == word  # type: ignore[arg-type]
    told = f'value_init = "{word}" is a keyword and also a reward stage · give the stage another name'
    with pytest.raises(RecipeError, match=told):
        named(f"rm {word}", value_init=word)
    if word == "reward":
        assert value_source(named("reward rm", value_init="reward").stage[-1]) == "reward"  # type: ignore[arg-type]


def test_a_policy_called_like_a_word_of_value_init_is_no_input(tmp_path: Path) -> None:
    data = str(preferences(tmp_path / "p.jsonl"))
    for word in ("auto", "policy"):
        sft = {"kind": "sft", "name": word, "data": str(demonstrations(tmp_path / "d.jsonl"))}
        rm = {"kind": "reward", "name": "rm", "data": data}
        ppo = {"kind": "ppo", "name": "ppo", "reward": "rm", "data": data, "value_init": word}
        raw = {"name": "t", "base": {"model": "random:tiny"}, "stage": [sft, rm, ppo]}
        (step,) = (s for s in make_plan(parse_recipe(raw), tmp_path / "run").steps if s.name == "ppo")
        assert list(step.inputs) == ["base", "rm"]


@pytest.fixture
def chat(base: BaseModel) -> ChatFormat:
    return base.chat


def test_prompts_that_leave_no_room_are_told_before_anything_is_computed(base: BaseModel, tmp_path: Path) -> None:
    rows = [{"id": "short", "prompt": "a", "completion": "x"}, {"id": "long", "prompt": "b" * 1000, "completion": "x"}]
    data = write_rows(tmp_path / "d.jsonl", rows)
    told = r'stage "ppo" · the prompt long of 10\d\d tokens and 1200 new ones · together at most 2048, the base'
    with pytest.raises(DataError, match=told):
        run_ppo(base, tmp_path / "ppo", data=data, max_prompt_tokens=1500, max_new_tokens=1200)
    assert not list((tmp_path / "ppo").iterdir())


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
    asked = {"max_prompt_tokens": 60, "evaluation_prompts": ("a", "b", "asked")}
    with pytest.raises(DataError, match=r"no prompt of at most 60 tokens \(1 longer, 4 evaluation prompts\)"):
        prepare_prompts(data, chat, seed=0, **asked)  # type: ignore[arg-type]


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


@pytest.mark.parametrize("value", ["own", "shared"])
@pytest.mark.parametrize("tokens", [1, 60])
def test_how_a_step_is_cut_changes_no_gradient(
    tokens: int, value: str, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise B1: a step of six prompts of 17 to 20 tokens at once, one by one, and by threes with a ragged rest."""
    whole = first_gradient(base, tmp_path / "whole", value=value, minibatch=6)
    monkeypatch.setitem(MICRO_TOKENS, "cpu", tokens)
    cut = first_gradient(base, tmp_path / "cut", value=value, minibatch=6)
    assert cut.keys() == whole.keys()
    for name, gradient in whole.items():
        assert torch.allclose(cut[name], gradient, rtol=1e-4, atol=1e-6), name
    first, second = rows_of(tmp_path / "whole")[0], rows_of(tmp_path / "cut")[0]
    assert second["memory/activations"] < first["memory/activations"] / 1.5, "it was cut"
    del first["memory/activations"], second["memory/activations"]
    assert second == pytest.approx(first, rel=1e-4, abs=1e-6)


def test_the_entropy_bonus_is_part_of_the_update(base: BaseModel, tmp_path: Path) -> None:
    """At ratio 1 it costs minus the samples' entropy, and it changes the gradient."""
    plain = first_gradient(base, tmp_path / "plain", minibatch=6)
    bonus = first_gradient(base, tmp_path / "bonus", minibatch=6, entropy_coef=0.5)
    (first, second) = (rows_of(tmp_path / name)[0] for name in ("plain", "bonus"))
    assert second["ppo/policy_loss"] - first["ppo/policy_loss"] == pytest.approx(-0.5 * first["ppo/entropy"], rel=1e-4)
    assert any(not torch.allclose(bonus[name], plain[name], rtol=0.1) for name in plain if not name.startswith("value."))
