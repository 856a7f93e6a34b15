"""One GPU against published figures: `python benchmarks/run.py gpu-sft|gpu-lora [--recompute]`. Needs a CUDA device.

Shapes of Qwen3 with random weights and random tokens, every token a target, one row a sequence; the same tasks and loop that
`posttrain run` uses. The peer's figure is prime-rl's published one for an H100 (benchmarks/baselines of its repository), which
runs with recomputation; it cannot be run beside ours, so no losses are compared.

    operations a token = 6 N + 6 layers heads width T          full fine-tuning, N weights with the head once, attention causal
    MFU = tokens/s * operations a token / peak                 LoRA: 4 N instead of 6 N, since frozen weights have no gradient
"""

import json
import math
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from ours import versions

# Dense bf16 of an H100 and an H200 by the vendor's datasheet.
PEAK_FLOPS = 989e12
SHARED = {"vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960, "rope_theta": 1e6}
RACES: dict[str, dict[str, Any]] = {
    "gpu-sft": {
        "shape": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28, "num_attention_heads": 16},
        "kind": "full", "tokens": 8192, "rows": 8, "peer": {"per_second": 26005, "mfu": 0.168, "peak_gib": 31.7},
    },
    "gpu-lora": {
        "shape": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32},
        "kind": "lora", "tokens": 16384, "rows": 2, "peer": {"per_second": 6229, "mfu": 0.217, "peak_gib": 23.3},
    },
}  # fmt: skip
WARM_UP = 2


def make_model(shape: dict[str, Any], folder: Path) -> None:
    """A folder with random weights of a shape, and the tokenizer of random:tiny (no text is read here)."""
    import transformers

    from posttrain.models.source import locate_base

    config = transformers.Qwen3Config(**SHARED, **shape, tie_word_embeddings=True, bos_token_id=1, eos_token_id=2)
    torch.manual_seed(0)
    with torch.device("cuda"):
        transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder)
    for path in locate_base("random:tiny").folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())


def policy_of(base: Any, kind: str) -> Any:
    """What is trained."""
    from posttrain.models.adapter_files import full_state
    from posttrain.models.lora import LoraSettings
    from posttrain.train.stage import TrainedPolicy

    if kind == "full":
        base.model.requires_grad_(True)
        return TrainedPolicy("base", full_state(base), lambda _: None)
    adapter = base.adapters.create("policy", LoraSettings(16, 32.0, 0.0, "all", "standard"), seed=0)
    adapter.requires_grad_(True)
    return TrainedPolicy("policy", adapter.parameters(), lambda _: None)


def operations(base: Any, race: dict[str, Any]) -> float:
    """Floating-point operations a token needs, recomputation not counted."""
    weights = sum(p.numel() for p in base.model.parameters())
    shape = race["shape"]
    attention = 6 * shape["num_hidden_layers"] * shape["num_attention_heads"] * SHARED["head_dim"] * race["tokens"]
    return (6 if race["kind"] == "full" else 4) * weights + attention


def run(name: str, steps: int, folder: Path, *, recompute: bool) -> dict[str, Any]:
    """Train and return the race's object."""
    from posttrain.data.prepare import TrainRow
    from posttrain.models.base_model import load_base
    from posttrain.models.recompute import recomputed
    from posttrain.stop import StopSignal
    from posttrain.train.loop import fit
    from posttrain.train.schedule import LoopSettings
    from posttrain.train.sft import sft_task

    race = RACES[name]
    make_model(race["shape"], folder / "model")
    base = load_base(str(folder / "model"), template="gemma", device="cuda", full=race["kind"] == "full")
    policy = policy_of(base, race["kind"])
    generator = torch.Generator().manual_seed(0)
    rows = []
    for index in range(steps * race["rows"]):
        ids = torch.randint(0, SHARED["vocab_size"], (race["tokens"],), generator=generator).tolist()
        rows.append(TrainRow(str(index), ids, [False] + [True] * (len(ids) - 1)))
    settings = LoopSettings(
        epochs=1, batch=race["rows"], learning_rate=1e-5, schedule="constant", warmup=0.0, weight_decay=0.0, clip=1.0,
        keep="last", patience=0, validate_every=0, checkpoint_every=0, checkpoint_minutes=1e9, seed=0,
    )  # fmt: skip
    torch.cuda.reset_peak_memory_stats()
    with recomputed(base, recompute):
        fit(sft_task(base, policy, rows, []), settings, folder, label=name, stop=StopSignal())
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rates = [m["time/tokens_per_second"] for m in metrics][WARM_UP:]
    per_second = len(rates) / sum(1 / r for r in rates)
    needed = operations(base, race)
    ours = {
        "per_second": round(per_second), "min": round(min(rates)), "max": round(max(rates)), "steps": len(rates),
        "mfu": round(per_second * needed / PEAK_FLOPS, 3), "peak_gib": round(torch.cuda.max_memory_reserved() / 2**30, 1),
    }  # fmt: skip
    return {
        "race": name, "unit": "tokens", "recompute": recompute, "device": torch.cuda.get_device_name(),
        "ours": ours, "peer": race["peer"],
        "ratio": round(per_second / race["peer"]["per_second"], 2),
        "memory_ratio": round(ours["peak_gib"] / race["peer"]["peak_gib"], 2), "losses_agree": None,
        "first_loss": metrics[0]["sft/loss"], "log_vocabulary": math.log(SHARED["vocab_size"]), "versions": versions(),
    }  # fmt: skip


if __name__ == "__main__":
    with tempfile.TemporaryDirectory(dir="/dev/shm" if Path("/dev/shm").is_dir() else None) as temporary:
        print(json.dumps(run(sys.argv[1], int(sys.argv[2]), Path(temporary), recompute="recompute" in sys.argv)))
