"""Low-rank adapters (Hu et al. 2021): several by name on one base, chosen for a whole batch or per token of it.

    y = x W^T + scale * (x A^T) B^T,   A: [R, inputs],  B: [outputs, R],  scale = alpha / R  (rsLoRA: alpha / sqrt(R))

A starts uniform in +-1/sqrt(inputs), B at zero, so a new adapter is the base exactly. Adapter weights are float32; the
products run in the type of the activations. Files are PEFT's format to the letter (`adapter_model.safetensors`,
`adapter_config.json`); the metadata carries the hash of the base, and another base is refused.
Embedding rows trained beside: `models/embedding_rows.py`.

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
    """Which linear layers of a model an adapter covers."""

    @staticmethod
    def select(model: Any, targets: str | tuple[str, ...]) -> dict[str, tuple[int, int]]:
        """Names and (inputs, outputs) of the selected layers; the head is never one of them.

        Raises RecipeError when nothing, or a name that is not there, is selected.
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
    """The linear layers of a model by name that are not wrapped yet, without its head. A subclass, a router for instance, may
    compute more, and is left as it is."""
    head = model.get_output_embeddings()
    layers = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and module is not head}
    return {name: module for name, module in layers.items() if not name.endswith(".base")}


def _matches(name: str, targets: str | tuple[str, ...]) -> bool:
    path = name.split(".")
    if isinstance(targets, tuple):
        return path[-1] in targets
    parents = {"attention": ATTENTION_PARENTS, "mlp": MLP_PARENTS}.get(targets)
    return parents is None or any(part in parents for part in path[:-1])


def count_parameters(shapes: dict[str, tuple[int, int]], rank: int) -> int:
    """Trainable parameters of an adapter: rank times the sum of inputs and outputs over its layers."""
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes.values())


class Routing:
    """Which adapter each token of the batch in flight uses; every wrapped layer looks here."""

    def __init__(self) -> None:
        self.whole: LoraAdapter | None = None
        self.tokens: TokenAdapters | SlotAdapters | None = None


class LoraLinear(nn.Module):
    """A frozen linear layer that adds the product of whatever adapter is routed to."""

    def __init__(self, base: nn.Linear, name: str, routing: Routing) -> None:
        super().__init__()
        self.base, self.name, self.routing = base, name, routing
        self.in_features, self.out_features = base.in_features, base.out_features

    @property
    def weight(self) -> Tensor:
        """The frozen weight."""
        return self.base.weight

    def forward(self, x: Tensor) -> Tensor:
        """x [..., inputs] -> [..., outputs]; with an adapter for each token, all tokens of the batch in order."""
        if self.routing.tokens is not None:
            # Some layers, such as an expert that all tokens share, are given the tokens without a batch around them.
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
    """The named adapters on one base, and the routing that chooses among them.

    One thread may add, retire and remove adapters while another computes: a name is looked up once, by one operation on a
    dict, and what is computed holds the adapter itself. An adapter is frozen before it has a name.
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
        """The adapters in memory, without the base."""
        return tuple(self._adapters)

    def get(self, name: str) -> LoraAdapter:
        """An adapter by name. Raises AdapterError where it is not loaded."""
        adapter = self._adapters.get(name) or self._retired.get(name)
        if adapter is None:
            raise AdapterError(
                f'adapter "{name}"',
                "is not loaded",
                allowed=f"there is: base, {', '.join(self._adapters)}".rstrip(", "),
            )
        return adapter

    def create(self, name: str, settings: LoraSettings, *, seed: int, token_ids: tuple[int, ...] = ()) -> LoraAdapter:
        """A new adapter that equals the base: A uniform in +-1/sqrt(inputs), B zero, the base's rows for `token_ids`."""
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
        """Keep an adapter under its name, frozen."""
        adapter.requires_grad_(False)
        self._adapters[adapter.name] = adapter
        return adapter

    def add_head(self, name: str, head: ScoreHead) -> LoraAdapter:
        """A head alone under a name, on the model's own weights: a reward model of full fine-tuning."""
        return self.add(LoraAdapter(name, LoraSettings(1, 1.0, 0.0, (), "standard"), {}, head=head))

    def copy(self, source: str, name: str) -> LoraAdapter:
        """A copy of an adapter under another name."""
        original = self.get(source)
        weights = {
            n: (nn.Parameter(a.detach().clone()), nn.Parameter(b.detach().clone())) for n, (a, b) in original.weights.items()
        }
        tokens = original.tokens.copy() if original.tokens else None
        head = original.head.copy() if original.head else None
        return self.add(LoraAdapter(name, original.settings, weights, tokens, head))

    def remove(self, name: str) -> None:
        """Forget an adapter."""
        self._adapters.pop(name, None)

    def retire(self, name: str) -> None:
        """Forget an adapter once nothing holds it any more; until then `get` still finds it, and nothing else does."""
        self._retired[name] = self._adapters[name]  # first, so that no look-up falls between the two
        del self._adapters[name]

    @contextmanager
    def use(self, name: str) -> Iterator[None]:
        """Everything inside runs with one adapter ("base" for none)."""
        before = self.routing.whole
        self.routing.whole = None if name == "base" else self.get(name)
        try:
            yield
        finally:
            self.routing.whole = before

    @contextmanager
    def use_tokens(self, tokens: TokenAdapters | SlotAdapters) -> Iterator[None]:
        """Tokens of the batch use different adapters, without gradients: for generation."""
        before, self.routing.tokens = self.routing.tokens, tokens
        try:
            yield
        finally:
            self.routing.tokens = before

    def embed(self, ids_T: Tensor, runs: Sequence[tuple[int, LoraAdapter | None]]) -> Tensor:
        """What the model takes tokens for [1, T, D], with the trained rows of these runs of adapters."""
        embedded: Tensor = self._embedding(ids_T[None])
        return self._with_rows(ids_T[None], embedded, runs)

    def _embed(self, module: nn.Module, inputs: tuple[Tensor], embedded: Tensor) -> Tensor | None:
        """After the embedding: trained rows of the adapters in force replace the base's. None leaves the output as it is."""
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
