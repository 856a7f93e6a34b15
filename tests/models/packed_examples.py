"""Packed batches and dense attention to compare with."""

import torch
from torch import Tensor

from posttrain.models.segments import Span

# name: spans of a packed batch. Three rows; a prompt with three answers, one of which branches again; one of length one.
PACKINGS = {
    "one row": (Span(0, 24),),
    "rows": (Span(0, 9), Span(9, 1), Span(10, 14)),
    "shared prompt": (Span(0, 10), Span(10, 7, ((0, 10),)), Span(17, 7, ((0, 10),))),
    "three levels": (
        Span(0, 6), Span(6, 5, ((0, 6),)), Span(11, 4, ((0, 6), (6, 5))), Span(15, 3, ((0, 6), (6, 5))),
        Span(18, 1, ((0, 6),)), Span(19, 5),
    ),
}  # fmt: skip


def random_heads(heads: int, kv_heads: int, tokens: int, width: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(heads * 100 + tokens)
    return [
        torch.randn(n, tokens, width, generator=generator, dtype=torch.float64).to(dtype) for n in (heads, kv_heads, kv_heads)
    ]


def dense(q: Tensor, k: Tensor, v: Tensor, scale: float, spans: tuple[Span, ...], window: int, softcap: float | None) -> Tensor:
    """One softmax over all tokens in float64, with the mask worked out token by token from the table of spans."""
    q, k, v = (x.double() for x in (q, k, v))
    heads, tokens, _ = q.shape
    seen = torch.zeros(tokens, tokens, dtype=torch.bool)
    for span in spans:
        before = [t for start, length in span.ancestors for t in range(start, start + length)]
        path = before + list(range(span.start, span.start + span.length))
        for place in range(len(before), len(path)):
            first = max(0, place - window + 1) if window else 0
            seen[path[place], path[first : place + 1]] = True
    k, v = (x.repeat_interleave(heads // x.shape[0], 0) for x in (k, v))
    scores = q @ k.transpose(1, 2) * scale
    if softcap:
        scores = torch.tanh(scores / softcap) * softcap
    return torch.softmax(scores.masked_fill(~seen, float("-inf")), -1).nan_to_num(0) @ v


# Spans of several blocks of queries, below an ancestor of several blocks; windows that end inside, at and before a block.
LONG = (Span(0, 300), Span(300, 270, ((0, 300),)), Span(570, 128), Span(698, 1, ((0, 300), (300, 270))))


def token_rows(count: int, *, low: int, high: int, seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(low, high, (count,), generator=generator).tolist()
    return [torch.randint(7, 263, (n,), generator=generator).tolist() for n in lengths]
