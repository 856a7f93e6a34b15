"""Seeded tiny runs that learn what they were shown: turns that end, preferences that are preferred."""

from pathlib import Path

import pytest
from tiny_stages import WORDS, preferences, rows_of, run_stage, write_rows

from posttrain.generate.engine import SamplingSettings, generate
from posttrain.models.base_model import BaseModel
from posttrain.records import Message

LIMIT = 24


def ended(base: BaseModel, prompts: list[str]) -> int:
    ids = [base.chat.encode_prompt([Message("user", prompt)]) for prompt in prompts]
    settings = SamplingSettings(max_new_tokens=LIMIT, temperature=0.0, logprobs=False)
    return sum(rollout.ended for rollout in generate(base, ids, settings, "base"))


def test_at_least_99_percent_of_200_greedy_answers_stop(base: BaseModel, tmp_path: Path):
    """Whole sentences end where the demonstrations ended, also for prompts that were not among them."""
    rows = [{"messages": [
        {"role": "user", "content": f"{WORDS[i % 15]} {i}?"}, {"role": "assistant", "content": WORDS[i % 15]},
    ]} for i in range(0, 200, 4)]  # fmt: skip
    prompts = [f"{WORDS[i % 15]} {i}?" for i in range(200)]
    assert ended(base, prompts) < 100, "the base must not stop by itself"
    run_stage(
        base, tmp_path / "sft", "sft", adapter={"kind": "full"}, data=str(write_rows(tmp_path / "d.jsonl", rows)),
        batch=25, epochs=40, learning_rate=3e-3, validation=0,
    )  # fmt: skip
    count = ended(base, prompts)
    assert count >= 198, f"{count} of 200"
    assert rows_of(tmp_path / "sft")[-1]["sft/loss"] < 0.1


@pytest.mark.parametrize("loss", ["sigmoid", "ipo", "hinge"])
def test_dpo_learns_which_side_is_preferred(loss: str, base: BaseModel, tmp_path: Path):
    """Lower case over upper case: the margin and the accuracy rise on the trained pairs and on those held out."""
    run_stage(
        base, tmp_path / "dpo", "dpo", data=str(preferences(tmp_path / "p.jsonl", 40)), epochs=4, batch=8, loss=loss,
        learning_rate=2e-3, validation=0.2, beta=0.1,
    )  # fmt: skip
    rows = rows_of(tmp_path / "dpo")
    assert rows[0]["dpo/accuracy"] <= 0.75
    assert rows[-1]["dpo/accuracy"] > 0.9
    assert rows[-1]["dpo/validation_accuracy"] > 0.9
    assert rows[-1]["dpo/margin"] > rows[0]["dpo/margin"] + 0.3  # ipo stops at 1/2
    assert rows[-1]["dpo/gradient_weight"] < rows[0]["dpo/gradient_weight"]
    assert rows[-1]["dpo/kl"] > rows[0]["dpo/kl"]
