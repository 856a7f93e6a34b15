"""`posttrain merge`: an adapter folded into its base, as a model folder that any tool reads.

    W' = W + scale * B A        in float32, from the base's own files; trained embedding rows take their places

The folder holds `model.safetensors` (float32, so that merged and unmerged logits agree to 1e-5), `config.json`, the
tokenizer with the chat template that was trained with, and a generation config that stops at the template's end of turn.
A stage with full weights is written as it is. Left out: quantised bases and shards.
"""

import copy
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from posttrain.artifacts import new_folder
from posttrain.errors import ArtifactError
from posttrain.models.files import FULL_WEIGHTS, base_tensors, full_state
from posttrain.models.load import BaseModel
from posttrain.models.lora import LoraAdapter
from posttrain.models.target import Target


def merge_target(target: Target, out: Path) -> Path:
    """Write the target's policy as a whole model into the new folder `out`; whole or not at all.

    Raises ArtifactError for the base itself and for a folder that exists, AdapterError for an adapter of another base.
    """
    if target.policy == "base":
        raise ArtifactError("merge", "the base itself has nothing to merge", do="name a trained stage, RUN/STAGE")
    with new_folder(out) as folder:
        write_merged(folder, target)
    return out


def write_merged(folder: Path, target: Target) -> None:
    """Write the target's policy as a whole model into a folder that is there.

    Raises AdapterError for an adapter of another base, ArtifactError where the disk refuses.
    """
    routing = target.policies.activate(target.policy)
    base = target.base
    adapter = None if routing == "base" else base.adapters.get(routing)
    tensors = full_tensors(base) if adapter is None else merged_tensors(base, adapter)
    try:
        save_file(tensors, str(folder / FULL_WEIGHTS), metadata={"format": "pt"})
    except SafetensorError as error:  # it tells what the disk said only in words
        raise ArtifactError(str(folder), str(error)[:200], do="make room or choose another folder with --out") from None
    config = copy.deepcopy(base.model.config)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    generation = copy.deepcopy(base.model.generation_config)
    generation.eos_token_id = sorted(base.chat.end_ids)
    generation.save_pretrained(folder)
    write_tokenizer(folder, base)


def write_tokenizer(folder: Path, base: BaseModel) -> None:
    """Write the tokenizer and the chat template that was trained with."""
    base.tokenizer.inner.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(base.chat.template, encoding="utf-8")


def full_tensors(base: BaseModel) -> dict[str, Tensor]:
    """Every weight in memory by transformers' name, as it is."""
    return {name: p.detach().cpu().contiguous() for name, p in full_state(base).items()}


@torch.no_grad()
def merged_tensors(base: BaseModel, adapter: LoraAdapter) -> dict[str, Tensor]:
    """Every weight of base and adapter together, float32, on the CPU."""
    tensors = {name: tensor.to(torch.float32, copy=True) for name, tensor in (full_tensors(base) | base_tensors(base)).items()}
    for layer, (a, b) in adapter.weights.items():
        tensors[f"{layer}.weight"] = torch.addmm(tensors[f"{layer}.weight"], b.cpu(), a.cpu(), alpha=adapter.settings.scale)
    if adapter.tokens is not None:
        tensors[f"{adapter.tokens.layer}.weight"][list(adapter.tokens.ids)] = adapter.tokens.rows.cpu()
    return tensors
