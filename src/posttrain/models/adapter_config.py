"""The settings of an adapter in PEFT's format (`adapter_config.json`): each is supported, without effect, or refused.

An adapter is plain LoRA here: y = W x + scale B A x. A setting that changes this equation, or that says that W was changed too,
is refused by name, because the adapter would load without an error and give other numbers. An unknown setting, such as one of a
later PEFT, must have an empty value.
"""

import json
from collections.abc import Callable
from typing import Any

from posttrain.errors import AdapterError

ADAPTER_CONFIG = "adapter_config.json"

# Settings that `read_settings` and its callers support.
_FOLLOWED = frozenset({"peft_type", "r", "lora_alpha", "target_modules", "trainable_token_indices"})
# Settings that matter in training only, or that describe the origin of other values.
_WITHOUT_EFFECT = frozenset({
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision", "inference_mode", "lora_dropout",
    "megatron_core", "layers_pattern", "runtime_config", "qalora_group_size", "ensure_weight_tying",
    "eva_config", "loftq_config", "corda_config", "lora_ga_config",
})  # fmt: skip
# Initialisations that leave the base unchanged. The others (pissa, olora, corda, loftq, lora_ga) subtract a part from it, so
# that the saved A and B belong to a base that is not in any file.
_STARTS = (True, False, "gaussian", "orthogonal", "eva")
_PLAIN: dict[str, Callable[[Any], bool]] = {
    "bias": lambda value: value == "none",
    "use_rslora": lambda value: isinstance(value, bool),
    "init_lora_weights": lambda value: (value.lower() if isinstance(value, str) else value) in _STARTS,
}


def read_settings(data: bytes, where: str) -> dict[str, Any]:
    """The settings of an adapter. Raises AdapterError for what is not plain LoRA with a list of layers."""
    try:
        config = json.loads(data)
    except (ValueError, RecursionError):
        raise AdapterError(where, f"{ADAPTER_CONFIG} is not readable as JSON", do="fetch the adapter again") from None
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        kind = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise AdapterError(where, f"peft_type {kind!r}", allowed="a LoRA adapter of PEFT's format")
    rank, alpha, layers = config.get("r"), config.get("lora_alpha"), config.get("target_modules")
    named = isinstance(layers, list) and bool(layers) and all(isinstance(name, str) and name.isprintable() for name in layers)
    # Written so that NaN and integers too large for a float are refused as well.
    a_number = isinstance(alpha, int | float) and not isinstance(alpha, bool) and abs(alpha) < 1e9
    if type(rank) is not int or rank < 1 or not a_number or not named:
        raise AdapterError(
            where, f"r {rank!r}, lora_alpha {alpha!r}, target_modules {str(layers)[:60]}",
            allowed="a rank, a number, and a list of layer names",
        )  # fmt: skip
    _refuse_what_is_not_plain(config, where)
    return config


def is_reward_model(config: dict[str, Any]) -> bool:
    """Whether the adapter's file also contains the head of a reward model."""
    return config.get("task_type") == "SEQ_CLS" and config.get("modules_to_save") == ["score"]


def _refuse_what_is_not_plain(config: dict[str, Any], where: str) -> None:
    refused = [name for name, value in config.items() if not _is_plain(name, value, config)]
    if refused:
        shown = ", ".join(f"{name} = {json.dumps(config[name])[:40]}" for name in sorted(refused))
        raise AdapterError(
            where, f"uses {shown}", allowed="plain LoRA with a list of layers",
            do="have the tool that trained it convert it to plain LoRA, or merge it into its base there",
        )  # fmt: skip


def _is_plain(name: str, value: Any, config: dict[str, Any]) -> bool:
    # Not "is it false": layers_to_transform = 0 is the first layer.
    empty = value is None or value is False or value in ([], {}, "")
    if name in _PLAIN:
        return value is None or _PLAIN[name](value)
    if name == "modules_to_save" and not empty:
        return is_reward_model(config)
    return empty or name in _FOLLOWED | _WITHOUT_EFFECT
