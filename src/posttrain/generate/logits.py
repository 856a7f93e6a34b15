"""What a step reads of its hidden states: logits of the rows' next tokens, and log-probabilities of prompts' own tokens.

T: tokens of the forward, D: width, R: rows, N: tokens looked up, V: vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.generate.batch import Work, rounded
from posttrain.generate.requests import Row, TokenScore
from posttrain.generate.sampling import token_logprobs, top_tokens
from posttrain.kernels import EngineLinear
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter

# Tokens of a prompt whose own next tokens are looked up at once: their logits are there at once.
SCORED_TOKENS = 128


def next_logits(base: BaseModel, product: EngineLinear, hidden_TD: Tensor, work: Work) -> Tensor:
    """Logits [R, V] of the next token of each row that gets one."""
    # The head runs once for rows that begin alike.
    source = list(dict.fromkeys(work.source))
    adapter_of = dict(zip(work.source, (row.adapter for row in work.chosen), strict=True))
    spare = rounded(len(source)) - len(source)
    padded = source + source[:1] * spare
    logits_RV = _logits(base, product, hidden_TD, padded, [adapter_of[token] for token in padded])
    if len(source) < len(work.source):
        place = {token: place for place, token in enumerate(source)}
        logits_RV = logits_RV[torch.tensor([place[token] for token in work.source], device=logits_RV.device)]
    return logits_RV[: len(work.source)]


def prompt_scores(base: BaseModel, product: EngineLinear, hidden_TD: Tensor, work: Work) -> list[tuple[Row, TokenScore]]:
    """Log-probabilities of the prompts' own tokens, for rows that want them, in the order of each prompt."""
    found = []
    for start in range(0, len(work.scored), SCORED_TOKENS):
        part = work.scored[start : start + SCORED_TOKENS]
        adapters = [row.adapter for row, _, _ in part]
        logits_NV = _logits(base, product, hidden_TD, [token for _, token, _ in part], adapters)
        targets = [row.prompt[place + 1] for row, _, place in part]
        logprobs = token_logprobs(logits_NV, targets)
        tops = top_tokens(logits_NV, [row.settings.top_logprobs for row, _, _ in part])
        for (row, _, _), target, logprob, top in zip(part, targets, logprobs, tops, strict=True):
            found.append((row, TokenScore(target, logprob, top)))
    return found


def _logits(
    base: BaseModel, product: EngineLinear, hidden_TD: Tensor, tokens: list[int], adapters: Sequence[LoraAdapter | None]
) -> Tensor:
    return base.row_logits(hidden_TD[torch.tensor(tokens, device=hidden_TD.device)], list(adapters), product)
