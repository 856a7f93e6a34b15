"""Two steps of PPO against a reference in float64 that shares no code with it: transformers' own forward, plain loops.

The completions are given: one of no token, one that never ends, two that are equal and so score the same.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import transformers
from ppo_runs import random_adapter, random_reward_model, run_ppo
from tiny_stages import newest, rows_of, write_rows
from torch import Tensor

import posttrain.train.sampling as stage_module
from posttrain.errors import Interrupted
from posttrain.models.base_model import BaseModel
from posttrain.records import Rollout
from posttrain.train.checkpoint import Checkpoint, load_step

END = 4
# Two completions of each of three prompts; the last token 4 ends a turn.
Row = tuple[list[int], list[int]]
GIVEN = [[[40, 41, 42, END], []], [[50, 51, 52, 53, 54, 55], [60, END]], [[70, 71, 70, 71, END], [70, 71, 70, 71, END]]]
FLAT = [completion for group in GIVEN for completion in group]
SETTINGS: dict[str, Any] = {
    "prompts": 3, "completions": 2, "minibatch": 3, "ppo_epochs": 2, "iterations": 1, "temperature": 0.8, "reference": "base",
    "init": "sft", "kl_coef": 0.3, "missing_eos_penalty": 0.7, "gamma": 0.97, "lam": 0.9, "value_coef": 0.5, "value_clip": 0.05,
    "clip_range": 0.1, "clip": 0.0, "learning_rate": 3e-3, "max_mismatch": 1.0,
}  # fmt: skip


class Adapter(NamedTuple):
    """Weights of one role in float64: (A, B) a layer, the scale of their product, and a head where there is one."""

    pairs: dict[str, tuple[Tensor, Tensor]]
    scale: float
    head: Tensor | None


def adapter_of(tensors: dict[str, Tensor], layers: list[str], scale: float) -> Adapter:
    def read(name: str) -> Tensor:
        return tensors[f"base_model.model.{name}.weight"].double().clone().requires_grad_()

    pairs = {layer: (read(f"{layer}.lora_A"), read(f"{layer}.lora_B")) for layer in layers}
    return Adapter(pairs, scale, read("score") if "base_model.model.score.weight" in tensors else None)


def run_model(model: Any, adapter: Adapter | None, ids: list[int]) -> tuple[Tensor, Tensor]:
    """Logits [T, V] and last hidden states [T, D] of one row by itself."""
    changed = {}
    for layer, (a, b) in (adapter.pairs if adapter else {}).items():
        assert adapter is not None
        changed[f"{layer}.weight"] = model.get_parameter(f"{layer}.weight") + adapter.scale * b @ a
    out = torch.func.functional_call(model, changed, (torch.tensor([ids]),), {"output_hidden_states": True})
    return out.logits[0], out.hidden_states[-1][0]


def token_logprobs(model: Any, adapter: Adapter | None, prompt: list[int], completion: list[int]) -> list[Tensor]:
    logits, _ = run_model(model, adapter, prompt + completion)
    return [
        torch.log_softmax(logits[len(prompt) + t - 1] / SETTINGS["temperature"], 0)[token] for t, token in enumerate(completion)
    ]


def token_values(model: Any, adapter: Adapter, prompt: list[int], completion: list[int]) -> list[Tensor]:
    _, hidden = run_model(model, adapter, prompt + completion)
    assert adapter.head is not None
    return [hidden[len(prompt) + t - 1] @ adapter.head[0] for t in range(len(completion))]


def advantages(reward: list[float], value: list[float]) -> list[float]:
    n, gamma, lam = len(reward), SETTINGS["gamma"], SETTINGS["lam"]
    delta = [reward[t] + gamma * (value[t + 1] if t + 1 < n else 0.0) - value[t] for t in range(n)]
    return [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n)) for t in range(n)]


class Judged(NamedTuple):
    """A token of the rollouts as the update sees it."""

    row: int
    place: int
    old: float
    value: float
    advantage: float
    target: float


def judge(model: Any, policy: Adapter, reward: Adapter, rows: list[Row]) -> list[Judged]:
    """Every token's old log-probability, value, whitened advantage and return."""
    found: list[Judged] = []
    for number, (prompt, completion) in enumerate(rows):
        old = [float(x.detach()) for x in token_logprobs(model, policy, prompt, completion)]
        reference = [float(x.detach()) for x in token_logprobs(model, None, prompt, completion)]
        value = [float(x.detach()) for x in token_values(model, reward, prompt, completion)]
        earned = [-SETTINGS["kl_coef"] * (a - b) for a, b in zip(old, reference, strict=True)]
        if completion:
            assert reward.head is not None
            score = float((run_model(model, reward, prompt + completion)[1][-1] @ reward.head[0]).detach())
            earned[-1] += score - (SETTINGS["missing_eos_penalty"] if completion[-1] != END else 0.0)
        for t, a in enumerate(advantages(earned, value)):
            found.append(Judged(number, t, old[t], value[t], a, a + value[t]))
    mean = sum(j.advantage for j in found) / len(found)
    spread = math.sqrt(sum((j.advantage - mean) ** 2 for j in found) / (len(found) - 1) + 1e-8)
    return [j._replace(advantage=(j.advantage - mean) / spread) for j in found]


