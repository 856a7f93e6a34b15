"""The outputs of a step: logits of the next tokens, and log-probabilities of prompt tokens.

T: tokens of the forward, D: width, R: rows, N: scored tokens, V: vocabulary.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from posttrain.generate.batch import StepBatch, rounded
from posttrain.generate.requests import Row, TokenScore
from posttrain.generate.sampling import token_logprobs, top_tokens
from posttrain.kernels import EngineLinear
from posttrain.models.base_model import BaseModel
from posttrain.models.lora import LoraAdapter

# Prompt tokens scored at once; their logits are all in memory.
SCORED_TOKENS = 128


def next_logits(base: BaseModel, product: EngineLinear, hidden_TD: Tensor, batch: StepBatch) -> Tensor:
    """Logits [R, V] of the next token of each chosen row."""
    # Rows with the same source token share one run of the head.
    source = list(dict.fromkeys(batch.source))
    adapter_of = dict(zip(batch.source, (row.adapter for row in batch.chosen), strict=True))
    spare = rounded(len(source)) - len(source)
    padded = source + source[:1] * spare
    logits_RV = _logits(base, product, hidden_TD, padded, [adapter_of[token] for token in padded])
    if len(source) < len(batch.source):
        index_of = {token: index_of for index_of, token in enumerate(source)}
        logits_RV = logits_RV[torch.tensor([index_of[token] for token in batch.source], device=logits_RV.device)]
    return logits_RV[: len(batch.source)]


def prompt_scores(base: BaseModel, product: EngineLinear, hidden_TD: Tensor, batch: StepBatch) -> list[tuple[Row, TokenScore]]:
    """Log-probabilities of prompt tokens, for rows that request them, in the order of each prompt."""
    scores = []
    for start in range(0, len(batch.scored), SCORED_TOKENS):
        part = batch.scored[start : start + SCORED_TOKENS]
        adapters = [row.adapter for row, _, _ in part]
        logits_NV = _logits(base, product, hidden_TD, [token for _, token, _ in part], adapters)
        targets = [row.prompt[place + 1] for row, _, place in part]
        logprobs = token_logprobs(logits_NV, targets)
        tops = top_tokens(logits_NV, [row.settings.top_logprobs for row, _, _ in part])
        for (row, _, _), target, logprob, top in zip(part, targets, logprobs, tops, strict=True):
            scores.append((row, TokenScore(target, logprob, top)))
    return scores


def _logits(
    base: BaseModel, product: EngineLinear, hidden_TD: Tensor, tokens: list[int], adapters: Sequence[LoraAdapter | None]
) -> Tensor:
    return base.row_logits(hidden_TD[torch.tensor(tokens, device=hidden_TD.device)], list(adapters), product)
