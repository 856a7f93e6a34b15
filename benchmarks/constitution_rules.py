"""Constitutions whose rule a program can check: does critique, contrast or a label teach the rule, and at what cost?

    python benchmarks/constitution_rules.py no-digits --work /tmp/rules --out no-digits.json

Each rule has a constitution in `recipes/rules/` and a function in `posttrain.evaluate.rule_scores`. The run has these policies:

    base               SmolLM2-135M-Instruct
    sl-cai             sft on the revisions of a critique stage, two rounds
    contrast-1, -2     dpo on the pairs of a contrast stage, two strengths
    labels             dpo on pairs that the rule labels

The output has for every policy, on held-out prompts: the share that follows the rule with Wilson's interval, the KL to
the base in nats an answer, the share that ends, and the starter suite's scores. It also has the share that follows the rule in
each round of critique, and the accuracy of the model itself as a judge of the pairs that the rule labelled.
"""

import argparse
import json
import random
from pathlib import Path
from typing import Any

import torch

import posttrain
from posttrain.artifacts import read_jsonl
from posttrain.constitution.principles import load_constitution
from posttrain.evaluate import rule_scores
from posttrain.evaluate.stats import mean, wilson
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.judge.local import LocalJudge
from posttrain.judge.verdict import ComparisonRequest
from posttrain.models.batches import batch_logprobs, pack_trees, sum_by_row
from posttrain.models.target import open_target
from posttrain.records import Message

ROOT = Path(__file__).resolve().parents[1]
QUESTIONS = {"no-digits": "no_digits", "polite-opening": "polite_opening", "two-sentences": "two_sentences"}
TOKENS = 64


def recipe(rule: str, prompts: Path) -> dict[str, Any]:
    """The whole run of a rule."""
    constitution, function = str(ROOT / f"recipes/rules/{rule}.toml"), f"rule:{rule_scores.__name__}:{QUESTIONS[rule]}"
    asked = {"data": str(prompts), "max_new_tokens": TOKENS, "max_prompt_tokens": 128, "constitution": constitution}
    pairs = {"kind": "dpo", "validation": 0.0, "max_tokens": 512, "epochs": 1.0}
    return {
        "name": rule,
        "base": {"model": "package:smollm2-135m-instruct"},
        "stage": [
            {"kind": "critique", "name": "revised", "judge": function, "gate": "report", "rounds": 2, **asked},
            {"kind": "sft", "name": "sl-cai", "data": "stage:revised", "epochs": 2.0, "validation": 0.0},
            {"kind": "contrast", "name": "pairs", "principles": 0, **asked},
            {"name": "contrast-1", "data": "stage:pairs", "learning_rate": 1e-5, **pairs},
            {"name": "contrast-2", "data": "stage:pairs", "learning_rate": 5e-5, **pairs},
            {"kind": "label", "name": "labelled", "judge": function, "answers": 4, **asked},
            {"name": "labels", "data": "stage:labelled", "learning_rate": 5e-5, **pairs},
        ],
        "evaluation": {"suites": ["starter"], "limit": 40, "max_new_tokens": 64},
    }


def split_prompts(folder: Path, count: int) -> tuple[Path, list[str]]:
    """A file of prompts to work on, and the texts of others to measure on, from the starter data."""
    texts = []
    for name in ("demonstrations", "preferences"):
        for row in read_jsonl(ROOT / f"src/posttrain/starter/{name}.jsonl"):
            messages = row["messages"] if "messages" in row else row["prompt"]
            text = messages if isinstance(messages, str) else messages[0]["content"]
            if (isinstance(messages, str) or messages[0]["role"] == "user") and len(text) < 300:
                texts.append(text)
    texts = sorted(set(texts))
    random.Random(0).shuffle(texts)
    file = folder / "prompts.jsonl"
    file.write_text("\n".join(json.dumps({"prompt": text}) for text in texts[:count]), encoding="utf-8")
    return file, texts[count : 2 * count]


