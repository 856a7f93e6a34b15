"""One side of the race `ppo`: iterations of 64 prompts, at most 64 new tokens each, 4 passes in minibatches of 16.

    ppo.py prepare FOLDER DATA     prompts (first turns of hh_harmless), and a few pairs for a reward model of the right shape
    ppo.py posttrain FOLDER        a run of the product: a reward stage of one step, then the ppo stage
    ppo.py trl FOLDER SETTING      TRL's PPOTrainer with PEFT, in an environment of its own

The policy starts from the model itself; policy and value are LoRA of rank 16 on all linear layers on both sides. What a reward
model says is of no matter for the time, so each side takes its own, hardly trained. Seconds are those of whole iterations:
samples, scores, log-probabilities and all passes. The first is warm-up.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from rollouts import MODEL, device, peak_gib

PROMPTS, NEW_TOKENS, PASSES, MINIBATCH, ITERATIONS = 64, 64, 4, 16, 1
RECIPE = """
name = "race"
[base]
model = "{model}"
[adapter]
rank = 16
alpha = 32.0
dropout = 0.0
[[stage]]
kind = "reward"
name = "rm"
data = "{pairs}"
epochs = 1
[[stage]]
kind = "ppo"
name = "ppo"
reward = "rm"
data = "{pairs}"
iterations = {iterations}
prompts = {prompts}
max_new_tokens = {new_tokens}
ppo_epochs = {passes}
minibatch = {minibatch}
max_mismatch = 1.0
[evaluation]
limit = 1
max_new_tokens = 1
sample_tokens = 1
"""


def prepare(folder: Path, data: Path) -> dict[str, Any]:
    """The same prompts for both sides: as rows for us, as ids for the peer."""
    from posttrain.data.prompts import prepare_prompts
    from posttrain.models.base_model import load_base

    base = load_base(MODEL)
    lines = (data / "preferences/hh_harmless.jsonl").read_text(encoding="utf-8").splitlines()[: 2 * PROMPTS]
    pairs = folder / "pairs.jsonl"
    pairs.write_text("\n".join(lines) + "\n", encoding="utf-8")
    found = prepare_prompts(str(pairs), base.chat, seed=0, max_prompt_tokens=256, evaluation_prompts=frozenset())
    work = {
        "model": str(base.source.folder), "pairs": str(pairs), "prompts": [row.ids for row in found.train[:PROMPTS]],
        "end": base.chat.end_id, "pad": 0,
    }  # fmt: skip
    (folder / "ppo.json").write_text(json.dumps(work))
    return {"prompts": len(work["prompts"])}


def posttrain(folder: Path, work: dict[str, Any]) -> dict[str, Any]:
    """The product by its own command."""
    from posttrain.cli import main

    recipe = folder / "race.toml"
    recipe.write_text(RECIPE.format(
        model=MODEL, pairs=work["pairs"], iterations=ITERATIONS, prompts=PROMPTS, new_tokens=NEW_TOKENS, passes=PASSES,
        minibatch=MINIBATCH,
    ))  # fmt: skip
    code = main(["run", str(recipe), "--out", str(folder / "run"), "--until", "ppo", "--json"])
    assert code == 0, f"the run ended with {code}"
    rows = [json.loads(line) for line in (folder / "run/ppo/metrics.jsonl").read_text().splitlines()]
    steps = PASSES * PROMPTS // MINIBATCH
    seconds = [sum(row["time/step"] for row in rows[i : i + steps]) for i in range(0, len(rows), steps)]
    last = {name: rows[-1][name] for name in ("ppo/length", "ppo/kl", "ppo/score")}
    packages = ("posttrain", "torch", "transformers")
    return {"seconds": seconds, "setting": f"bfloat16, packed, one base, {device()}", "last": last, **_common(packages)}


def trl(folder: Path, work: dict[str, Any], setting: str) -> dict[str, Any]:
    """TRL with LoRA on the policy and on the value model; the reference is the policy without its adapter."""
    import torch
    from datasets import Dataset
    from peft import LoraConfig, inject_adapter_in_model
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    dtype = torch.bfloat16 if setting.startswith("bf16") else torch.float32
    micro = 4 if "micro4" in setting else MINIBATCH
    lora = LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules="all-linear", task_type="CAUSAL_LM")
    layers = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
    tokenizer.pad_token = tokenizer.convert_ids_to_tokens(work["pad"])
    policy = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)
    reward, value = (
        AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, dtype=dtype) for _ in range(2)
    )
    reward.requires_grad_(False)
    value.requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=16, lora_alpha=32, lora_dropout=0.0, target_modules=layers), value)
    value.score.requires_grad_(True)
    seconds: list[float] = []
    before = time.perf_counter()

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **_):
            nonlocal before
            seconds.append(time.perf_counter() - before)
            before = time.perf_counter()

    rows = Dataset.from_list([{"input_ids": ids} for ids in work["prompts"]])
    config = PPOConfig(
        output_dir=str(folder / "trl"), per_device_train_batch_size=micro, gradient_accumulation_steps=PROMPTS // micro,
        num_mini_batches=PROMPTS // MINIBATCH, num_ppo_epochs=PASSES, total_episodes=ITERATIONS * PROMPTS,
        response_length=NEW_TOKENS, temperature=1.0, stop_token_id=work["end"], local_rollout_forward_batch_size=PROMPTS,
        learning_rate=5e-5, kl_coef=0.05, gradient_checkpointing=False, bf16=setting.startswith("bf16"),
        use_cpu=device() == "cpu", report_to="none", save_strategy="no", num_sample_generations=0, seed=0, disable_tqdm=True,
        logging_steps=1,
    )  # fmt: skip
    trainer = PPOTrainer(
        config, tokenizer, policy, None, reward, rows, value, peft_config=lora, callbacks=[Clock()], eval_dataset=rows
    )
    before = time.perf_counter()
    trainer.train()
    last = {k: v for k, v in trainer.state.log_history[-1].items() if k.startswith(("objective", "val"))}
    packages = ("trl", "transformers", "peft", "torch")
    return {
        "seconds": seconds,
        "setting": f"{setting}, {micro} rows a device batch, {device()}",
        "last": last,
        **_common(packages),
    }


def _common(packages: tuple[str, ...]) -> dict[str, Any]:
    return {
        "units": [PROMPTS] * ITERATIONS, "peak_gib": peak_gib(),
        "versions": {name: version(name) for name in packages},
    }  # fmt: skip


def main() -> None:
    """Run one side and print one JSON object on the last line."""
    side, folder = sys.argv[1], Path(sys.argv[2])
    if side == "prepare":
        found = prepare(folder, Path(sys.argv[3]))
    else:
        work = json.loads((folder / "ppo.json").read_text())
        found = posttrain(folder, work) if side == "posttrain" else trl(folder, work, sys.argv[3])
    print(json.dumps(found))


if __name__ == "__main__":
    main()
