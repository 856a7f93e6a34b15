"""Whether a base computes here what it computes by itself: asked at load, before anything is trained or written.

An architecture may do what this program does not know of: scale its logits, mix tokens outside of attention, call attention
twice. None of this need raise, and all of it gives other numbers. So a base is compared with itself on a probe: its own
forward, with transformers' plain attention and its own modules, against

    packed      an unrelated segment, a shared beginning, and two segments below it, in one packed batch
    decoded     the same two rows through the cache: the prompts in two pieces, then one token of each a step

    difference = mean |log p - log p'| / std(log p)     over the targets, without the tenth that differ most

In units of their own spread, log-probabilities say the same of models whose logits are scaled. A tie in the routing of experts
may move single tokens far, so the largest differences do not count. Right models of docs/models.md differ by at most 0.00001 in
float32, and in bfloat16 by 0.025, or 0.09 where tokens are routed to experts; wrong dense ones in bfloat16 by 0.06 and more
in one of the two ways. What was right is remembered in the cache folder.

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

# Raise when the comparison changes, or how this program computes a base.
VERIFICATION_VERSION = 1
# Tokens of a row, of the unrelated one, of the shared beginning at most, and those fed one by one.
ROW, OTHER, SHARED, STEPS = 40, 9, 15, 6
# Windows up to this are passed by the probe.
WIDEST_WINDOW = 64
BEGINNING = "The old bridge over the river"
FIRST = " was closed last winter, and the people of the village now walk for an hour to reach the market on the other side."
SECOND = " will be mended in May: the town has found the money at last, and two engineers have drawn plans for a wider one."
UNRELATED = "She counted the coins twice."
# Of all differences, the part that counts; and what the mean of these may be, in units of the spread of the log-probabilities.
KEPT = 0.9
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 0.05}
# Where tokens are routed to experts, ties that bfloat16 breaks another way move many tokens a little.
ROUTED = {torch.float32: 1, torch.bfloat16: 3}


KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


class DifferentError(Exception):
    """A base computes other numbers here than by itself."""


class Probe(NamedTuple):
    """Token ids: a row by itself, and two rows of one length that begin alike with their first `shared` tokens."""

    other: tuple[int, ...]
    first: tuple[int, ...]
    second: tuple[int, ...]
    shared: int


def make_probe(encode: Callable[[str], Sequence[int]], vocabulary: int, settings: dict[str, Any]) -> Probe:
    """English texts; where a tokenizer makes too little of them, ids drawn from the whole vocabulary."""
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
    """Raises NotImplementedError for layers that carry more from token to token than attention does.

    The comparison finds most of them too, but in bfloat16 a short convolution could look like rounding.
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
    found = []
    for ids in (probe.other, probe.first, probe.second):
        ids_T = torch.tensor(ids, device=next(model.parameters()).device)
        logits_TV = model(input_ids=ids_T[None], use_cache=False).logits[0]
        found.append(torch.log_softmax(logits_TV[:-1].float(), -1).gather(1, ids_T[1:, None])[:, 0])
    return found


def _tensor(base: "BaseModel", numbers: list[Any]) -> Tensor:
    return torch.tensor(numbers, device=base.device)


def by_itself(inner: Any, chat: ChatFormat, device: torch.device) -> tuple[Probe, list[Tensor]]:
    """A probe and its log-probabilities by transformers alone: the model's own modules and plain attention."""
    settings, vocabulary = text_settings(inner.config), len(inner.get_output_embeddings().weight)
    refuse_layers(inner, settings)
    probe = make_probe(chat.encode_document, vocabulary, settings)
    inner.to(device)
    inner.set_attn_implementation("eager")
    found = own_logprobs(inner, probe)
    inner.set_attn_implementation(ATTENTION_NAME)
    inner.to("cpu")  # where its parts are replaced
    return probe, found


def compare(base: "BaseModel", probe: Probe, own: Sequence[Tensor]) -> None:
    """Raises DifferentError where the base computes other numbers here than by itself (`own`)."""
    prompt = len(probe.first) - STEPS
    ways = {
        "in a packed batch": ([own[0], own[1], own[2][probe.shared - 1 :]], packed(base, probe)),
        "while decoding": ([row[prompt - 1 :] for row in own[1:]], decoded(base, probe, prompt)),
    }
    for way, (wanted, found) in ways.items():
        apart = difference(torch.cat(wanted), found)
        if not apart <= tolerance(base):  # not a number is none either
            raise DifferentError(f"log-probabilities {way} differ from its own by {apart:.2g} of their spread")


def tolerance(base: "BaseModel") -> float:
    """What `difference` of a right base may be."""
    routed = any("expert" in name and isinstance(value, int) and value > 1 for name, value in base.settings.items())
    return TOLERANCE[base.dtype] * (ROUTED[base.dtype] if routed else 1)


def difference(own_N: Tensor, found_N: Tensor) -> float:
    """How far log-probabilities are from a model's own; see the module's docstring."""
    apart_N = (own_N - found_N.to(own_N.device)).abs().sort().values
    return float(apart_N[: math.ceil(KEPT * len(apart_N))].mean() / own_N.std())


