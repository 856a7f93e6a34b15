"""Where the policies of the sentiment experiment start: a model that goes on with a sentence from its first words.

    small      a Llama of 2 M parameters with random weights and a vocabulary of its own, trained by the product's full
               fine-tuning on the first words and the rest of sentences
    package:…  a pretrained base, taught the same form by the product's SFT of an adapter, which is then merged

Either way the result is one model folder, the init and the reference of everything that follows.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from posttrain.models.merge import merge_target
from posttrain.models.target import open_target
from posttrain.pipeline import run_recipe
from posttrain.recipe import parse_recipe, to_toml

VOCABULARY = 2048
SHAPE = {
    "hidden_size": 192, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 3,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
# First words and what follows them, as one text: there is nothing to chat about.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{{ m.content }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Perplexity of a few sentences is all that a run measures beside the experiment.
SUITE = 'name = "sentences"\n[[task]]\nname = "prose"\nanswer = "perplexity"\nitems = "sentences.jsonl"\n'


def write_suite(folder: Path, texts: Sequence[str]) -> str:
    """A suite of some sentences; returns its path as a recipe names it."""
    rows = [{"id": f"s{i}", "text": text} for i, text in enumerate(texts)]
    (folder / "sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "sentences.toml").write_text(SUITE, encoding="utf-8")
    return str(folder / "sentences.toml")


def make_random(folder: Path, texts: Sequence[str]) -> None:
    """A small Llama with random weights whose vocabulary was learned from the texts."""
    inner = tokenizers.Tokenizer(tokenizers.models.BPE())
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=VOCABULARY, special_tokens=["<pad>", "<bos>", "<eos>"], show_progress=False,
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    )  # fmt: skip
    inner.train_from_iterator(texts, trainer)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", chat_template=TEMPLATE
    )
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=inner.get_vocab_size(), **SHAPE, **ids))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_start(folder: Path, model: str, data: Path, suite: str, *, epochs: float) -> Path:
    """Train on rows of prompt and completion with the product, and merge; returns the model folder. Made once."""
    start = folder / "start"
    if start.exists():
        return start
    small = not model.startswith("package:")
    raw: dict[str, Any] = {
        "name": "start",
        "base": {"model": model, "dtype": "float32" if small else "auto", "device": "cpu"},
        "adapter": {"kind": "full" if small else "lora"},
        "stage": [
            {
                "kind": "sft", "name": "sft", "data": str(data), "epochs": epochs, "batch": 32, "max_tokens": 96,
                "learning_rate": 2e-3 if small else 2e-4, "validation": 0.05, "keep": "best", "validate_every": 50,
            }
        ],
        "evaluation": {"suites": [suite], "samples": ["the film is"], "sample_tokens": 24},
    }  # fmt: skip
    recipe = parse_recipe(raw)
    run_recipe(recipe, to_toml(recipe), folder / "start-run")
    merge_target(open_target(str(folder / "start-run" / "sft")), start)
    shutil.rmtree(folder / "start-run" / "sft" / "checkpoints", ignore_errors=True)
    return start
