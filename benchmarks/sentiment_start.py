"""Where the policies of the sentiment experiment start: a model that goes on with a sentence from its first words.

    small      a Llama of 1 M parameters with random weights that knows the 2,000 commonest words, trained by the product's full
               fine-tuning; words it does not know are left out of its sentences
    package:…  a pretrained base, taught the same form by the product's SFT of an adapter, which is then merged

Rows are the first words of a sentence with the rest of it. The small model has read nothing before, so it also learns what a
pretrained one knows already: to go on in a given mood, and to name the mood of a sentence that is over, from people's labels
of its own half of the sentences. Gold is fitted on the other half. Either way the result is one model folder, the init and the
reference of everything that follows.
"""

import json
import shutil
from collections import Counter
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

VOCABULARY = 2000
MOODS = ("blame", "praise")
SHAPE = {
    "hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "max_position_embeddings": 256, "tie_word_embeddings": True,
}  # fmt: skip
# First words and what follows them, as one text: there is nothing to chat about.
TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token }}{{ m.content }}"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
# Perplexity of a few sentences is all that a run measures beside the experiment.
SUITE = 'name = "sentences"\n[[task]]\nname = "prose"\nanswer = "perplexity"\nitems = "sentences.jsonl"\n'


def start_rows(sentences: Sequence[tuple[tuple[str, str], bool]], *, moods: bool) -> list[dict[str, Any]]:
    """Demonstrations: a sentence's beginning and its rest; with moods its mood after it, and once more the sentence in it."""
    rows = []
    for i, ((prompt, rest), praises) in enumerate(sentences):
        mood = MOODS[praises]
        # The mood comes after the end token: a sample ends there, and a reward model reads there.
        rows.append(_row(f"s{i}", prompt, rest, *([mood] if moods else [])))
        if moods:
            rows.append(_row(f"s{i}-in", f"{mood}: {prompt}", rest))
    return rows


def _row(name: str, prompt: str, *turns: str) -> dict[str, Any]:
    said = [{"role": "assistant", "content": turn} for turn in turns]
    return {"id": name, "messages": [{"role": "user", "content": prompt}, *said]}


def write_suite(folder: Path, texts: Sequence[str]) -> str:
    """A suite of some sentences; returns its path as a recipe names it."""
    rows = [{"id": f"s{i}", "text": text} for i, text in enumerate(texts)]
    (folder / "sentences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (folder / "sentences.toml").write_text(SUITE, encoding="utf-8")
    return str(folder / "sentences.toml")


def commonest_words(texts: Sequence[str]) -> list[str]:
    """The words that the small model knows."""
    return [word for word, _ in Counter(word for text in texts for word in text.split()).most_common(VOCABULARY)]


def make_random(folder: Path, words: Sequence[str]) -> None:
    """A small Llama with random weights; its tokens are whole words, so that gold knows whatever it says."""
    specials = ["<pad>", "<bos>", "<eos>", "<unk>"]
    names = dict.fromkeys([*specials, *words, *MOODS, *(f"{mood}:" for mood in MOODS)])
    inner = tokenizers.Tokenizer(tokenizers.models.WordLevel({n: i for i, n in enumerate(names)}, unk_token="<unk>"))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    inner.add_special_tokens(specials)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        chat_template=TEMPLATE, clean_up_tokenization_spaces=False,
    )  # fmt: skip
    torch.manual_seed(0)
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(vocab_size=len(names), **SHAPE, **ids))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def train_start(folder: Path, model: str, data: Path, suite: str, *, epochs: float, device: str) -> Path:
    """Train on rows of prompt and completion with the product, and merge; returns the model folder. Made once."""
    start = folder / "start"
    if start.exists():
        return start
    small = not model.startswith("package:")
    raw: dict[str, Any] = {
        "name": "start",
        "base": {"model": model, "dtype": "float32" if small else "auto", "device": device},
        "adapter": {"kind": "full" if small else "lora"},
        "stage": [
            {
                "kind": "sft", "name": "sft", "data": str(data), "epochs": epochs, "batch": 64, "max_tokens": 96,
                "learning_rate": 3e-3 if small else 2e-4, "validation": 0.05,
            }
        ],
        "evaluation": {"suites": [suite], "samples": ["the film is"], "sample_tokens": 24},
    }  # fmt: skip
    recipe = parse_recipe(raw)
    run_recipe(recipe, to_toml(recipe), folder / "start-run")
    merge_target(open_target(str(folder / "start-run" / "sft")), start)
    shutil.rmtree(folder / "start-run" / "sft" / "checkpoints", ignore_errors=True)
    return start
