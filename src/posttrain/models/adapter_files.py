"""Policies on disk: adapters in PEFT's format, full weights as safetensors; both contain the hash of their base.

PEFT and vLLM read `adapter_config.json` and `adapter_model.safetensors`. The base's hash is in the safetensors metadata. An
adapter of another base is refused, because it would load without an error and give nonsense.
"""

import hashlib
import json
import math
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load, save_file
from torch import nn

from posttrain.artifacts import hash_file, verify_files, write_json
from posttrain.errors import AdapterError, RecipeError
from posttrain.models.adapter_config import ADAPTER_CONFIG, is_reward_model, read_settings
from posttrain.models.base_model import BaseModel
from posttrain.models.checkpoint import checkpoint_tensors, read_model
from posttrain.models.embedding_rows import TokenRows
from posttrain.models.heads import SCORE_NAME, ScoreHead
from posttrain.models.lora import LoraAdapter, LoraSettings, LoraShape
from posttrain.models.source import verify_source

ADAPTER_WEIGHTS = "adapter_model.safetensors"
FULL_WEIGHTS = "model.safetensors"
PREFIX = "base_model.model."
FULL_SCORE = "score.weight"
TOKEN_ROWS = ".token_adapter.trainable_tokens_delta"
# Supported dtypes of an adapter's tensors; others are quantised, or not weights.
TYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
# Upper limit of an adapter's config in bytes.
CONFIG_BYTES = 2**22


def save_adapter(folder: Path, adapter: LoraAdapter, base: BaseModel) -> None:
    """Write one adapter in PEFT's format, float32."""
    tensors = {n: p.detach().cpu().contiguous() for n, p in adapter.parameters().items()}
    shift = {"score_shift": repr(adapter.head.shift)} if adapter.head is not None else {}
    save_tensors(folder / ADAPTER_WEIGHTS, tensors, {"format": "pt", **_identity(base), **shift})
    write_json(folder / ADAPTER_CONFIG, _peft_config(adapter, base))


def save_tensors(path: Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str]) -> None:
    """Write safetensors whose bytes depend only on the content: the library writes metadata in random order, here it is
    sorted."""
    save_file(tensors, str(path), metadata=metadata)
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(length))
        header["__metadata__"] = dict(sorted(metadata.items()))
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        assert len(text) <= length, "the same header in another order is not longer"
        file.seek(8)
        file.write(text.ljust(length))


def _identity(base: BaseModel) -> dict[str, str]:
    names = {"weights_hash": "base_weights_hash", "tokenizer_hash": "tokenizer_hash", "template_hash": "template_hash"}
    identity = base.identity()
    return {stored: identity[name] for name, stored in names.items()}


def _peft_config(adapter: LoraAdapter, base: BaseModel) -> dict[str, Any]:
    settings = adapter.settings
    config: dict[str, Any] = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base.source.model,
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "use_rslora": settings.scaling == "rslora",
        "target_modules": sorted({layer.rsplit(".", 1)[-1] for layer in adapter.weights}),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "modules_to_save": None,
    }
    if adapter.head is not None:
        config |= {"task_type": "SEQ_CLS", "modules_to_save": ["score"]}
    if adapter.tokens is not None:
        config["trainable_token_indices"] = {adapter.tokens.layer.rsplit(".", 1)[-1]: list(adapter.tokens.ids)}
    return config


class AdapterFiles(NamedTuple):
    """The two files of an adapter, read once, so that the hashed bytes are the used bytes even if the files change.

    The fingerprint is the sha256 over the sha256 of the config and that of the weights, all in hex.
    """

    config: bytes
    weights: bytes
    fingerprint: str


def load_adapter(folder: Path, name: str, base: BaseModel, *, require_hash: bool = True) -> LoraAdapter:
    """Read an adapter and add it to the base under `name`. Raises as `read_adapter` and `make_adapter` do."""
    where = f"adapter {folder}"
    files = read_adapter(folder, where=where)
    return base.adapters.add(make_adapter(name, files, base, where=where, require_hash=require_hash))


def read_adapter(folder: Path, *, where: str, limit: int | None = None) -> AdapterFiles:
    """Read the files of an adapter, weights of at most `limit` bytes. Raises AdapterError if they are missing or too large."""
    files = _read_file(folder / ADAPTER_CONFIG, where, CONFIG_BYTES), _read_file(folder / ADAPTER_WEIGHTS, where, limit)
    hashes = [hashlib.sha256(data).hexdigest() for data in files]
    return AdapterFiles(*files, hashlib.sha256("".join(hashes).encode()).hexdigest())


