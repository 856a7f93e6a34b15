"""What both sides of a race train on: token ids in step order, one initial adapter, the model folder.

Arguments: race folder data steps rows tokens (of the longest row).
"""

import json
import sys
from pathlib import Path

from rollouts import MODEL

from posttrain.data.formats import read_demonstrations, read_preferences
from posttrain.data.prepare import prepare_demonstrations, prepare_pairs
from posttrain.models.adapter_files import save_adapter
from posttrain.models.base_model import load_base
from posttrain.models.heads import new_head
from posttrain.models.lora import LoraSettings
from posttrain.settings import Source

LORA = LoraSettings(16, 32.0, 0.0, "all", "standard")
RATE = 2e-4
PAIRS = {"dpo": "oasst_pairs", "reward": "hh_harmless"}
DEMONSTRATIONS = ("oasst_threads", "self_instruct_seeds", "dolly_subset")


def main() -> None:
    """Write `workload.json` and the adapter's folder."""
    race, folder, data = sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])
    steps, rows, tokens = (int(x) for x in sys.argv[4:7])
    base = load_base(MODEL)
    keywords = {"max_tokens": tokens, "validation": 0.0, "allow_dropped": 1.0, "evaluation_prompts": frozenset[str]()}
    if race == "sft":
        sources = tuple(Source(path=str(data / f"demonstrations/{name}.jsonl")) for name in DEMONSTRATIONS)
        prepared = prepare_demonstrations(read_demonstrations(sources, seed=0), base.chat, **keywords)
    else:
        file = PAIRS[race]
        prepared = prepare_pairs(read_preferences(str(data / f"preferences/{file}.jsonl"), seed=0), base.chat, **keywords)
    # a fixed stride through the rows mixes the sources the same way for both sides
    order = sorted(range(len(prepared.train)), key=lambda i: (i * 7919) % 104729)
    if race == "reward":  # a prompt with two pairs would be one of our rows and two of the peer's
        order = list({tuple(prepared.train[i].prompt_ids): i for i in order}.values())
    chosen = [prepared.train[i]._asdict() for i in order[: steps * rows]]
    assert len(chosen) == steps * rows, f"only {len(chosen)} rows"
    adapter = base.adapters.create("initial", LORA, seed=0)
    if race == "reward":
        adapter.head = new_head(base.head_VD.shape[1], seed=0, device=base.device)
    (folder / "adapter").mkdir()
    save_adapter(folder / "adapter", adapter, base)
    settings = {"race": race, "model": str(base.source.folder), "rows": rows, "steps": steps, "rate": RATE, "beta": 0.1}
    (folder / "workload.json").write_text(json.dumps({**settings, "train": chosen}))
    print(json.dumps({"rows": len(chosen)}))


if __name__ == "__main__":
    main()
