"""Same seed, same run; and a loss curve of 100 steps a method that changes only on purpose.

`python tests/train/test_golden.py` writes golden/*.json anew; say in the commit why the numbers may change.
"""

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest
from ppo_runs import random_reward_model, run_ppo
from tiny_stages import demonstrations, digest, preferences, rows_of, run_stage

from posttrain.models.base_model import BaseModel, load_base

GOLDEN = Path(__file__).parent / "golden"
STEPS = 100
# Other processors round otherwise, and 100 steps add that up; on one machine the numbers are equal to the last bit.
TOLERANCE = 1e-4
# PPO's losses come near 0, whatever their terms are. With AVX-512, AVX2 or plain instructions they differ by 1e-6 at most, so
# every sampled token is the same.
NEAR_ZERO = {"ppo": 1e-5}


PPO: dict[str, Any] = {
    "iterations": 10, "prompts": 6, "minibatch": 3, "ppo_epochs": 5, "max_new_tokens": 3, "learning_rate": 3e-4,
    "target_kl": 0.05, "kl_horizon": 100,
}  # fmt: skip


def losses(base: BaseModel, kind: str, folder: Path) -> list[float]:
    """`kind/loss` of 100 steps, gradient norms and rates included in what a digest sees."""
    if kind == "ppo":
        random_reward_model(base)
        run_ppo(base, folder / kind, data=preferences(folder / "p.jsonl", 40), **PPO)
    else:
        data = demonstrations(folder / "d.jsonl", 40) if kind == "sft" else preferences(folder / "p.jsonl", 40)
        run_stage(
            base, folder / kind, kind, adapter={"dropout": 0.0}, data=str(data), epochs=10, validation=0, learning_rate=3e-4,
            warmup=0.1, max_tokens=64,
        )  # fmt: skip
    found = [row[f"{kind}/loss"] for row in rows_of(folder / kind)]
    assert len(found) == STEPS
    return found


@pytest.mark.parametrize("kind", ["sft", "dpo", "reward", "ppo"])
def test_the_same_seed_gives_the_same_run_and_the_golden_losses(kind: str, base: BaseModel, tmp_path: Path):
    first = losses(base, kind, tmp_path / "first")
    if kind != "ppo":  # of which test_ppo.py compares thirty runs
        assert losses(base, kind, tmp_path / "second") == first
        assert digest(tmp_path / "first" / kind) == digest(tmp_path / "second" / kind)
    golden = json.loads((GOLDEN / f"{kind}.json").read_text(encoding="utf-8"))
    assert first == pytest.approx(golden, rel=TOLERANCE, abs=NEAR_ZERO.get(kind))
    if kind != "ppo":  # whose loss is no measure of what was learned
        assert first[-1] < first[0] - 0.1


def test_another_seed_gives_another_run(base: BaseModel, tmp_path: Path):
    stage = {"data": str(demonstrations(tmp_path / "d.jsonl")), "validation": 0}
    run_stage(base, tmp_path / "a", "sft", seed=1, **stage)
    run_stage(base, tmp_path / "b", "sft", seed=2, **stage)
    assert rows_of(tmp_path / "a") != rows_of(tmp_path / "b")


if __name__ == "__main__":
    tiny = load_base("random:tiny", template="gemma", dtype="float32", device="cpu")
    for method in sys.argv[1:] or ("sft", "dpo", "reward", "ppo"):
        with tempfile.TemporaryDirectory() as scratch:
            curve = losses(tiny, method, Path(scratch))
        (GOLDEN / f"{method}.json").write_text(json.dumps(curve, indent=0) + "\n", encoding="utf-8")
