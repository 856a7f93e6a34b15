"""Tiny bases with random weights of every architecture that the attention function serves, made in code."""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from posttrain.models.base_model import BaseModel, load_base
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
# What some families add to the head, to attention, or to both.
ADDITIONS: dict[str, tuple[type, dict[str, Any]]] = {
    "cohere, scaled logits": (transformers.CohereConfig, {"logit_scale": 0.3}),
    "granite, divided logits": (transformers.GraniteConfig, {"logits_scaling": 4.0, "tie_word_embeddings": False}),
    "phi, bias of the head": (transformers.PhiConfig, {"tie_word_embeddings": False}),
    "gpt_oss, sliding, sinks": (
        transformers.GptOssConfig,
        {
            "head_dim": 16, "sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2,
            "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        },
    ),
    "minicpm3, values narrower than keys": (
        transformers.MiniCPM3Config,
        {
            "num_key_value_heads": 4, "q_lora_rank": 32, "kv_lora_rank": 32, "qk_nope_head_dim": 16, "qk_rope_head_dim": 8,
            "v_head_dim": 12, "dim_model_base": 16,
        },
    ),
}  # fmt: skip
ALL = CONFIGS | ADDITIONS


def make_base(name: str, folder: Path, dtype: str = "float32") -> BaseModel:
    """A tiny base of an architecture, with the tokenizer of random:tiny."""
    kind, changes = ALL[name]
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
