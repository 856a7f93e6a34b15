"""Low-rank adapters (Hu et al. 2021): several named adapters on one base, chosen per batch or per token.

    y = x W^T + scale * (x A^T) B^T,   A: [R, inputs],  B: [outputs, R],  scale = alpha / R  (rsLoRA: alpha / sqrt(R))

A is initialised uniform in +-1/sqrt(inputs) and B to zero, so a new adapter leaves the base's output unchanged. Adapter
weights are float32; the products run in the dtype of the activations. Files use PEFT's format unchanged
(`adapter_model.safetensors`, `adapter_config.json`). Their metadata holds the hash of the base; loading on another base fails.
Trained embedding rows: `models/embedding_rows.py`.

T: tokens, R: rank.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn
from torch.nn import functional

from posttrain.errors import AdapterError, RecipeError
from posttrain.kernels import linear, lora_linear
from posttrain.models.adapter import LoraAdapter as LoraAdapter
from posttrain.models.adapter import LoraSettings as LoraSettings
from posttrain.models.embedding_rows import TokenRows, replace_rows
from posttrain.models.heads import ScoreHead
from posttrain.models.token_adapters import SlotAdapters, TokenAdapters

ATTENTION_PARENTS = ("self_attn", "attn", "attention")
MLP_PARENTS = ("mlp", "feed_forward", "ffn")


class LoraShape:
    """The linear layers of a model that an adapter covers."""

    @staticmethod
    def select(model: Any, targets: str | tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """Names and (inputs, outputs) of the selected layers, never the head.

        Raises RecipeError if no layer matches, or if a target names no layer.
        """
        layers = {n: m for n, m in model.named_modules() if isinstance(m, LoraLinear)} or _linears(model)
        chosen = {n: m for n, m in layers.items() if _matches(n, targets)}
        last_names = sorted({n.rsplit(".", 1)[-1] for n in layers})
        unknown = [t for t in targets if t not in last_names] if isinstance(targets, tuple) else []
        if unknown or not chosen:
            raise RecipeError(
                "recipe · [adapter] targets",
                f"no layer {', '.join(unknown) or targets}",
                allowed=f"there is: {', '.join(last_names)}",
            )
        return {n: (int(m.in_features), int(m.out_features)) for n, m in chosen.items()}


def _linears(model: Any) -> dict[str, nn.Linear]:
    """The linear layers of a model that are not wrapped yet, by name, without the head. Subclasses of nn.Linear, such as
    routers, are left out: they may compute something else."""
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and module is not head}
    return {name: module for name, module in layers.items() if not name.endswith(".base")}


def _matches(name: str, targets: str | tuple[str, ...]) -> bool:
    path = name.split(".")
    if isinstance(targets, tuple):
        return path[-1] in targets
    parents = {"attention": ATTENTION_PARENTS, "mlp": MLP_PARENTS}.get(targets)
    return parents is None or any(part in parents for part in path[:-1])


class Routing:
    """The adapter of each token of the current batch. Every wrapped layer reads it."""

    def __init__(self) -> None:
        self.whole: LoraAdapter | None = None
        self.tokens: TokenAdapters | SlotAdapters | None = None


class LoraLinear(nn.Module):
    """A frozen linear layer that adds the low-rank product of the routed adapter."""

    def __init__(self, base: nn.Linear, name: str, routing: Routing) -> None:
        super().__init__()
        self.base, self.name, self.routing = base, name, routing
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        """The frozen weight."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]. With per-token adapters, x holds all tokens of the batch in order."""
        if self.routing.tokens is not None:
            # Some layers, such as an expert that all tokens share, get the tokens without a batch dimension.
            routed = self.routing.tokens.apply(self.name, x if x.dim() == 3 else x[None], self.base.weight, self.base.bias)
            return routed if x.dim() == 3 else routed[0]
        adapter = self.routing.whole
        pair = adapter.weights.get(self.name) if adapter else None
        if adapter is None or pair is None:
            return linear(x, self.base.weight, self.base.bias)
        scale = adapter.settings.scale
        if adapter.drops:
            plain = linear(x, self.base.weight, self.base.bias)
            return plain + _low_rank(functional.dropout(x, adapter.settings.dropout), pair, scale)
        return lora_linear(x, self.base.weight, self.base.bias, pair[0], pair[1], scale)


def _low_rank(x: Tensor, pair: tuple[nn.Parameter, nn.Parameter], scale: float) -> Tensor:
    a, b = pair
    return functional.linear(functional.linear(x, a.to(x.dtype)), b.to(x.dtype)) * scale