def _read_file(path: Path, where: str, limit: int | None) -> bytes:
    try:
        # O_NONBLOCK: opening a pipe does not wait for its writer; it is refused below.
        with open(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise AdapterError(where, f"{path.name} is not a file", do="give a folder in PEFT's format")
            if limit is not None and status.st_size > limit:
                raise AdapterError(where, f"{path.name} has {status.st_size} bytes", allowed=f"at most {limit}")
            return file.read(status.st_size)
    except (FileNotFoundError, NotADirectoryError):
        pickles = sorted(p.name for p in path.parent.glob("*.bin")) if path.name == ADAPTER_WEIGHTS else []
        found = f"no {path.name}" + (f", only a pickle file ({pickles[0]}), which can run code" if pickles else "")
        raise AdapterError(where, found, do="give a folder in PEFT's format with safetensors") from None
    except OSError as error:
        raise AdapterError(where, f"{path.name} cannot be read ({error.strerror})", do="fetch the adapter again") from None


def make_adapter(
    name: str, files: AdapterFiles, base: BaseModel, *, where: str, require_hash: bool = True
) -> LoraAdapter:  # fmt: skip
    """Make an adapter of its files, without adding it to the base.

    Raises AdapterError if it is damaged, has wrong shapes, or belongs to another base; with `require_hash` also if it does not
    name its base, as adapters written by other tools.
    """
    config = read_settings(files.config, where)
    settings = LoraSettings(
        int(config["r"]), float(config["lora_alpha"]), 0.0, tuple(sorted(config["target_modules"])),
        "rslora" if config.get("use_rslora") else "standard",
    )  # fmt: skip
    tensors, metadata = _parse_tensors(files.weights, where)
    check_base(metadata.get("base_weights_hash"), base, where, require_hash=require_hash)
    if metadata.get("tokenizer_hash", base.source.tokenizer_hash) != base.source.tokenizer_hash:
        raise AdapterError(where, "was trained with another tokenizer", do="load it on its own base")
    tokens = _take_token_rows(tensors, config.get("trainable_token_indices"), base, where)
    head = _take_head(tensors, metadata, base, where) if is_reward_model(config) else None
    try:
        shapes = LoraShape.select(base.model, settings.targets)
    except RecipeError as error:  # its text names a recipe, and there is none
        raise AdapterError(where, f"target_modules: {error.found}", allowed=error.allowed) from None
    weights = _match(tensors, shapes, settings.rank, where, base.device)
    adapter = LoraAdapter(name, settings, weights, tokens, head)
    adapter.fingerprint = files.fingerprint
    return adapter


def _take_head(
    tensors: dict[str, torch.Tensor], metadata: dict[str, str], base: BaseModel, where: str, name: str = SCORE_NAME
) -> ScoreHead:
    """Remove the head of a reward model from `tensors` and return it. A head of another tool has no shift."""
    weight = tensors.pop(name, None)
    width = base.model.get_input_embeddings().weight.shape[1]
    if weight is None or tuple(weight.shape) != (1, width):
        found = "is missing" if weight is None else f"has shape {tuple(weight.shape)}"
        raise AdapterError(where, f"{name} {found}", allowed=f"shape {(1, width)}: a classifier with one label")
    try:
        shift = float(metadata.get("score_shift", 0.0))
    except ValueError:
        shift = math.nan
    if not math.isfinite(shift):
        raise AdapterError(where, f"score_shift {metadata['score_shift'][:40]!r}", allowed="a finite number")
    return ScoreHead(nn.Parameter(weight.float().to(base.device), requires_grad=False), shift)


def _take_token_rows(tensors: dict[str, torch.Tensor], indices: Any, base: BaseModel, where: str) -> TokenRows | None:
    """Remove the trained embedding rows from `tensors` and return them. PEFT writes a list of ids, or {layer: ids}."""
    layer = base.adapters.embedding_name
    if not indices:
        return None
    ids = indices.get(layer.rsplit(".", 1)[-1]) if isinstance(indices, dict) and len(indices) == 1 else indices
    vocabulary, width = base.model.get_input_embeddings().weight.shape
    if not isinstance(ids, list) or not all(isinstance(i, int) and 0 <= i < vocabulary for i in ids):
        raise AdapterError(where, f"trainable_token_indices {str(indices)[:80]}", allowed=f"ids of {layer}, below {vocabulary}")
    rows = tensors.pop(f"{PREFIX}{layer}{TOKEN_ROWS}", None)
    if rows is None or tuple(rows.shape) != (len(ids), width):
        found = "are missing" if rows is None else f"have shape {tuple(rows.shape)}"
        raise AdapterError(where, f"the embedding rows {found}", allowed=f"shape {(len(ids), width)}")
    return TokenRows(layer, tuple(ids), nn.Parameter(rows.float().to(base.device)))


def _parse_tensors(data: bytes, where: str) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    try:
        tensors = load(data)
        for name, tensor in tensors.items():
            if tensor.dtype not in TYPES:
                dtype = str(tensor.dtype).removeprefix("torch.")
                raise AdapterError(where, f"{name} is of type {dtype}", allowed="float32, bfloat16, float16 or float64")
        length = int.from_bytes(data[:8], "little")  # of the header, which the library has checked
        return tensors, json.loads(data[8 : 8 + length]).get("__metadata__") or {}
    except (SafetensorError, ValueError) as error:
        raise _damaged(where, ADAPTER_WEIGHTS, error) from None


def _damaged(where: str, name: str, error: Exception) -> AdapterError:
    return AdapterError(where, f"{name} is damaged ({str(error)[:80]})", do="fetch or train the adapter again")


def check_base(base_hash: str | None, base: BaseModel, where: str, *, require_hash: bool) -> None:
    """Raises AdapterError for weights that were trained on another base (`base_hash`)."""
    if base_hash is None and not require_hash:
        return
    if base_hash != base.source.weights_hash:
        trained_on = f"was trained on base {base_hash[:12]}" if base_hash else "does not say which base it was trained on"
        raise AdapterError(
            where,
            f"{trained_on}, not on {base.source.model} ({base.source.weights_hash[:12]})",
            do="load it on its own base",
        )


def _match(
    tensors: dict[str, torch.Tensor], shapes: dict[str, tuple[int, int]], rank: int, where: str, device: torch.device
) -> dict[str, tuple[nn.Parameter, nn.Parameter]]:
    weights = {}
    wanted = set()
    for layer, (inputs, outputs) in shapes.items():
        pair = []
        for letter, shape in (("A", (rank, inputs)), ("B", (outputs, rank))):
            name = f"{PREFIX}{layer}.lora_{letter}.weight"
            wanted.add(name)
            tensor = tensors.get(name)
            if tensor is None or tuple(tensor.shape) != shape:
                found = "is missing" if tensor is None else f"has shape {tuple(tensor.shape)}"
                raise AdapterError(where, f"{name} {found}", allowed=f"shape {shape}", do="load it on its own base")
            pair.append(nn.Parameter(tensor.float().to(device), requires_grad=False))
        weights[layer] = (pair[0], pair[1])
    extra = [n for n in tensors if n not in wanted]
    if extra:
        raise AdapterError(where, f"unknown tensor {extra[0]} ({len(extra)} of them)", do="load it on its own base")
    return weights


def full_state(base: BaseModel) -> dict[str, nn.Parameter]:
    """Every parameter by its name in transformers; tied weights once."""
    return {name: tensor for name, tensor in whole_state(base).items() if isinstance(tensor, nn.Parameter)}


def whole_state(base: BaseModel) -> dict[str, torch.Tensor]:
    """All tensors of a model's file by their names in transformers: parameters and persistent buffers (such as the bias by
    which some architectures choose experts). Tied weights once.
    """
    return {name.replace(".base.", "."): tensor for name, tensor in untied(base.model.state_dict(keep_vars=True)).items()}


def untied(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A model's state with each tensor under its first name only, because a file contains tied weights once."""
    first: dict[int, str] = {}
    for name, tensor in state.items():
        first.setdefault(id(tensor), name)
    return {name: state[name] for name in first.values()}


def save_full(folder: Path, base: BaseModel, head: ScoreHead | None = None) -> None:
    """Write all weights, the head of a reward model, and the model's config, so that transformers can load the folder.

    Tensors have the names of the base's original checkpoint.
    """
    tensors = checkpoint_tensors(base.model, whole_state(base))
    extra = {"format": "pt", **_identity(base)}
    if head is not None:
        tensors[FULL_SCORE] = head.weight.detach().cpu().contiguous()
        extra["score_shift"] = repr(head.shift)
    save_tensors(folder / FULL_WEIGHTS, tensors, extra)
    base.model.config.save_pretrained(folder)
    base.tokenizer.inner.save_pretrained(folder)


def load_full(path: Path, base: BaseModel) -> ScoreHead | None:
    """Copy the weights of a finished full fine-tuning stage into the model; returns the head of a reward model.

    Raises AdapterError if they belong to another base, ModelError if the folder is incomplete.
    """
    where = f"weights {path}"
    try:
        with safe_open(str(path), framework="pt") as file:
            metadata = file.metadata() or {}
            score = {FULL_SCORE: file.get_tensor(FULL_SCORE)} if FULL_SCORE in file.keys() else {}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise _damaged(where, path.name, error) from None
    check_base(metadata.get("base_weights_hash"), base, where, require_hash=True)
    head = _take_head(score, metadata, base, where, FULL_SCORE) if score else None
    _copy_into(base, read_model(path.parent, where), where)
    base.weights_hash = hash_file(path)
    return head


def read_base(base: BaseModel, *, dtype: torch.dtype = torch.float32) -> Any:
    """transformers' model of the base's files. Raises ModelError if the files changed since they were loaded."""
    verify_source(base.source)
    return read_model(base.source.folder, f"base {base.source.folder}", dtype=dtype)


def reload_base(base: BaseModel) -> None:
    """Copy the base's original weights back into the model."""
    _copy_into(base, read_base(base, dtype=base.model.dtype), f"base {base.source.folder}")
    base.weights_hash = base.source.weights_hash


def _copy_into(base: BaseModel, model: Any, where: str) -> None:
    state, target = model.state_dict(), whole_state(base)
    for name, tensor in target.items():
        if name not in state or state[name].shape != tensor.shape:
            raise AdapterError(where, f"{name} is missing or has another shape", do="load it on its own base")
    with torch.no_grad():
        for name, tensor in target.items():
            tensor.copy_(state[name])


class Policies:
    """The policies of a run by name. Adapters share the memory of the base; full weights replace it."""

    def __init__(self, base: BaseModel, run: Path) -> None:
        self.base, self.run = base, run
        self._in_place = "base"

    def activate(self, name: str) -> str:
        """Load a policy and return the adapter name to route to. For full weights, which replace the base's weights, that is
        "base" or the name of their head.
        """
        if name == "base" or (self.run / name / FULL_WEIGHTS).exists():
            if self._in_place != name:
                if name == "base":
                    reload_base(self.base)
                else:
                    verify_files(self.run / name, (FULL_WEIGHTS,))
                    head = load_full(self.run / name / FULL_WEIGHTS, self.base)
                    if head is not None:
                        self.base.adapters.add_head(name, head)
                self._in_place = name
            return name if name in self.base.adapters else "base"
        if name not in self.base.adapters:
            verify_files(self.run / name, (ADAPTER_WEIGHTS, ADAPTER_CONFIG))
            load_adapter(self.run / name, name, self.base)
        return name

    @contextmanager
    def instead(self, name: str) -> Iterator[str]:
        """Activate another policy inside the context, and yield the adapter name to route to. Full weights in training are
        restored afterwards."""
        if name != "base" and not (self.run / name / FULL_WEIGHTS).exists():
            yield self.activate(name)
            return
        trained = [p for p in full_state(self.base).values() if p.requires_grad]
        saved = [p.detach().clone() for p in trained]
        if not trained:
            yield self.activate(name)
            return
        self._changed()
        try:
            yield self.activate(name)
        finally:
            with torch.no_grad():
                for parameter, value in zip(trained, saved, strict=True):
                    parameter.copy_(value)
            self._changed()

    def forget(self, name: str) -> None:
        """Drop the copy of a policy in memory, because a stage has trained or replaced it."""
        self.base.adapters.remove(name)
        if name == "base":  # full fine-tuning changed the base's weights in memory
            self._changed()

    def _changed(self) -> None:
        """Record that the weights in memory belong to no stage."""
        self._in_place, self.base.weights_hash = "", None
