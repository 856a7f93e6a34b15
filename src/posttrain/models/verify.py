"""Checks at load that posttrain computes a base correctly, before anything is trained or written.

An architecture may have features that posttrain does not support: it may scale its logits, mix tokens outside of attention, or
call attention twice. Most of these raise no error and give wrong numbers. The check runs a probe through transformers' own
forward, with eager attention and the model's own modules, and compares its log-probabilities with those of

    packed      one packed batch: an unrelated segment, a shared prefix, and two segments below the prefix
    decoded     the same two rows with the cache: the prompts in two pieces, then one token of each per step

    difference = mean |log p - log p'| / std(log p)     over the targets, without the tenth that differ most

Dividing by the spread makes the measure independent of a scale of the logits. The largest differences are left out because a
tie in the routing of experts can change single tokens much. Models that docs/models.md calls right differ by at most 0.00001 in
float32, and in bfloat16 by 0.025, or 0.09 with routed experts. Wrong dense models differ in bfloat16 by 0.06 or more in at
least one of the two comparisons. The cache folder records which models passed.

T: tokens of a row, N: targets.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from posttrain.artifacts import write_json
from posttrain.cache_folder import cache_folder
from posttrain.data.chat import ChatFormat
from posttrain.errors import ArtifactError, ModelError
from posttrain.models.adapter_slots import NarrowAdapters
from posttrain.models.architecture import context_of, text_settings
from posttrain.models.attention import ATTENTION_NAME
from posttrain.models.cache import BLOCK, CacheStep, Filling, Past, Reading, Shelf
from posttrain.models.segments import Segments, Span
from posttrain.models.token_adapters import TokenAdapters

if TYPE_CHECKING:
    from posttrain.models.base_model import BaseModel

# Increase when the comparison changes, or the way in which posttrain computes a base.
VERIFICATION_VERSION = 1
# Tokens of a row, of the unrelated row, of the shared prefix at most, and tokens decoded one by one.
ROW, OTHER, SHARED, STEPS = 40, 9, 15, 6
# The probe is longer than a sliding window of up to this size.
WIDEST_WINDOW = 64
BEGINNING = "The old bridge over the river"
FIRST = " was closed last winter, and the people of the village now walk for an hour to reach the market on the other side."
SECOND = " will be mended in May: the town has found the money at last, and two engineers have drawn plans for a wider one."
UNRELATED = "She counted the coins twice."
# The share of targets that count, those with the smallest differences.
COUNTED = 0.9
# The largest allowed difference.
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# Factor of the tolerance with routed experts: in bfloat16 ties are broken differently, which changes many tokens a little.
ROUTED = {torch.float32: 1, torch.bfloat16: 3}


KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


class DifferentError(Exception):
    """posttrain computes other numbers for a base than transformers does."""


class Probe(NamedTuple):
    """Token ids: an unrelated row, and two rows of equal length whose first `shared` tokens are equal."""

    other: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]
    shared: int


def make_probe(encode: Callable[[str], Sequence[int]], vocabulary: int, settings: dict[str, Any]) -> Probe:
    """Encode English texts; if the tokenizer gives too few tokens, draw ids from the whole vocabulary instead."""
    window = settings.get("sliding_window") or 0
    length = min(ROW + (window if window <= WIDEST_WINDOW else 0), context_of(settings))
    other, first, second = (list(encode(text)) for text in (UNRELATED, BEGINNING + FIRST, BEGINNING + SECOND))
    shared = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), 0)
    length = min(length, len(first), len(second))
    if not 0 < shared < length - STEPS or max(*other, *first, *second) >= vocabulary:
        length = min(ROW, context_of(settings))
        drawn = torch.randint(vocabulary, (3, length), generator=torch.Generator().manual_seed(0)).tolist()
        shared = min(SHARED, length // 2)
        other, first, second = drawn[0], drawn[1], drawn[1][:shared] + drawn[2][shared:]
    return Probe(tuple(other[:OTHER]), tuple(first[:length]), tuple(second[:length]), min(shared, SHARED))


def refuse_layers(model: nn.Module, settings: dict[str, Any]) -> None:
    """Raises NotImplementedError for layers other than attention that mix tokens.

    The comparison detects most of them too, but in bfloat16 a short convolution could pass as a rounding difference.
    """
    others = {str(kind) for kind in settings.get("layer_types") or ()} - KNOWN_LAYERS
    if others:
        raise NotImplementedError(f"it has layers of type {', '.join(sorted(others))}")
    convolution = next((name for name, module in model.named_modules() if isinstance(module, nn.Conv1d)), None)
    if convolution is not None:
        raise NotImplementedError(f"it has a convolution ({convolution})")


@torch.no_grad()
def own_logprobs(model: Any, probe: Probe) -> list[Tensor]:
    """log p of each token after the first [T - 1] of each row of the probe, by the model's own forward."""
    logprobs = []
    for ids in (probe.other, probe.first, probe.second):
        ids_T = torch.tensor(ids, device=next(model.parameters()).device)
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
        logprobs.append(torch.log_softmax(logits_TV[:-1].float(), -1).gather(1, ids_T[1:, None])[:, 0])
    return logprobs


