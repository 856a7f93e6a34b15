"""Detects template tokens that the base never trained, before a run starts, so that their rows can be trained.

A token that pretraining never saw keeps the direction that all unused tokens share: its embedding row lies along their
mean. In gemma-3-270m's base `<end_of_turn>` has cosine 0.99 with it and `<start_of_turn>` 0.95; `<eos>` has -0.30, and of
a thousand ordinary tokens none has more than 0.61. Turns built on such tokens are learned, but one answer in eight goes on with
a neighbour of the end token instead of ending (docs/experiments.md), so this is a warning that names `train_tokens`, and no
refusal;
`unused_probability` measures how much probability leaks into unused tokens while an answer is sampled at temperature 1.

V: vocabulary, D: width, U: unused tokens, N: positions.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.data.packing import pack, row_segments
from posttrain.errors import RecipeError
from posttrain.models.base_model import BaseModel
from posttrain.models.segments import Segments, Span
from posttrain.records import Message

# Names of unused entries of vocabularies: <unused12>, [unused3], <|reserved_special_token_7|>, <extra_id_1>.
_UNUSED_NAME = re.compile(r"^[<\[]\|?_*(?:unused|reserved|extra_id|dummy)[a-z_]*_?\d+\|?[>\]]$")
# Fewer unused rows give no reliable mean direction.
_FEWEST_UNUSED = 8
_SIMILAR = 0.9

# Enough positions for a figure, few enough to cost a fraction of a second.
CONVERSATIONS = tuple(
    (Message("user", question), Message("assistant", answer))
    for question, answer in (
        ("What is the capital of Italy?", "Rome."),
        ("Name two colours.", "Green and yellow."),
        ("Is ice warmer than steam?", "No, steam is far warmer than ice."),
    )
)


def token_ids(base: BaseModel, tokens: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens named in the recipe. Raises RecipeError for a token that the vocabulary lacks."""
    id_of = {token: base.tokenizer.token_id(token) for token in tokens}
    missing = [token for token, index in id_of.items() if index is None]
    if missing:
        raise RecipeError(
            "recipe · [adapter] train_tokens",
            f"the vocabulary has no token {', '.join(map(repr, missing))}",
            do="name whole tokens, such as <end_of_turn>",
        )
    return tuple(index for index in id_of.values() if index is not None)


def unused_ids(base: BaseModel) -> list[int]:
    """Ids whose names mark them as unused, and rows beyond the vocabulary, without ids that the template uses."""
    taken = {*base.chat.template_ids, *base.chat.end_ids}
    vocabulary: dict[str, int] = base.tokenizer.inner.get_vocab()
    named = {index for token, index in vocabulary.items() if token[:1] in "<[" and _UNUSED_NAME.match(token)}
    beyond = set(range(max(vocabulary.values()) + 1, base.head_VD.shape[0]))
    return sorted((named | beyond) - taken)


@torch.no_grad()
def untrained_similarity(base: BaseModel, unused: Sequence[int]) -> dict[str, float]:
    """Cosine of each template token's embedding row with the mean of the unused rows; empty where too few are unused."""
    ids = sorted({*base.chat.template_ids, base.chat.end_id})
    if len(unused) < _FEWEST_UNUSED:
        return {}
    rows_VD: Tensor = base.model.get_input_embeddings().weight
    mean_D = rows_VD[list(unused)].float().mean(0)
    cosines = torch.cosine_similarity(rows_VD[ids].float(), mean_D[None], dim=1)
    return {base.tokenizer.decode([i], special=True): float(c) for i, c in zip(ids, cosines, strict=True)}


@torch.no_grad()
def unused_probability(
    base: BaseModel, unused: Sequence[int], policy: str = "base", conversations: Sequence[Sequence[Message]] = CONVERSATIONS
) -> float:
    """Mean probability of an unused token, at temperature 1, over the positions where an assistant speaks or ends a turn."""
    encoded = [base.chat.encode(messages) for messages in conversations]
    batch = pack([s for i, row in enumerate(encoded) for s in row_segments(row.ids, row.trained, i)], len(encoded))
    segments = Segments(tuple(Span(*span) for span in batch.spans))
    hidden_TD = base.hidden(torch.tensor(batch.ids), torch.tensor(batch.positions), segments, policy)
    logits_NV = base.logits(hidden_TD[batch.source_N], policy).float()
    return float(torch.softmax(logits_NV, -1)[:, list(unused)].sum(1).mean())


def untrained_tokens(base: BaseModel, train_tokens: Sequence[str] = ()) -> list[str]:
    """Warnings about template tokens that look untrained, except those in `train_tokens`."""
    unused = unused_ids(base)
    suspects = {t: c for t, c in untrained_similarity(base, unused).items() if c > _SIMILAR and t not in train_tokens}
    if not suspects:
        return []
    shown = ", ".join(f"{token} (cosine {cosine:.2f})" for token, cosine in suspects.items())
    names = ", ".join(f'"{token}"' for token in suspects)
    return [
        f"the template's tokens {shown} look untrained in this base: their embeddings lie among its {len(unused)} unused "
        f"tokens, which take {unused_probability(base, unused):.1g} of the probability of an answer's tokens. Turns are "
        f"learned, but one of those others may end up in an answer; [adapter] train_tokens = [{names}] trains these rows too"
    ]