@torch.no_grad()
def packed(base: "BaseModel", probe: Probe) -> Tensor:
    """log p of all targets [N], row after row, by one packed forward; those of the shared beginning once."""
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
    """log p of the tokens behind the prompts [N], row after row, by the cache."""
    cache = _Cache(base, probe)
    cache.begin()
    logits = [cache.prompts(prompt)]
    logits += [cache.step(position) for position in range(prompt, len(probe.first) - 1)]
    logits_2NV = torch.stack(logits, 1).float()
    target_2N = _tensor(base, [row[prompt:] for row in cache.rows])
    return torch.log_softmax(logits_2NV, -1).gather(2, target_2N[..., None]).flatten()


class _Cache:
    """The two rows of a probe, side by side on a shelf."""

    def __init__(self, base: "BaseModel", probe: Probe) -> None:
        self.base, self.rows, self.shared = base, (probe.first, probe.second), probe.shared
        self.shelf = Shelf(2, -(-len(probe.first) // BLOCK) * BLOCK, base.device)
        # No product in float32 is packed: what an engine keeps as long as it lives would double the memory here.
        self.narrow = NarrowAdapters(torch.float32, base.device)

    def begin(self) -> None:
        """What both rows begin with, for both."""
        self._forward(
            self.rows[0][: self.shared], range(self.shared), (Span(0, self.shared),), self._filling(0, self.shared, 1)
        )

    def prompts(self, stop: int) -> Tensor:
        """The rest of both prompts, which see what is cached; logits [2, V] of the token after them."""
        count = stop - self.shared
        ids = [i for row in self.rows for i in row[self.shared : stop]]
        spans = tuple(Span(r * count, count, ((2 * count + r * self.shared, self.shared),)) for r in range(2))
        pasts = tuple(Past(self.shelf, r, self.shared) for r in range(2))
        step = self._filling(self.shared, stop, 2)._replace(pasts=pasts)
        hidden_TD = self._forward(ids, [*range(self.shared, stop)] * 2, spans, step)
        return self._logits(hidden_TD[[count - 1, 2 * count - 1]])

    def step(self, position: int) -> Tensor:
        """A token of each row; logits [2, V] of the next one."""
        place_N = _tensor(self.base, [0, 1])
        seen = -(-(position + 1) // BLOCK) * BLOCK
        length_N = _tensor(self.base, [position, position])
        reading = Reading(self.shelf, 0, 2, place_N, length_N, place_N, seen, (2,) * (seen // self.shelf.block or 1), {})
        ids = [row[position] for row in self.rows]
        return self._logits(self._forward(ids, [position] * 2, (), CacheStep(2, (reading,), ())))

    def _filling(self, start: int, stop: int, rows: int) -> CacheStep:
        """Tokens of `rows` packed rows, of one for both, go to the places of both."""
        count = stop - start
        place_N = [r for r in range(2) for _ in range(count)]
        source_N = [r % rows * count + i for r in range(2) for i in range(count)]
        numbers = (_tensor(self.base, x) for x in (place_N, [*range(start, stop)] * 2, source_N))
        return CacheStep(0, (), (Filling(self.shelf, *numbers),))

    def _forward(self, ids: Sequence[int], positions: Sequence[int], spans: tuple[Span, ...], step: CacheStep) -> Tensor:
        tokens, segments = TokenAdapters([(len(ids), None)], self.narrow, self.base.device), Segments(spans, step=step)
        with self.base.adapters.use_tokens(tokens):
            hidden_TD = self.base.forward(_tensor(self.base, list(ids)), _tensor(self.base, list(positions)), segments)
        if not segments.calls:
            raise NotImplementedError("its attention is not called through transformers' interface")
        if segments.calls != len(self.shelf.layers()):
            raise NotImplementedError("its layers ask attention for tokens more than once")
        return hidden_TD

    def _logits(self, hidden_2D: Tensor) -> Tensor:
        return self.base.row_logits(hidden_2D, [None, None], self.narrow.product).clone()


def proof_path(weights_hash: str, dtype: torch.dtype, device: torch.device, *, full: bool) -> Path:
    """The file that says that a base was compared before and was right."""
    versions = [importlib.metadata.version(package) for package in ("transformers", "torch")]
    said = [VERIFICATION_VERSION, *versions, weights_hash, str(dtype), device.type, full]
    return cache_folder() / "verified" / hashlib.sha256(json.dumps(said).encode()).hexdigest()[:32]


def keep_proof(path: Path, architecture: str, dtype: torch.dtype) -> None:
    """Remember that a base was right. Where the cache cannot be written, it is compared again next time."""
    with contextlib.suppress(OSError, ArtifactError):
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, {"architecture": architecture, "dtype": str(dtype)})


def refusal(where: str, folder: Path, error: Exception) -> ModelError:
    """An architecture that this program does not compute as it computes itself."""
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
    """What an error says, in one line."""
    text = str(error).strip()
    return text.splitlines()[0][:300] if text else type(error).__name__
