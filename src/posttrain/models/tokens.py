"""Tokens that the base never trained: found before hours are spent, and named so that their rows can be trained.

A token that pretraining never saw keeps the direction that all unused tokens share: its embedding row lies along their
mean (in gemma-3-270m's base `<start_of_turn>` has cosine 0.99 with it, `<eos>` -0.3). A template built on such tokens can
be learned all the same, so this is a warning and no refusal. How much probability leaks into unused tokens when answers
are sampled is measured by `unused_probability`.

V: vocabulary, D: width, U: unused tokens, N: positions.
"""

import re
from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.errors import RecipeError
from posttrain.models.attention import Segments, Span
from posttrain.models.load import BaseModel

# Names that vocabularies give to places nobody uses: <unused12>, [unused3], <|reserved_special_token_7|>, <extra_id_1>.
_UNUSED_NAME = re.compile(r"^[<\[]\|?_*(?:unused|reserved|extra_id|dummy)[a-z_]*_?\d+\|?[>\]]$")
# A direction needs so many rows before its mean says anything.
_FEWEST_UNUSED = 8
# Trained tokens lie below 0.5 of it, untrained ones above 0.9.
_SIMILAR = 0.9


def token_ids(base: BaseModel, tokens: Sequence[str]) -> tuple[int, ...]:
    """Ids of the tokens named in the recipe. Raises RecipeError for one that the vocabulary lacks."""
    found = {token: base.tokenizer.token_id(token) for token in tokens}
    missing = [token for token, index in found.items() if index is None]
    if missing:
        raise RecipeError(
            "recipe · [adapter] train_tokens",
            f"the vocabulary has no token {', '.join(map(repr, missing))}",
            do="name whole tokens, such as <end_of_turn>",
        )
    return tuple(index for index in found.values() if index is not None)


def unused_ids(base: BaseModel) -> list[int]:
    """Ids of the tokens whose name says that nothing uses them, without those the template uses."""
    taken = {*base.chat.template_ids, *base.chat.end_ids}
    vocabulary: dict[str, int] = base.tokenizer.inner.get_vocab()
    return sorted(index for token, index in vocabulary.items() if index not in taken and _UNUSED_NAME.match(token))


@torch.no_grad()
def untrained_similarity(base: BaseModel) -> dict[str, float]:
    """Cosine of each template token's embedding row with the mean of the unused rows; empty where none is unused."""
    unused = unused_ids(base)
    ids = sorted({*base.chat.template_ids, base.chat.end_id})
    if len(unused) < _FEWEST_UNUSED:
        return {}
    rows_VD: Tensor = base.model.get_input_embeddings().weight
    mean_D = rows_VD[unused].float().mean(0)
    cosines = torch.cosine_similarity(rows_VD[ids].float(), mean_D[None], dim=1)
    return {base.tokenizer.decode([i], special=True): float(c) for i, c in zip(ids, cosines, strict=True)}


def untrained_tokens(base: BaseModel, train_tokens: Sequence[str] = ()) -> list[str]:
    """Warnings about template tokens that look untrained, but for those whose rows are trained anyway."""
    suspects = {t: c for t, c in untrained_similarity(base).items() if c > _SIMILAR and t not in train_tokens}
    if not suspects:
        return []
    shown = ", ".join(f"{token} ({cosine:.2f})" for token, cosine in suspects.items())
    names = ", ".join(f'"{token}"' for token in suspects)
    return [
        f"the template's tokens {shown} look untrained in this base: their embeddings lie among the unused tokens (cosine "
        f"with their mean). Turns are learned all the same; to train these rows too: [adapter] train_tokens = [{names}]"
    ]


@torch.no_grad()
def unused_probability(base: BaseModel, prompts: Sequence[Sequence[int]], policy: str) -> float:
    """Mean probability, at temperature 1 over the positions of the prompts, that the next token is an unused one."""
    unused = torch.tensor(unused_ids(base), dtype=torch.long, device=base.device)
    spans = []
    start = 0
    for prompt in prompts:
        spans.append(Span(start, len(prompt)))
        start += len(prompt)
    ids_T = torch.tensor([token for prompt in prompts for token in prompt])
    positions_T = torch.tensor([place for prompt in prompts for place in range(len(prompt))])
    hidden_TD = base.hidden(ids_T, positions_T, Segments(tuple(spans)), policy)
    # Only where an answer would begin: elsewhere the prompt, not the policy, decides.
    last_N = [span.start + span.length - 1 for span in spans]
    logits_NV = (hidden_TD[last_N] @ base.head(policy).T).float()
    if base.softcap is not None:
        logits_NV = torch.tanh(logits_NV / base.softcap) * base.softcap
    return float(torch.softmax(logits_NV, -1)[:, unused].sum(1).mean())
