"""`posttrain merge`: an adapter folded into its base, as a model folder that any tool reads.

    W' = W + scale * B A        in float32, from the base's own files; trained embedding rows take their places

The folder holds `model.safetensors` (float32, so that merged and unmerged logits agree to 1e-5), `config.json`, the
tokenizer with the chat template that was trained with, and a generation config that stops at the template's end of turn.
A stage with full weights is written as it is. Left out: quantised bases and shards.
"""

import copy
import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from posttrain.artifacts import disk_error, fsync_folder, fsync_tree
from posttrain.errors import ArtifactError
from posttrain.models.files import base_tensors, full_state
from posttrain.models.load import BaseModel
from posttrain.models.lora import LoraAdapter
from posttrain.models.target import Target


def merge_target(target: Target, out: Path) -> Path:
    """Write the target's policy as a whole model into the new folder `out`; whole or not at all.

    Raises ArtifactError for the base itself and for a folder that exists, AdapterError for an adapter of another base.
    """
    if target.policy == "base":
        raise ArtifactError("merge", "the base itself has nothing to merge", do="name a trained stage, RUN/STAGE")
    if out.exists() or out.is_symlink():
        raise ArtifactError(str(out), "exists already", do="name a folder that does not exist yet")
    routing = target.policies.activate(target.policy)
    base = target.base
    adapter = None if routing == "base" else base.adapters.get(routing)
    partial = out.with_name(f".{out.name}.{os.getpid()}.partial")
    try:
        partial.mkdir(parents=True)
        tensors = full_tensors(base) if adapter is None else merged_tensors(base, adapter)
        save_file(tensors, str(partial / "model.safetensors"), metadata={"format": "pt"})
        _write_settings(partial, base)
        fsync_tree(partial)
        os.rename(partial, out)
        fsync_folder(out.absolute().parent)
    except OSError as error:
        raise disk_error(out, error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return out


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


def _write_settings(folder: Path, base: BaseModel) -> None:
    """Config, generation config and tokenizer beside the weights."""
    config = copy.deepcopy(base.model.config)
    config.dtype = torch.float32
    config.save_pretrained(folder)
    generation = copy.deepcopy(base.model.generation_config)
    generation.eos_token_id = sorted(base.chat.end_ids)
    generation.save_pretrained(folder)
    base.tokenizer.inner.save_pretrained(folder)
    (folder / "chat_template.jinja").write_text(base.chat.template, encoding="utf-8")
