"""The plan's numbers: rows and tokens counted by hand on the byte-level tiny model, operations by the formulas."""

import json
from pathlib import Path
from typing import Any

import pytest

from posttrain.errors import DataError
from posttrain.estimate import describe
from posttrain.recipe import load_recipe
from tiny_runs import TINY

BODY, HEAD = 2 * (2 * (64 * 64 + 64 * 32) + 3 * 64 * 128), 263 * 64
RECIPE = """
name = "counted"
[base]
model = "random:tiny"
template = "plain"
[evaluation]
suites = ["suite.toml"]
max_new_tokens = 10
samples = ["abcd"]
sample_tokens = 7
[[stage]]
kind = "sft"
name = "sft"
data = "d.jsonl"
epochs = 3
validation = 0.0
[[stage]]
kind = "dpo"
name = "dpo"
init = "sft"
data = "p.jsonl"
epochs = 2
validation = 0.0
"""
SUITE = """
name = "mine"
[[task]]
name = "ask"
answer = "generate"
scorer = "refusal"
items = "ask.jsonl"
[[task]]
name = "choose"
answer = "choices"
items = "choose.jsonl"
[[task]]
name = "read"
answer = "perplexity"
items = "read.jsonl"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    files: dict[str, list[dict[str, Any]]] = {
        "d.jsonl": [{"messages": [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "xyz"}]}] * 2,
        "p.jsonl": [{"prompt": "cd", "chosen": "yes", "rejected": "n"}],
        "ask.jsonl": [{"id": "1", "prompt": "q1"}, {"id": "2", "prompt": "q2"}],
        "choose.jsonl": [{"id": "1", "question": "1+1=", "choices": [" 2", " 3"], "answer": 0}],
        "read.jsonl": [{"id": "1", "text": "hello"}],
    }
    for name, rows in files.items():
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "r.toml").write_text(RECIPE)
    (tmp_path / "suite.toml").write_text(SUITE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_rows_and_tokens_are_those_that_can_be_counted_by_hand(folder: Path):
    plan, _ = describe(load_recipe(folder / "r.toml"), folder / "run")
    steps = {step["step"]: step for step in plan["steps"]}
    # a token a byte; the template "plain" writes BOS, "Question: ab\nAnswer:", then " xyz" and EOS
    frame = 1 + len("Question: \nAnswer:")
    assert plan["parameters"] == BODY + HEAD
    sft = steps["sft"]
    assert (sft["rows"], sft["targets"]) == (2 * 3, 2 * 3 * (len(" xyz") + 1))
    assert sft["tokens"] == 2 * 3 * (frame + len("ab") + len(" xyz") + 1)
    dpo = steps["dpo"]
    assert dpo["rows"] == 1 * 2
    assert dpo["targets"] == 2 * (len(" yes") + 1 + len(" n") + 1)
    scored = steps["evaluate sft"]
    assert scored["rows"] == 2 + 1 + 1
    choices, prose = 2 * len(" 2"), len("hello")
    assert scored["targets"] == 2 * 10 + 7 + choices + prose
    assert scored["tokens"] == 2 * (frame + len("q1") + 10) + 7 + len("1+1=") + choices + prose


def test_the_text_says_what_was_counted_and_nothing_is_written(folder: Path):
    plan, text = describe(load_recipe(folder / "r.toml"), folder / "run")
    assert text.splitlines()[0] == f"{folder / 'run'} · random:tiny · 0.1M parameters"
    assert text.splitlines()[-1] == "under a second of computing on this machine; nothing was changed"
    assert all("seconds" in step for step in plan["steps"])
    assert not (folder / "run").exists()


def test_more_work_takes_longer_in_the_same_proportion():
    recipe = load_recipe(TINY, ("sft.epochs=100000", "dpo.epochs=100000", "base.device=cpu"))
    once, _ = describe(recipe, Path("nowhere"))
    by_step = {step["step"]: step for step in once["steps"]}
    sft, dpo = by_step["sft"], by_step["dpo"]
    assert sft["tokens"] > 100_000_000
    # seconds = operations / one speed: the ratio of two steps is arithmetic
    operations = {
        "sft": sft["tokens"] * 4 * BODY + sft["targets"] * 4 * HEAD,
        "dpo": dpo["tokens"] * (4 + 2 / 100_000) * BODY + dpo["targets"] * (4 + 2 / 100_000) * HEAD,
    }
    expected = operations["sft"] / operations["dpo"]
    assert sft["seconds"] / dpo["seconds"] == pytest.approx(expected, rel=0.1)


# Body and head passes of a token and a target in the update, and forwards of a token before it besides the reward model's.
UPDATES = {
    "a value function of its own": ((), 4 + 4, 4, 4),
    "a shared value function": (("ppo.value=shared",), 4, 4, 3),
    "no value function": (("ppo.estimator=rloo", "ppo.completions=2"), 4, 4, 3),
    "full weights": (("adapter.kind=full",), 6, 6, 3),
    "a value function of its own, recomputed": (("base.recompute=true",), 6 + 6, 4, 4),
    "full weights, recomputed": (("adapter.kind=full", "base.recompute=true"), 8, 6, 3),
}


@pytest.mark.parametrize("name", UPDATES)
def test_a_ppo_stage_counts_what_is_trained_in_it(name: str):
    more, body_passes, head_passes, forwards = UPDATES[name]
    iterations = 10_000_000
    settings = ("sft.epochs=10000000", f"ppo.iterations={iterations}", "ppo.gold=[]", "base.device=cpu", *more)
    found, _ = describe(load_recipe(TINY, settings), Path("nowhere"))
    sft, ppo = (next(step for step in found["steps"] if step["step"] == kind) for kind in ("sft", "ppo"))
    tokens, targets = ppo["tokens"], ppo["targets"]
    passes = 2 * (tokens * body_passes * BODY + targets * head_passes * HEAD)
    operations = tokens * 2 * (forwards + 1) * BODY + targets * 6 * HEAD + passes
    of_sft = body_passes / 2 if "of its own" in name else body_passes
    expected = operations / (sft["tokens"] * of_sft * BODY + sft["targets"] * head_passes * HEAD)
    assert ppo["seconds"] / sft["seconds"] == pytest.approx(expected, rel=0.02)


def test_data_that_would_stop_the_run_stops_the_plan(folder: Path):
    (folder / "p.jsonl").write_text('{"prompt": "cd", "chosen": "same", "rejected": "same"}\n')
    with pytest.raises(DataError, match="chosen equals rejected"):
        describe(load_recipe(folder / "r.toml"), folder / "run")
