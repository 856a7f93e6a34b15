"""How the cost of a token grows: more rows, more adapters in one batch, more completions below one prompt.

Prints one JSON object: milliseconds a token at each size and the ratio to the smallest. Flat within 15 % is the bar for rows
and adapters; for shared prompts, the saving against computing the prompt once a completion. Each figure is the best of
several repetitions, since noise on a shared machine only adds.
"""

import json
import time
from collections.abc import Callable
from typing import Any

import torch
from ours import peak_gib, versions

from posttrain.data.packing import pack, row_segments, tree_segments
from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.base_model import BaseModel, load_base
from posttrain.models.lora import LoraSettings
from posttrain.models.segments import Segments, Span
from posttrain.models.token_adapters import TokenAdapters

LENGTH = 128
LORA = LoraSettings(16, 32.0, 0.0, "all", "standard")
REPEATS = 5


def best(work: Callable[[], Any]) -> float:
    """Seconds of the fastest repetition after one warm-up."""
    work()
    times = []
    for _ in range(REPEATS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)


def ids(count: int, seed: int) -> list[int]:
    """Token ids that mean nothing."""
    return torch.randint(100, 40000, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def training_step(base: BaseModel, batch: Any, micro: int) -> None:
    """Forward and backward of the body over a packed batch, in micro-batches as the loop makes them."""
    from posttrain.data.packing import split_by_tokens

    for group in split_by_tokens([len(r) for r in batch], micro):
        segments = [s for i, g in enumerate(group) for s in row_segments(batch[g], [True] * len(batch[g]), i)]
        packed = pack(segments, len(group))
        spans = Segments(tuple(Span(*span) for span in packed.spans))
        hidden = base.hidden(torch.tensor(packed.ids), torch.tensor(packed.positions), spans, "a0")
        hidden.float().square().mean().backward()


def rows(base: BaseModel) -> dict[str, float]:
    """Milliseconds a token of a training step at 8, 32 and 128 rows."""
    base.adapters.get("a0").requires_grad_(True)
    found = {}
    for factor in (1, 4, 16):
        batch = [ids(LENGTH, i) for i in range(8 * factor)]
        found[f"{factor}x"] = best(lambda batch=batch: training_step(base, batch, 1024)) / (len(batch) * LENGTH) * 1e3
    base.adapters.get("a0").requires_grad_(False)
    return found


@torch.inference_mode()
def adapters(base: BaseModel) -> dict[str, float]:
    """Milliseconds a token of one forward over 64 rows of 32 tokens with 0, 1, 4, 16 and 64 adapters among them."""
    batch = [ids(32, i) for i in range(64)]
    packed = pack([s for i, r in enumerate(batch) for s in row_segments(r, [True] * 32, i)], 64)
    found = {}
    for count in (0, 1, 4, 16, 64):
        runs = [(32, base.adapters.get(f"a{i * count // 64}") if count else None) for i in range(64)]
        tokens = TokenAdapters(runs, NarrowAdapters(base.dtype, base.device), base.device)

        def forward(tokens: TokenAdapters = tokens) -> None:
            with base.adapters.use_tokens(tokens):
                base.forward(
                    torch.tensor(packed.ids),
                    torch.tensor(packed.positions),
                    Segments(tuple(Span(*s) for s in packed.spans)),
                )

        found[str(count)] = best(forward) / packed.tokens * 1e3
    return found


@torch.inference_mode()
def shared_prompts(base: BaseModel) -> dict[str, float]:
    """Seconds of the tree over seconds of separate rows, for a prompt of 256 tokens and completions of 32."""
    found = {}
    prompt = ids(256, 0)
    for count in (1, 2, 8, 32):
        completions = [ids(32, i + 1) for i in range(count)]
        tree = pack(tree_segments(prompt, completions, first_row=0, index=0), count)
        flat = pack([s for i, c in enumerate(completions) for s in row_segments(prompt + c, [True] * 288, i)], count)
        seconds = [
            best(
                lambda p=p: base.hidden(
                    torch.tensor(p.ids), torch.tensor(p.positions), Segments(tuple(Span(*s) for s in p.spans)), "a0"
                )
            )
            for p in (tree, flat)
        ]
        ideal = (256 + 32 * count) / (288 * count)
        found[f"{count} completions"] = round(seconds[0] / seconds[1], 3)
        found[f"{count} completions, tokens"] = round(ideal, 3)
    return found


def main() -> None:
    """Measure and print."""
    base = load_base("package:smollm2-135m-instruct")
    for index in range(64):
        base.adapters.create(f"a{index}", LORA, seed=index)
    by_rows, by_adapters, by_sharing = rows(base), adapters(base), shared_prompts(base)
    print(json.dumps({
        "race": "growth", "ours": {"rows": by_rows, "adapters": by_adapters, "shared_prompts": by_sharing}, "peer": None,
        "ratio": {
            "rows 16x": round(by_rows["16x"] / by_rows["1x"], 3), "adapters 64": round(by_adapters["64"] / by_adapters["1"], 3),
            "adapters 16 against none": round(by_adapters["16"] / by_adapters["0"], 3),
        }, "memory_ratio": None, "losses_agree": None, "peak_gib": round(peak_gib(), 2), "versions": versions(),
    }))  # fmt: skip


if __name__ == "__main__":
    main()