@torch.no_grad()
def measured(run: Path, policies: list[str], held_out: list[str], rule: str) -> dict[str, Any]:
    """Rule, KL and length of every policy on held-out prompts, four answers each."""
    target = open_target(str(run))
    base, check = target.base, getattr(rule_scores, QUESTIONS[rule])
    prompts = [base.chat.encode_prompt([Message("user", text)]) for text in held_out]
    figures = {}
    for name in policies:
        adapter = target.policies.activate(name)
        rollouts = generate(base, prompts, SamplingSettings(TOKENS, 1.0, 1.0, 17), adapter, completions=4)
        follows = check([text for text in held_out for _ in range(4)], [r.text for r in rollouts])
        differences = []
        for start in range(0, len(rollouts), 16):
            part = rollouts[start : start + 16]
            batch = pack_trees([(r.prompt_ids, [r.completion_ids]) for r in part], base.device)
            sums = [sum_by_row(batch_logprobs(base, batch, policy), batch) for policy in (adapter, "base")]
            differences += (sums[0] - sums[1]).double().tolist()
        share, kl = wilson(sum(follows), len(follows)), mean(differences)
        figures[name] = {
            "follows": [share.value, share.low, share.high, share.n], "kl": [kl.value, kl.low, kl.high],
            "ended": sum(r.ended for r in rollouts) / len(rollouts),
        }  # fmt: skip
    return figures


def rounds(run: Path, rule: str) -> dict[str, Any]:
    """The share of answers that follow the rule: before the first round, and after each."""
    check, rows = getattr(rule_scores, QUESTIONS[rule]), list(read_jsonl(run / "revised" / "rounds.jsonl"))
    figures = {}
    for number in (0, 1, 2):
        texts = [
            row["answer"] if number == 0 or row["outcome"] != "revised" else row["revision"]
            for row in rows
            if row["round"] == max(number, 1)
        ]
        share = wilson(sum(check([""] * len(texts), texts)), len(texts))
        figures[f"after round {number}"] = [share.value, share.low, share.high, share.n]
    return figures


def own_verdicts(run: Path, rule: str) -> dict[str, Any]:
    """How often the base prefers the answer that the rule prefers."""
    target = open_target(f"{run}/base")
    question = load_constitution(str(ROOT / f"recipes/rules/{rule}.toml")).principle[0].comparison or ""
    rows = list(read_jsonl(run / "labelled" / "rows.jsonl"))[:200]
    requests = [ComparisonRequest(row["prompt"][-1]["content"], row["chosen"], row["rejected"], question) for row in rows]
    verdicts = LocalJudge(target.base, "base", "base").compare(requests)
    decided = [v.probability for v in verdicts if v.probability is not None]
    share = wilson(sum(p > 0.5 for p in decided), len(decided)) if decided else None
    return {"pairs": len(rows), "decided": len(decided), "accuracy": share and [share.value, share.low, share.high]}


def main() -> None:
    """Run one rule and write its figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rule", choices=list(QUESTIONS))
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--prompts", type=int, default=96)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    file, held_out = split_prompts(options.work, options.prompts)
    done = posttrain.run(recipe(options.rule, file), out=options.work / options.rule)
    figures = {
        "rule": options.rule, "policies": measured(done.folder, list(done.policies), held_out, options.rule),
        "rounds": rounds(done.folder, options.rule), "critique": done.stages[0].manifest,
        "own verdicts": own_verdicts(done.folder, options.rule),
        "scores": {name: {m: [e.value, e.low, e.high, e.n] for m, e in scores.items()} for name, scores in done.scores.items()},
    }  # fmt: skip
    options.out.write_text(json.dumps(figures, indent=1), encoding="utf-8")
    print(
        json.dumps({"policies": figures["policies"], "rounds": figures["rounds"], "judge": figures["own verdicts"]}, indent=1)
    )


if __name__ == "__main__":
    main()
