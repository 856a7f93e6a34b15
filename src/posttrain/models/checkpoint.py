"""A model's folder read and written by transformers alone, by the names and in the layout of its own checkpoint.

transformers may hold tensors otherwise than the files do: the experts of a layer as one tensor, or under other names.
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
    """transformers' own model of a folder, frozen, on the CPU. Raises ModelError where the files do not make up a whole one."""
    refuse_adapter_beside(folder, where)
    try:
        model, info = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=dtype, attn_implementation="eager", trust_remote_code=False, use_safetensors=True,
            local_files_only=True, output_loading_info=True,
        )  # fmt: skip
    except Exception as error:  # noqa: BLE001 - damaged files break their readers anywhere
        found = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(where, f"cannot be loaded: {found[0][:300]}", do="check that the files are whole") from None
    refuse_missing(info, where)
    return model.requires_grad_(False).eval()


def refuse_missing(info: dict[str, Any], where: str) -> None:
    """Refuse a folder that lacks tensors, which transformers fills with random numbers or zeros. Raises ModelError."""
    if info["missing_keys"]:
        missing = sorted(info["missing_keys"])
        raise ModelError(
            where, f"the weights lack {missing[0]} ({len(missing)} tensors)", do="check that all files of the model are there"
        )


def checkpoint_tensors(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a model by the names, and in the layout, of the checkpoint that it was read from."""
    stored = revert_weight_conversion(model, state)
    return {name: tensor.detach().cpu().contiguous() for name, tensor in stored.items()}


def check_round_trip(model: Any, where: str) -> None:
    """Refuse a base whose trained weights could not be written and read again. Raises ModelError."""
    state = model.state_dict()
    try:
        again = type(model).from_pretrained(
            None, config=model.config, state_dict=checkpoint_tensors(model, state), dtype=model.dtype
        ).state_dict()  # fmt: skip
        lost = [name for name, tensor in state.items() if not torch.equal(again[name], tensor)]
    except Exception as error:  # noqa: BLE001 - the conversions of an architecture may fail anywhere
        lost = [str(error)[:100]]
    if lost:
        raise ModelError(
            where, f"its weights change when they are written and read again ({lost[0]})", allowed='[adapter] kind = "lora"'
        )
