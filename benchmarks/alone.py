"""One request at a time, in the race `served`: `alone.py FOLDER` is transformers' generate on one prompt after the other.

It runs in `.venv-peers`, greedily, in each setting that was found worth trying. FOLDER is what `served.py` prepares.
"""

import json
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

SETTINGS: dict[str, dict[str, str]] = {"dynamic cache": {}, "static cache": {"cache_implementation": "static"}}


def alone(times: list[tuple[int, float]]) -> dict[str, Any]:
    """Tokens a second over all answers, the prompt's time with it; the seconds of an answer."""
    tokens, seconds = sum(t for t, _ in times), [s for _, s in times]
    return {"answers": len(times), "tokens": tokens, "tokens_per_s": round(tokens / sum(seconds), 2), **_seconds(seconds)}


def _seconds(seconds: list[float]) -> dict[str, float]:
    ordered = sorted(seconds)
    return {"seconds_median": round(ordered[len(ordered) // 2], 3), "seconds_max": round(ordered[-1], 3)}


def hf_generate(work: dict[str, Any]) -> dict[str, Any]:
    """transformers' generate on one prompt at a time, in each setting that was found worth trying."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.bfloat16).eval()
    found = {}
    for setting, fields in SETTINGS.items():

        def run(prompt: list[int], fields: dict[str, str] = fields) -> tuple[int, float]:
            ids, started = torch.tensor([prompt]), time.perf_counter()
            with torch.inference_mode():
                out = model.generate(
                    input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=work["new_tokens"], do_sample=False,
                    eos_token_id=work["ends"], pad_token_id=work["ends"][0], **fields,
                )  # fmt: skip
            return out.shape[1] - len(prompt), time.perf_counter() - started

        for prompt in work["warm"][:2]:
            run(prompt)
        found[setting] = alone([run(prompt) for prompt in work["alone"]])
    return {"settings": found, "versions": {name: version(name) for name in ("transformers", "torch")}}


if __name__ == "__main__":
    print(json.dumps(hf_generate(json.loads((Path(sys.argv[1]) / "rollouts.json").read_text()))))