def _tensor(base: "BaseModel", numbers: list[Any]) -> Tensor:
    return torch.tensor(numbers, device=base.device)


def by_itself(inner: Any, chat: ChatFormat, device: torch.device) -> tuple[Probe, list[Tensor]]:
    """A probe and its log-probabilities by transformers alone: the model's own modules and eager attention."""
    settings, vocabulary = text_settings(inner.config), len(inner.get_output_embeddings().weight)
    refuse_layers(inner, settings)
    probe = make_probe(chat.encode_document, vocabulary, settings)
    inner.to(device)
    inner.set_attn_implementation("eager")
    logprobs = own_logprobs(inner, probe)
    inner.set_attn_implementation(ATTENTION_NAME)
    inner.to("cpu")  # its modules are replaced there
    return probe, logprobs


def compare(base: "BaseModel", probe: Probe, expected: Sequence[Tensor]) -> None:
    """Raises DifferentError if the log-probabilities differ from those by transformers (`expected`, one tensor a row)."""
    prompt = len(probe.first) - STEPS
    ways = {
        "in a packed batch": ([expected[0], expected[1], expected[2][probe.shared - 1 :]], packed(base, probe)),
        "while decoding": ([row[prompt - 1 :] for row in expected[1:]], decoded(base, probe, prompt)),
    }
    for way, (wanted, computed) in ways.items():
        distance = difference(torch.cat(wanted), computed)
        if not distance <= tolerance(base):  # written so that NaN fails too
            raise DifferentError(f"log-probabilities {way} differ from its own by {distance:.2g} of their spread")


def tolerance(base: "BaseModel") -> float:
    """The largest `difference` that is accepted."""
    routed = any("expert" in name and isinstance(value, int) and value > 1 for name, value in base.settings.items())
    return TOLERANCE[base.dtype] * (ROUTED[base.dtype] if routed else 1)


def difference(expected_N: Tensor, computed_N: Tensor) -> float:
    """The difference between log-probabilities as the module's docstring defines it."""
    distance_N = (expected_N - computed_N.to(expected_N.device)).abs().sort().values
    return float(distance_N[: math.ceil(COUNTED * len(distance_N))].mean() / expected_N.std())


@torch.no_grad()
def packed(base: "BaseModel", probe: Probe) -> Tensor:
    """log p of all targets [N], row after row, by one packed forward; targets in the shared prefix appear once."""
    other, shared, rest = len(probe.other), probe.shared, len(probe.first) - probe.shared
    ids = [*probe.other, *probe.first, *probe.second[shared:]]
    positions = [*range(other), *range(shared + rest), *range(shared, shared + rest)]
    above = ((other, shared),)
    spans = Span(0, other), Span(*above[0]), Span(other + shared, rest, above), Span(other + shared + rest, rest, above)
    hidden_TD = base.hidden(_tensor(base, ids), _tensor(base, positions), Segments(spans), "base")
    first, second = range(other, other + shared + rest), range(other + shared + rest, len(ids))
    source = [*range(other - 1), *first[:-1], other + shared - 1, *second[:-1]]
    target = [*range(1, other), *first[1:], *second]
    return base.logprobs(hidden_TD[source], _tensor(base, ids)[target], "base")


@torch.no_grad()
def decoded(base: "BaseModel", probe: Probe, prompt: int) -> Tensor:
    """log p of the tokens after the prompts [N], row after row, by decoding with the cache."""
    cache = _ProbeCache(base, probe)
    cache.begin()
    logits = [cache.prompts(prompt)]
    logits += [cache.step(position) for position in range(prompt, len(probe.first) - 1)]
    logits_2NV = torch.stack(logits, 1).float()
    target_2N = _tensor(base, [row[prompt:] for row in cache.rows])
    return torch.log_softmax(logits_2NV, -1).gather(2, target_2N[..., None]).flatten()


