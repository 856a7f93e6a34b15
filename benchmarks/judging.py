"""Throughput of critique, contrast and label stages against plain rollouts, with SmolLM2-135M-Instruct.

    python benchmarks/judging.py --prompts 64

Prints a JSON object: new tokens a second of plain rollouts, and of the critiques and revisions of a critique stage; and
tokens a second that a judge reads in comparisons by all principles of the starter constitution. `read` counts the tokens of
each prompt in full, so shared prefixes raise it.
"""

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from posttrain.constitution import prompts as words
from posttrain.constitution.critique import draw_principle
from posttrain.constitution.principles import load_constitution
from posttrain.data.prompts import prepare_prompts
from posttrain.generate.engine import SamplingSettings, generate
from posttrain.judge.local import LocalJudge
from posttrain.judge.prompts import comparison
from posttrain.judge.verdict import ComparisonRequest
from posttrain.models.base_model import BaseModel, load_base
from posttrain.records import Message

ROOT = Path(__file__).resolve().parents[1]
MODEL = "package:smollm2-135m-instruct"


def sampled(base: BaseModel, prompts: Sequence[Sequence[int]], tokens: int) -> tuple[dict[str, float], list[str]]:
    """Speed of one call of the engine, and its texts."""
    started = time.perf_counter()
    rollouts = generate(base, prompts, SamplingSettings(tokens, 1.0, 1.0, 5), "base")
    seconds = time.perf_counter() - started
    new, read = sum(len(r.completion_ids) for r in rollouts), sum(map(len, prompts))
    return {"new": round(new / seconds, 1), "read": round((new + read) / seconds, 1)}, [r.text for r in rollouts]


def main() -> None:
    """Time each kind of work once, after a warm-up."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=64)
    parser.add_argument("--tokens", type=int, default=64)
    options = parser.parse_args()
    base, principles = load_base(MODEL), load_constitution("starter").principle
    rows = prepare_prompts(
        "starter/red_team.jsonl", base.chat, seed=0, max_prompt_tokens=256, evaluation_prompts=frozenset()
    ).train[: options.prompts]
    plain = [row.ids for row in rows]
    sampled(base, plain[:8], 8)
    figures: dict[str, Any] = {}
    figures["rollouts"], answers = sampled(base, plain, options.tokens)
    drawn = [draw_principle(principles, row.id, 1, 0) for row in rows]

    def encoded(conversations: Sequence[Sequence[Message]]) -> list[list[int]]:
        return [base.chat.encode_prompt(messages) for messages in conversations]

    asked = [words.critique(p, row.text, answer) for p, row, answer in zip(drawn, rows, answers, strict=True)]
    figures["critiques"], critiques = sampled(base, encoded(asked), options.tokens)
    revised = [words.revision(p, r.text, a, c) for p, r, a, c in zip(drawn, rows, answers, critiques, strict=True)]
    figures["revisions"], texts = sampled(base, encoded(revised), options.tokens)
    requests = [
        ComparisonRequest(row.text, text, answer, p.comparison or "")
        for row, text, answer in list(zip(rows, texts, answers, strict=True))[:16]
        for p in principles
    ]
    count = sum(len(base.chat.encode_prompt(comparison(r.question, r.prompt, r.a, r.b))) for r in requests)
    started = time.perf_counter()
    LocalJudge(base, "base", "base").compare(requests)
    seconds = time.perf_counter() - started
    figures["comparisons"] = {"a second": round(len(requests) / seconds, 2), "read": round(2 * count / seconds, 1)}
    print(json.dumps(figures, indent=1))


if __name__ == "__main__":
    main()
