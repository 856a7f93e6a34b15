"""TRL's side of a race, in its own environment: the same ids, order, adapter and rate. Arguments: race folder setting steps."""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from peft import PeftModel
from rollouts import device, peak_gib
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from trl import DPOConfig, DPOTrainer, RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

# Rows of a device batch: on a CPU smaller ones pad less and fit the caches better, a GPU wants them large; the optimiser
# step is the same.
MICRO = 4 if device() == "cpu" else 16


class Clock(TrainerCallback):
    """Seconds of each optimiser step."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.started = 0.0

    def on_step_begin(self, args, state, control, **kwargs):
        self.started = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        self.seconds.append(time.perf_counter() - self.started)


class PreparedDPOTrainer(DPOTrainer):
    """DPO on rows that are tokenised already."""

    def _prepare_dataset(self, dataset, *args, **kwargs):
        return dataset


def main() -> None:
    """Train and print one JSON object."""
    race, folder, setting, steps = sys.argv[1], Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
    work = json.loads((folder / "workload.json").read_text())
    rows = work["train"][: steps * work["rows"]]
    dtype = torch.bfloat16 if setting.startswith("bf16") else torch.float32
    if race == "reward":
        model = AutoModelForSequenceClassification.from_pretrained(work["model"], num_labels=1, dtype=dtype)
    else:
        model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=dtype)
    model = PeftModel.from_pretrained(model, str(folder / "adapter"), is_trainable=True)
    # A packed row holds about four of the data's: a quarter of the accumulation is the same step.
    accumulation = max(1, work["rows"] // min(MICRO, work["rows"]) // (4 if "packed" in setting else 1))
    shared = shared_settings(folder, work, setting, steps, accumulation)
    clock = Clock()
    side = {"sft": sft, "dpo": dpo, "reward": reward}[race]
    trainer, units, before = side(model, AutoTokenizer.from_pretrained(work["model"]), work, rows, setting, shared, clock)
    trainer.train()
    seconds = [s + before for s in clock.seconds]
    found = {
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "units": units[: len(seconds)],
        "seconds": seconds,
        "setting": f"{setting}, {MICRO} rows a device batch, {device()}",
        "peak_gib": peak_gib(),
        "versions": {name: version(name) for name in ("trl", "transformers", "peft", "torch")},
    }
    print(json.dumps(found))


def shared_settings(folder: Path, work: dict, setting: str, steps: int, accumulation: int) -> dict:
    """What both trainers are told."""
    return {
        "output_dir": str(folder / "trl"),
        "per_device_train_batch_size": min(MICRO, work["rows"]),
        "gradient_accumulation_steps": accumulation,
        "max_steps": steps,
        "learning_rate": work["rate"],
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.0,
        "max_grad_norm": 1.0,
        "bf16": setting.startswith("bf16"),
        "gradient_checkpointing": False,
        "logging_steps": 1,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": device() == "cpu",
        "seed": 0,
        "disable_tqdm": True,
        "max_length": 1024,
        "dataloader_num_workers": 0,
        "train_sampling_strategy": "group_by_length" if "grouped" in setting else "sequential",
    }


def sft(model, tokenizer, work, rows, setting, shared, clock):
    """The SFT trainer, tokens of each step (filled while it trains), and seconds a step spent before it."""
    data = [
        {"input_ids": r["ids"], "labels": [i if t else -100 for i, t in zip(r["ids"], r["trained"], strict=True)]} for r in rows
    ]
    packed = {"packing": True, "padding_free": True} if "packed" in setting else {}
    config = SFTConfig(**shared, **packed)
    trainer = SFTTrainer(model, config, train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[clock])
    counter = Counter(trainer.data_collator, shared["gradient_accumulation_steps"])
    trainer.data_collator = counter
    return trainer, counter.units, 0.0


class Counter:
    """A collator that counts the real tokens of each optimiser step: grouping and packing change the order of the rows."""

    def __init__(self, inner, accumulation: int) -> None:
        self.inner, self.accumulation, self.calls = inner, accumulation, 0
        self.units: list[int] = []

    def __call__(self, examples):
        """Collate and count."""
        if self.calls % self.accumulation == 0:
            self.units.append(0)
        self.calls += 1
        self.units[-1] += sum(len(example["input_ids"]) for example in examples)
        return self.inner(examples)


def dpo(model, tokenizer, work, rows, setting, shared, clock):
    """The DPO trainer, pairs of each step, and seconds a step spent before it: a precomputed reference is part of the work."""
    data = [{name: r[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")} for r in rows]
    started = time.perf_counter()
    config = DPOConfig(**shared, beta=work["beta"], precompute_ref_log_probs="precomputed" in setting)
    trainer = PreparedDPOTrainer(
        model, args=config, train_dataset=Dataset.from_list(data), processing_class=tokenizer, callbacks=[clock]
    )
    steps = shared["max_steps"]
    before = (time.perf_counter() - started) / steps if "precomputed" in setting else 0.0
    return trainer, [work["rows"]] * steps, before


def reward(model, tokenizer, work, rows, setting, shared, clock):
    """The reward trainer and pairs of each step; both sides of a pair are whole rows there."""
    data = [{side: r["prompt_ids"] + r[side] for side in ("chosen_ids", "rejected_ids")} for r in rows]
    for row in data:  # what rows are grouped by
        row["length"] = max(map(len, row.values()))
    # The model reads a score at the last token that is not the padding one. Its own is the end of a turn, so that it would read
    # every score a token too early.
    tokenizer.pad_token = "<|endoftext|>"
    model.config.pad_token_id = tokenizer.pad_token_id
    trainer = RewardTrainer(
        model,
        args=RewardConfig(**shared, disable_dropout=True, remove_unused_columns=False),
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer,
        callbacks=[clock],
    )
    return trainer, [work["rows"]] * shared["max_steps"], 0.0


if __name__ == "__main__":
    main()
