"""Context length, head scale and text settings from a model's configuration, for all architectures. Does not import torch.

    z = s W h + b,   then softcap tanh(z / softcap) where the model is soft-capped

The scale s has a different name in each family, and some divide by it. Unknown families are not scaled, and the check at load
(`models/verify.py`) refuses them.
"""

import sys
from typing import Any

CONTEXT_NAMES = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx")


def text_settings(config: Any) -> dict[str, Any]:
    """A configuration's values of the text model, under transformers' common names and under the architecture's names."""
    text = config.get_text_config()
    values: dict[str, Any] = text.to_dict()
    return values | {common: values[name] for common, name in text.attribute_map.items() if name in values}


def context_of(settings: dict[str, Any]) -> int:
    """Context length in tokens; sys.maxsize if the configuration has none."""
    return next((settings[name] for name in CONTEXT_NAMES if isinstance(settings.get(name), int)), sys.maxsize)


def head_scale(settings: dict[str, Any]) -> float:
    """The factor of the head's logits."""
    kind, scale = settings.get("model_type"), 1.0
    if settings.get("logit_scale") is not None:  # Cohere
        scale *= settings["logit_scale"]
    if settings.get("logits_scaling") is not None:  # Granite divides by it, HyperCLOVA X multiplies
        scale *= settings["logits_scaling"] if kind == "hyperclovax" else 1 / settings["logits_scaling"]
    if settings.get("lm_head_multiplier") is not None:  # Falcon-H1
        scale *= settings["lm_head_multiplier"]
    if kind == "minicpm3":
        scale *= settings["dim_model_base"] / settings["hidden_size"]
    return float(scale)