class AdapterSet:
    """The named adapters on one base, and the routing that selects them.

    One thread may add, retire and remove adapters while another computes: a forward looks a name up once, with one dict
    operation, and then keeps a reference to the adapter. `add` freezes an adapter before it registers the name.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._adapters: dict[str, LoraAdapter] = {}
        self._retired: WeakValueDictionary[str, LoraAdapter] = WeakValueDictionary()
        self.routing = Routing()
        _wrap_linears(model, self.routing)
        self._embedding: nn.Embedding = model.get_input_embeddings()
        self.embedding_name = next(name for name, module in model.named_modules() if module is self._embedding)
        # Gemma multiplies its embeddings by the square root of their width.
        self._embedding_scale = dict(self._embedding.named_buffers()).get("embed_scale")
        self._embedding.register_forward_hook(self._embed)

    def __contains__(self, name: str) -> bool:
        return name == "base" or name in self._adapters

    def names(self) -> tuple[str, ...]:
        """Names of the adapters in memory, without "base"."""
        return tuple(self._adapters)

    def get(self, name: str) -> LoraAdapter:
        """An adapter by name. Raises AdapterError if it is not loaded."""
        adapter = self._adapters.get(name) or self._retired.get(name)
        if adapter is None:
            raise AdapterError(
                f'adapter "{name}"',
                "is not loaded",
                allowed=f"there is: base, {', '.join(self._adapters)}".rstrip(", "),
            )
        return adapter

    def create(self, name: str, settings: LoraSettings, *, seed: int, token_ids: tuple[int, ...] = ()) -> LoraAdapter:
        """Add a new adapter that does not change the base's output: A uniform in +-1/sqrt(inputs), B zero, and for
        `token_ids` copies of the base's embedding rows."""
        generator = torch.Generator().manual_seed(seed)
        weights = {}
        for layer, (inputs, outputs) in LoraShape.select(self._model, settings.targets).items():
            bound = 1 / math.sqrt(inputs)
            a = torch.empty(settings.rank, inputs).uniform_(-bound, bound, generator=generator)
            weights[layer] = (
                nn.Parameter(a.to(self._device())),
                nn.Parameter(torch.zeros(outputs, settings.rank, device=self._device())),
            )
        tokens = None
        if token_ids:
            rows = self._embedding.weight.detach()[list(token_ids)].float()
            tokens = TokenRows(self.embedding_name, token_ids, nn.Parameter(rows))
        return self.add(LoraAdapter(name, settings, weights, tokens))

    def add(self, adapter: LoraAdapter) -> LoraAdapter:
        """Freeze an adapter and register it under its name."""
        adapter.requires_grad_(False)
        self._adapters[adapter.name] = adapter
        return adapter

    def add_head(self, name: str, head: ScoreHead) -> LoraAdapter:
        """Register a score head without matrices: a fully fine-tuned reward model uses the model's own weights."""
        return self.add(LoraAdapter(name, LoraSettings(1, 1.0, 0.0, (), "standard"), {}, head=head))

    def copy(self, source: str, name: str) -> LoraAdapter:
        """Copy an adapter under another name."""
        original = self.get(source)
        weights = {
            n: (nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())) for n, (a, b) in original.weights.items()
        }
        tokens = original.tokens.copy() if original.tokens else None
        head = original.head.copy() if original.head else None
        return self.add(LoraAdapter(name, original.settings, weights, tokens, head))

    def remove(self, name: str) -> None:
        """Remove an adapter from memory."""
        self._adapters.pop(name, None)

    def retire(self, name: str) -> None:
        """Remove an adapter as soon as nothing references it. Until then only `get` still finds it."""
        self._retired[name] = self._adapters[name]  # before the deletion, so that a concurrent look-up always finds it
        del self._adapters[name]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Route all tokens to one adapter ("base": none) inside the context."""
        before = self.routing.whole
        self.routing.whole = None if name == "base" else self.get(name)
        try:
            yield
        finally:
            self.routing.whole = before

    @contextmanager
    def use_tokens(self, tokens: TokenAdapters | SlotAdapters) -> Iterator[None]:
        """Route each token to its own adapter inside the context, without gradients: for generation."""
        before, self.routing.tokens = self.routing.tokens, tokens
        try:
            yield
        finally:
            self.routing.tokens = before

    def embed(self, ids_T: Tensor, runs: Sequence[tuple[int, LoraAdapter | None]]) -> Tensor:
        """Embeddings of tokens [1, T, D], with the trained rows of the adapter of each run."""
        embedded: Tensor = self._embedding(ids_T[None])
        return self._with_rows(ids_T[None], embedded, runs)

    def _embed(self, module: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor | None:
        """Forward hook of the embedding: replace rows that the current adapters trained. None keeps the output."""
        ids, tokens = inputs[0], self.routing.tokens
        if isinstance(tokens, SlotAdapters):
            return tokens.embedded
        runs = [(ids.shape[1], self.routing.whole)] if tokens is None else tokens.runs
        if all(adapter is None or adapter.tokens is None for _, adapter in runs):
            return None
        return self._with_rows(ids, embedded, runs)

    def _with_rows(self, ids: Tensor, embedded: Tensor, runs: Sequence[tuple[int, LoraAdapter | None]]) -> Tensor:
        parts, start = [], 0
        for count, adapter in runs:
            part = embedded[:, start : start + count]
            if adapter is not None and adapter.tokens is not None:
                part = replace_rows(part, ids[:, start : start + count], adapter.tokens, self._embedding_scale)
            parts.append(part)
            start += count
        return torch.cat(parts, dim=1)

    def _device(self) -> torch.device:
        return self._embedding.weight.device


def _wrap_linears(model: Any, routing: Routing) -> None:
    for name, module in _linears(model).items():
        parent_name, _, child = name.rpartition(".")
        setattr(model.get_submodule(parent_name), child, LoraLinear(module, name, routing))