def update_loss(model: Any, policy: Adapter, value: Adapter, rows: list[Row], judged: list[Judged]) -> Any:
    logprob = [token_logprobs(model, policy, *row) for row in rows]
    values = [token_values(model, value, *row) for row in rows]
    total = torch.zeros((), dtype=torch.float64)
    clipped = 0
    for j in judged:
        ratio = (logprob[j.row][j.place] - j.old).exp()
        bounded = ratio.clamp(1 - SETTINGS["clip_range"], 1 + SETTINGS["clip_range"])
        now = values[j.row][j.place]
        moved = j.value + (now - j.value).clamp(-SETTINGS["value_clip"], SETTINGS["value_clip"])
        wrong = torch.maximum((now - j.target) ** 2, (moved - j.target) ** 2)
        total = total + torch.maximum(-j.advantage * ratio, -j.advantage * bounded) + SETTINGS["value_coef"] * 0.5 * wrong
        clipped += bool(-j.advantage * bounded > -j.advantage * ratio)
    return total / len(judged), clipped / len(judged)


@contextmanager
def in_float64(*models: Any) -> Iterator[None]:
    """Inside, whatever asks torch for float32 gets float64, as norms and rotations do: the same lines in another precision."""
    usual = torch.float32
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "float32", torch.float64)
        patch.setattr(Tensor, "float", Tensor.double)
        for model in models:
            model.double()
        torch.set_default_dtype(torch.float64)
        try:
            yield
        finally:
            torch.set_default_dtype(usual)
            for model in models:
                model.to(usual)


def two_steps(base: BaseModel, folder: Path) -> tuple[dict[str, dict[str, Tensor]], Checkpoint, dict[int, dict[str, Tensor]]]:
    """Train; returns the weights of sft and rm, the rollouts, and what a checkpoint holds after each of the two steps."""
    random_adapter(base, "sft", seed=7)
    random_reward_model(base)
    start = {name: {n: p.detach().clone() for n, p in base.adapters.get(name).parameters().items()} for name in ("sft", "rm")}
    data = write_rows(folder / "d.jsonl", [{"prompt": text, "completion": "x"} for text in ("One?", "Two, then.", "3")])
    with pytest.raises(Interrupted):
        run_ppo(base, folder / "ppo", data=data, stop_at=1, **SETTINGS)
    kept = load_step(folder / "ppo/checkpoints/rollouts", 0)
    assert kept is not None
    first = newest(folder / "ppo").tensors
    run_ppo(base, folder / "ppo", data=data, **SETTINGS)
    return start, kept, {1: first, 2: newest(folder / "ppo").tensors}


@pytest.mark.parametrize("wide", [False, True], ids=["float32", "float64"])
def test_two_steps_are_those_of_a_float64_reference(
    wide: bool, base: BaseModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Promise B9: losses, and the gradient of every tensor by the whole gradient's norm; the second step clips both ratios.

    In float32 to 1e-5 and 1e-4; where the same code runs in float64, to 1e-10.
    """
    to_loss, to_gradient = (1e-10, 1e-10) if wide else (1e-5, 1e-4)
    monkeypatch.setattr(
        stage_module, "generate",
        lambda base, asked, *rest, completions, **named: [
            Rollout(tuple(ids), tuple(c), (0.0,) * len(c), "", c[-1:] == [END], "")
            for ids, c in zip([ids for ids in asked for _ in range(completions)], FLAT, strict=True)
        ],
    )  # fmt: skip
    monkeypatch.setattr(base, "dtype", torch.float64 if wide else torch.float32)
    with in_float64(base.model) if wide else nullcontext():
        start, kept, saved = two_steps(base, tmp_path)
    layers, scale = list(base.adapters.get("sft").weights), base.adapters.get("sft").settings.scale
    rows = [(p, c) for p, group in zip(kept.state["prompts"], kept.state["completions"], strict=True) for c in group]
    assert [c for _, c in rows] == FLAT

    model = transformers.AutoModelForCausalLM.from_pretrained(
        base.source.folder, dtype=torch.float32, attn_implementation="eager"
    )
    policy, reward = adapter_of(start["sft"], layers, scale), adapter_of(start["rm"], layers, scale)
    with in_float64(model):
        judged = judge(model, policy, reward, rows)
    logged = rows_of(tmp_path / "ppo")
    before: dict[str, Tensor] = {}
    for step, row in enumerate(logged, 1):
        if step == 2:
            weights = {n.removeprefix("weight/"): t for n, t in saved[1].items() if n.startswith("weight/")}
            policy = adapter_of(weights, layers, scale)
            value = {n.removeprefix("value."): t for n, t in weights.items() if n.startswith("value.")}
            reward = adapter_of(value, layers, scale)
        with in_float64(model):
            loss, clipped = update_loss(model, policy, reward, rows, judged)
            loss.backward()
        assert row["ppo/loss"] == pytest.approx(loss.item(), rel=to_loss, abs=to_loss / 10)
        assert row["ppo/clip_fraction"] == pytest.approx(clipped, abs=1e-6)
        moment = {n.removeprefix("adam/exp_avg/"): t.double() for n, t in saved[step].items() if n.startswith("adam/exp_avg/")}
        mine = {n: (t - 0.9 * before.get(n, torch.zeros_like(t))) / 0.1 for n, t in moment.items()}
        compare(mine, policy, reward, to_gradient)
        before = moment
    assert logged[1]["ppo/clip_fraction"] > 0
    assert logged[1]["ppo/value_clip_fraction"] > 0


def compare(mine: dict[str, Tensor], policy: Adapter, value: Adapter, limit: float) -> None:
    wanted = {}
    for prefix, adapter in (("", policy), ("value.", value)):
        for layer, (a, b) in adapter.pairs.items():
            wanted[f"{prefix}base_model.model.{layer}.lora_A.weight"] = a.grad
            wanted[f"{prefix}base_model.model.{layer}.lora_B.weight"] = b.grad
    assert value.head is not None
    wanted["value.base_model.model.score.weight"] = value.head.grad
    norm = torch.cat([g.flatten() for g in wanted.values() if g is not None]).norm()
    assert mine.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert gradient is not None
        assert float((mine[name] - gradient).norm() / norm) < limit, name
