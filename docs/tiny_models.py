"""Tiny models with random weights of every causal architecture of transformers, for `make_models.py`.

A configuration is the architecture's default one with every size made small by the name of its field. What a rule by name
cannot say stands in `CHANGES`. All weights are random, those of norms and biases too, so that none is hidden by a one or zero.
"""

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto import modeling_auto

# By model type the class that a causal model is loaded as.
KINDS: dict[str, Any] = dict(modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
WIDTH, VOCABULARY, CONTEXT, WINDOW = 64, 263, 256, 8
# Above this a model is not tiny, and a rule is missing.
MOST_PARAMETERS = 6_000_000

_SAME_SIZE: dict[int, str] = {
    VOCABULARY: "decoder_vocab_size unpadded_vocab_size vocab_size vocab_size_per_layer_input",
    WIDTH: "attention_hidden_size backbone_hidden_size d_model decoder_dim decoder_hidden_size emb_dim embedding_dim "
    "embedding_size hidden_dim hidden_size input_embedding_size lru_width n_embd output_embedding_size "
    "word_embed_proj_dim",
    96: "d_inner decoder_ffn_dim dense_intermediate_size dff dim_ff encoder_ffn_dim feed_forward_size ffn_dim "
    "ffn_hidden_size intermediate_size intermediate_size_mlp n_inner",
    32: "classifier_proj_size expert_ffn_hidden_size index_head_dim kv_lora_rank moe_intermediate_size "
    "moe_shared_expert_intermediate_size q_lora_rank router_hidden_size shared_expert_intermediate_size "
    "shared_experts_intermediate_size shared_intermediate_size",
    2: "decoder_layers encoder_layers moe_k moe_topk n_layer n_layers num_decoder_layers num_encoder_layers "
    "num_experts_per_tok num_experts_per_token num_hidden_layers num_layers num_layers_per_stack",
    4: "attention_heads attention_num_heads decoder_attention_heads decoder_num_attention_heads "
    "encoder_attention_heads index_n_heads linear_num_heads linear_num_value_heads mamba_n_heads mamba_num_heads "
    "moe_num_experts n_head n_heads n_routed_experts num_attention_heads num_decoder_attention_heads "
    "num_encoder_attention_heads num_experts num_heads num_local_experts swa_num_attention_heads",
    1: "first_k_dense_replace moe_num_shared_experts n_group n_shared_experts num_dense_layers num_expert_group "
    "num_nextn_predict_layers num_shared_experts topk_group zero_expert_num",
    16: "adapter_rank attention_head_size d_head dim_head gated_norm_rank hc_lowrank head_dim "
    "hidden_size_per_layer_input kv_channels laurel_rank linear_head_dim linear_key_head_dim linear_value_head_dim "
    "mamba_d_head mamba_d_state mamba_dt_rank mamba_head_dim qk_nope_head_dim qk_rope_head_dim rotary_dim "
    "ssm_state_size state_size swa_head_dim time_step_rank v_head_dim",
    CONTEXT: "context_length max_position_embeddings max_seq_len max_target_positions model_max_length n_ctx n_positions",
    WINDOW: "attention_window_size keep_window_size local_attention sliding_window sliding_window_size window_size",
}  # fmt: skip
SIZES: dict[str, int] = {name: size for size, names in _SAME_SIZE.items() for name in names.split()}
# Fewer heads of keys than of queries, where the default has fewer.
KEY_HEADS = ("num_key_value_heads", "swa_num_key_value_heads", "num_kv_heads", "linear_num_key_heads")
TOKENS = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 1, "sep_token_id": 2}
# What shrinking by name cannot know: sizes that depend on each other, and values that hide what an architecture adds.
CHANGES: dict[str, dict[str, Any]] = {
    "bamba": {"mamba_n_heads": 8, "mamba_d_head": 16, "attn_layer_indices": [1]},
    "cohere_compass_text": {"layer_types": ["sliding_attention", "full_attention"]},
    "cwm": {"layer_types": ["sliding_attention", "full_attention"]},
    "deepseek_v2": {"first_k_dense_replace": 0, "topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {"n_routed_experts": 4, "n_shared_experts": 1, "num_experts_per_tok": 2},
    "gemma2": {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "attention_layers": ["global", "local"]},
    "granite": {"logits_scaling": 4.0},
    "granite_swa": {"logits_scaling": 4.0},
    "granitemoe": {"logits_scaling": 4.0},
    "granitemoehybrid": {"mamba_n_heads": 8, "mamba_d_head": 16, "layer_types": ["linear_attention", "full_attention"]},
    "granitemoeshared": {"logits_scaling": 4.0},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "hyperclovax": {"logits_scaling": 0.25},
    "lfm2": {"layer_types": ["conv", "full_attention"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"]},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 16},
    "roc_bert": {"pronunciation_vocab_size": 263, "shape_vocab_size": 263},
    "zamba2": {"layers_block_type": ["linear_attention", "hybrid"]},
    "zamba": {"layers_block_type": ["linear_attention", "hybrid"]},
}  # fmt: skip


def shrunk(defaults: dict[str, Any]) -> dict[str, Any]:
    """The fields of a configuration that are made small, by name; parts that are configurations themselves likewise."""
    found: dict[str, Any] = {}
    for name, value in defaults.items():
        if isinstance(value, dict) and "model_type" in value:
            found[name] = value | shrunk(value)
        elif name in ("layer_types", "mlp_layer_types", "layers_block_type") and value:
            kinds = list(dict.fromkeys(value))  # one layer of each kind, where there are two
            found[name] = (kinds * 2)[:2]
        elif name in KEY_HEADS and isinstance(value, int):
            queries = max((defaults[n] for n in ("num_attention_heads", "swa_num_attention_heads") if n in defaults), default=0)
            found[name] = 4 if value == queries else 2
        elif name in SIZES and isinstance(value, int) and not isinstance(value, bool) and value > SIZES[name]:
            found[name] = SIZES[name]
        elif name in TOKENS and value is not None:
            found[name] = TOKENS[name]
    return found


def tiny_config(kind: str) -> Any:
    """The configuration of a tiny model of this kind."""
    defaults = transformers.AutoConfig.for_model(kind).to_dict()
    changes = shrunk(defaults) | CHANGES.get(kind, {})
    return transformers.AutoConfig.for_model(kind, **changes)


def tiny_model(kind: str) -> Any:
    """A tiny model of this kind with random weights; its parameters are the same each time."""
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(tiny_config(kind), attn_implementation="eager")
    assert sum(p.numel() for p in model.parameters()) < MOST_PARAMETERS, sum(p.numel() for p in model.parameters())
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                nn.init.normal_(parameter, std=0.12)
            else:
                nn.init.normal_(parameter, mean=parameter.mean().item(), std=0.3)
    return model.eval()
