"""Reads and writes a model's folder with transformers, with the names and layout of its original checkpoint.

In memory, transformers may use other names or layouts than the files, such as one tensor for all experts of a layer.
"""

from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers.core_model_loading import revert_weight_conversion

from posttrain.errors import ModelError
from posttrain.models.source import refuse_adapter_beside


def read_model(folder: Path, where: str, *, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of a folder, frozen, on the CPU. Raises ModelError if the files are damaged or incomplete."""
    refuse_adapter_beside(folder, where)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False, use_safetensors=True,
            local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - damaged files can raise any exception
        lines = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(where, f"cannot be loaded: {lines[0][:300]}", do="check that the files are whole") from None
    refuse_missing(info, where)
    return model.requires_grad_(False).eval()


def refuse_missing(info: dict[str, Any], where: str) -> None:
    """Raises ModelError if a folder lacks tensors, which transformers would fill with random numbers or zeros."""
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            where, f"the weights lack {missing[0]} ({len(missing)} tensors)", do="check that all files of the model are there"
        )


def checkpoint_tensors(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model with the names and layout of the checkpoint that it was read from."""
    stored = revert_weight_conversion(model, state)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}


def check_round_trip(model: Any, where: str) -> None:
    """Raises ModelError for a base whose weights would change when written and read again."""
    state = model.state_dict()
    try:
        again = type(model).from_pretrained(
            None, config=model.config, state_dict=checkpoint_tensors(model, state), dtype=model.dtype
        ).state_dict()  # fmt: skip
        lost = [name for name, tensor in state.items() if not torch.equal(again[name], tensor)]
    except Exception as error:  # noqa: BLE001 - the conversions of an architecture can raise any exception
        lost = [str(error)[:100]]
    if lost:
        raise ModelError(
            where, f"its weights change when they are written and read again ({lost[0]})", allowed='[adapter] kind = "lora"'
        )