class _ProbeCache:
    """The two rows of a probe on one shelf."""

    def __init__(self, base: "BaseModel", probe: Probe) -> None:
        self.base, self.rows, self.shared = base, (probe.first, probe.second), probe.shared
        self.shelf = Shelf(2, -(-len(probe.first) // BLOCK) * BLOCK, base.device)
        # float32, because products in bfloat16 would keep a packed copy of every weight, which doubles the memory.
        self.slots = NarrowAdapters(torch.float32, base.device)

    def begin(self) -> None:
        """Compute the shared prefix and write it to both rows."""
        self._forward(
            self.rows[0][: self.shared], range(self.shared), (Span(0, self.shared),), self._filling(0, self.shared, 1)
        )

    def prompts(self, stop: int) -> Tensor:
        """Compute the rest of both prompts on top of the cached prefix; logits [2, V] of the token after them."""
        count = stop - self.shared
        ids = [i for row in self.rows for i in row[self.shared : stop]]
        spans = tuple(Span(r * count, count, ((2 * count + r * self.shared, self.shared),)) for r in range(2))
        pasts = tuple(Past(self.shelf, r, self.shared) for r in range(2))
        step = self._filling(self.shared, stop, 2)._replace(pasts=pasts)
        hidden_TD = self._forward(ids, [*range(self.shared, stop)] * 2, spans, step)
        return self._logits(hidden_TD[[count - 1, 2 * count - 1]])

    def step(self, position: int) -> Tensor:
        """Decode one token of each row; logits [2, V] of the next token."""
        place_N = _tensor(self.base, [0, 1])
        seen = -(-(position + 1) // BLOCK) * BLOCK
        length_N = _tensor(self.base, [position, position])
        reading = Reading(self.shelf, 0, 2, place_N, length_N, place_N, seen, (2,) * (seen // self.shelf.block or 1), {})
        ids = [row[position] for row in self.rows]
        return self._logits(self._forward(ids, [position] * 2, (), CacheStep(2, (reading,), ())))

    def _filling(self, start: int, stop: int, rows: int) -> CacheStep:
        """A step that writes the tokens of `rows` packed rows to both places; one row is written to both."""
        count = stop - start
        place_N = [r for r in range(2) for _ in range(count)]
        source_N = [r % rows * count + i for r in range(2) for i in range(count)]
        numbers = (_tensor(self.base, x) for x in (place_N, [*range(start, stop)] * 2, source_N))
        return CacheStep(0, (), (Filling(self.shelf, *numbers),))

    def _forward(self, ids: Sequence[int], positions: Sequence[int], spans: tuple[Span, ...], step: CacheStep) -> Tensor:
        tokens, segments = TokenAdapters([(len(ids), None)], self.slots, self.base.device), Segments(spans, step=step)
        with self.base.adapters.use_tokens(tokens):
            hidden_TD = self.base.forward(_tensor(self.base, list(ids)), _tensor(self.base, list(positions)), segments)
        if not segments.calls:
            raise NotImplementedError("its attention is not called through transformers' interface")
        if segments.calls != len(self.shelf.layers()):
            raise NotImplementedError("its layers call attention more than once per token")
        return hidden_TD

    def _logits(self, hidden_2D: Tensor) -> Tensor:
        return self.base.row_logits(hidden_2D, [None, None], self.slots.product).clone()


def proof_path(weights_hash: str, dtype: torch.dtype, device: torch.device, *, full: bool) -> Path:
    """The file that records that a base passed the comparison."""
    versions = [importlib.metadata.version(package) for package in ("transformers", "torch")]
    key = [VERIFICATION_VERSION, *versions, weights_hash, str(dtype), device.type, full]
    return cache_folder() / "verified" / hashlib.sha256(json.dumps(key).encode()).hexdigest()[:32]


def keep_proof(path: Path, architecture: str, dtype: torch.dtype) -> None:
    """Record that a base passed. If the cache folder is not writable, the next load compares again."""
    with contextlib.suppress(OSError, ArtifactError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"architecture": architecture, "dtype": str(dtype)})


def refusal(where: str, folder: Path, error: Exception) -> ModelError:
    """The error for an architecture that posttrain does not support."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = next(iter(config.get("architectures") or []), config.get("model_type", "this model"))
    reason = first_line(error)
    if not isinstance(error, DifferentError | NotImplementedError):
        reason = f"it raises {type(error).__name__}: {reason}"
    return ModelError(
        where, f"the architecture {name} is not supported: {reason}",
        allowed="the architectures that docs/models.md calls right", do="choose another base",
    )  # fmt: skip


def first_line(error: Exception) -> str:
    """The first line of an error's message."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
