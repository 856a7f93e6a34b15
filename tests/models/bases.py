"""Tiny bases with random weights of every architecture that the attention function serves, made in code."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from posttrain.models.load import BaseModel, load_base
from posttrain.models.source import locate_base

SHAPE: dict[str, Any] = {
    "vocab_size": 263, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 3, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
# A window of 8 is shorter than every row of these tests.
CONFIGS: dict[str, tuple[type, dict[str, Any]]] = {
    "llama": (transformers.LlamaConfig, {}),
    "llama untied": (transformers.LlamaConfig, {"tie_word_embeddings": False}),
    "qwen2": (transformers.Qwen2Config, {}),
    "qwen3": (transformers.Qwen3Config, {"head_dim": 16}),
    "mistral, sliding": (transformers.MistralConfig, {"sliding_window": 8}),
    "phi3, sliding": (transformers.Phi3Config, {"sliding_window": 8}),
    "phi3, half turned": (transformers.Phi3Config, {"partial_rotary_factor": 0.5}),
    "gemma3, sliding": (
        transformers.Gemma3TextConfig,
        {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"]},
    ),
    "gemma2, soft-capped": (
        transformers.Gemma2Config,
        {
            "head_dim": 16, "sliding_window": 8, "attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0,
            "query_pre_attn_scalar": 16, "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
}  # fmt: skip


def make_base(name: str, folder: Path, dtype: str = "float32") -> BaseModel:
    """A tiny base of an architecture, with the tokenizer of random:tiny."""
    kind, changes = CONFIGS[name]
    settings = {"tie_word_embeddings": True} | SHAPE | changes
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(kind(**settings))
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.12)
            else:
                nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.05)
    model.save_pretrained(folder)
    for path in locate_base("random:tiny").folder.glob("tokenizer*"):
        (folder / path.name).write_bytes(path.read_bytes())
    return load_base(str(folder), template="gemma", dtype=dtype, device="cpu")


def eager(base: BaseModel) -> Any:
    """The same model by transformers alone, with its own plain attention."""
    return transformers.AutoModelForCausalLM.from_pretrained(
        base.source.folder, dtype=torch.float32, attn_implementation="eager"
    )
