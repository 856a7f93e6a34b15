"""The plan of a run with rows, tokens and a time estimate (`posttrain run --dry-run`).

The data is rendered as training would render it. Of the model, only the parameters are counted. The time is the number of
operations divided by a speed that a few matrix products measure on this machine:

    training a token   6 P operations (forward 2 P, backward 4 P) less 2 P if the weights are frozen, P of the body;
                       2 P more if layers are recomputed
    a target           4 V D with a frozen head (logits and their gradient), 6 V D with a trained one
    a decoded token    2 (P + V D)

An evaluation reads its prompts, questions and prose (2 P a token, 2 V D a scored token) and writes answers of the greatest
length. Attention, loading and the report are not counted. So the time is a lower bound, with a factor for operations that are
not matrix products.
"""

import json
import time
from pathlib import Path
from typing import Any

import torch

from posttrain.data.chat import ChatFormat
from posttrain.data.doctor import prepare_stage
from posttrain.evaluate.suites import sample_prompts
from posttrain.models.base_model import choose_device, load_chat, native_bfloat16
from posttrain.plan import Plan, make_plan
from posttrain.progress import clock
from posttrain.recipe import Recipe
from posttrain.records import Message
from posttrain.stages import KINDS, Stage, row_stages
from posttrain.stages.kind import Sizes, Work

# Share of the measured product speed that a whole step reached in the benchmarks.
EFFICIENCY = 0.55


def describe(recipe: Recipe, run: Path, *, until: str | None = None) -> tuple[dict[str, Any], str]:
    """The plan as data and as text. Raises PosttrainError for every mistake that would stop the run before training."""
    plan = make_plan(recipe, run, until=until)
    chat = load_chat(plan.source, recipe.base.template)
    body, head = _parameters(plan)
    evaluation = _evaluation(plan, chat, body, head)
    speed = _speed(recipe)
    rows, due = [], {step.name for step in plan.due}
    for step in plan.steps:
        entry: dict[str, Any] = {"step": step.name, "kind": step.kind, "status": step.status, "why": step.why}
        unmade = due & set(row_stages(step.stage)) if step.stage is not None else set()
        if unmade:
            entry["unknown"] = f"its rows are made by {', '.join(sorted(unmade))}"
        elif step.status != "done" and step.kind != "measure":  # the time to score a few pairs is negligible
            work = _stage_work(plan, step.stage, chat, body, head) if step.stage is not None else evaluation
            entry |= {
                "rows": work.rows,
                "tokens": work.tokens,
                "targets": work.targets,
                "seconds": round(work.operations / speed),
            }
        rows.append(entry)
    total = sum(entry.get("seconds", 0) for entry in rows)
    estimate = {
        "run": str(run), "base": recipe.base.model, "weights_hash": plan.source.weights_hash, "parameters": body + head,
        "steps": rows, "seconds": total,
    }  # fmt: skip
    return estimate, _text(estimate)


def _parameters(plan: Plan) -> tuple[int, int]:
    """Number of weights in the matrices of the body, and in the head, from the headers of the safetensors files."""
    config = json.loads((plan.source.folder / "config.json").read_text(encoding="utf-8"))
    config = config.get("text_config", config)
    head = int(config["vocab_size"]) * int(config["hidden_size"])
    total = 0
    for path in plan.source.folder.glob("*.safetensors"):
        with path.open("rb") as file:
            header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
        shapes = [
            entry["shape"]
            for name, entry in header.items()
            if name != "__metadata__" and "embed" not in name and "lm_head" not in name
        ]
        total += sum(shape[0] * shape[1] for shape in shapes if len(shape) == 2)
    return total, head


def _speed(recipe: Recipe) -> float:
    """Operations a second that a step will reach on this machine."""
    device = choose_device(recipe.base.device)
    wants_bfloat16 = recipe.base.dtype == "bfloat16" or (recipe.base.dtype == "auto" and native_bfloat16())
    uses_bfloat16 = wants_bfloat16 and (recipe.adapter.kind == "lora" or device.type == "cuda")
    dtype = torch.bfloat16 if uses_bfloat16 else torch.float32
    a = torch.randn(1024, 1024).to(device, dtype)
    best = float("inf")
    for _ in range(8):
        started = time.perf_counter()
        (a @ a).sum().item()
        best = min(best, time.perf_counter() - started)
    return 2 * 1024**3 / best * EFFICIENCY


def _stage_work(plan: Plan, stage: Stage, chat: ChatFormat, body: int, head: int) -> Work:
    report = prepare_stage(stage, chat, plan.preparation).report
    full = plan.recipe.adapter.kind == "full"
    a_token, a_target = (6 * body, 6 * head) if full else (4 * body, 4 * head)
    a_token += 2 * body * plan.recipe.base.recompute
    return KINDS[stage.kind].estimate(stage, report, Sizes(body, head, a_token, a_target, full))


def _evaluation(plan: Plan, chat: ChatFormat, body: int, head: int) -> Work:
    """The evaluation of one policy. `tokens` counts tokens read and written, `targets` those whose probability is needed."""
    settings = plan.recipe.evaluation
    samples = len(settings.samples or sample_prompts(plan.tasks))
    read, targets = samples * settings.sample_tokens, samples * settings.sample_tokens
    for task in plan.tasks:
        for item in task.items:
            if task.answer == "generate":
                read += len(chat.encode_prompt([Message("user", item["prompt"])])) + settings.max_new_tokens
                targets += settings.max_new_tokens
            elif task.answer == "choices":
                choices = [len(chat.encode_text(choice)) for choice in item["choices"]]
                read += len(chat.encode_text(item["question"])) + sum(choices)
                targets += sum(choices)
            else:
                read += len(chat.encode_text(item["text"]))
                targets += len(chat.encode_text(item["text"]))
    return Work(sum(len(task.items) for task in plan.tasks), read, targets, 2.0 * (read * body + targets * head))


def _text(estimate: dict[str, Any]) -> str:
    lines = [f"{estimate['run']} · {estimate['base']} · {estimate['parameters'] / 1e6:,.1f}M parameters", ""]
    lines.append(f"{'step':<18} {'':<7} {'rows':>7} {'tokens':>9} {'time':>7}  why")
    for entry in estimate["steps"]:
        numbers = f"{'':>7} {'':>9} {'':>7}"
        if "rows" in entry:
            numbers = f"{entry['rows']:>7,} {entry['tokens']:>9,} {clock(entry['seconds']) if entry['seconds'] else '<1s':>7}"
        why = f"{entry['why']}; {entry['unknown']}" if "unknown" in entry else entry["why"]
        lines.append(f"{entry['step']:<18} {_WORD[entry['status']]:<7} {numbers}  {why}")
    time_needed = f"about {clock(estimate['seconds'])}" if estimate["seconds"] else "under a second"
    lines += ["", f"{time_needed} of computing on this machine; nothing was changed"]
    return "\n".join(lines)


_WORD = {"done": "skip", "resume": "resume", "due": "run"}
