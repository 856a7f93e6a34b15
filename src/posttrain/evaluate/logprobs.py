"""Log-probabilities of given texts: the choices of questions, and plain prose. Nothing is generated.

Texts follow the model's BOS without a chat template. The base was pretrained on such text, so it has no disadvantage, and a
policy that has forgotten it scores lower. The common prefix of a question's choices is computed once. Sums over it cancel in
every comparison and are omitted.

    choice_c = sum_t log p(t | question, choice_c before t)
    prose    = -1/N sum_t log p(t | text before t)             [nats a token]

B: rows (choices or texts), N: targets. There is no normalisation by length, so a choice that is a prefix of another is
favoured.
"""

from collections.abc import Iterator, Sequence
from typing import NamedTuple

import torch

from posttrain.data.packing import Segment, pack, row_segments, split_by_tokens, tree_segments
from posttrain.errors import ModelError
from posttrain.models.base_model import BaseModel
from posttrain.models.batches import batch_logprobs, sum_by_row, to_device

# Tokens computed at once.
TEXT_MICRO_TOKENS = {"cpu": 1024, "cuda": 16384}


class TextLogprob(NamedTuple):
    """The sum of the log-probabilities of a text's tokens in nats, and the number of predicted tokens."""

    logprob: float
    tokens: int


class _Tree(NamedTuple):
    """The token ids that several continuations share, and the continuations."""

    shared: list[int]
    branches: list[list[int]]

    @property
    def tokens(self) -> int:
        return len(self.shared) + sum(map(len, self.branches))


def choice_logprobs(
    base: BaseModel, adapter: str, questions: Sequence[tuple[str, Sequence[str]]]
) -> Iterator[list[TextLogprob]]:
    """For each (question, choices): one sum per choice, over the tokens after the common prefix. Lazy, in order."""
    trees = [_choice_tree(base, question, choices) for question, choices in questions]
    yield from _tree_logprobs(base, adapter, trees)


def text_logprobs(base: BaseModel, adapter: str, texts: Sequence[str]) -> Iterator[TextLogprob]:
    """For each text: the sum over all tokens after the first (BOS, if the model has one). Lazy."""
    trees = [_Tree([], [_ids(base, text)]) for text in texts]
    for (logprob,) in _tree_logprobs(base, adapter, trees):
        yield logprob


def _choice_tree(base: BaseModel, question: str, choices: Sequence[str]) -> _Tree:
    """Tokenise whole texts and find their common prefix, so spaces between question and choice need no rule."""
    texts = [_ids(base, question + choice) for choice in choices]
    shared = 0
    # Each choice keeps at least one token, and so does the common prefix.
    limit = min(map(len, texts)) - 1
    while shared < limit and len({ids[shared] for ids in texts}) == 1:
        shared += 1
    return _Tree(texts[0][:shared], [ids[shared:] for ids in texts])


def _ids(base: BaseModel, text: str) -> list[int]:
    """Token ids of a whole text. Raises ModelError if it exceeds the context."""
    ids = base.chat.encode_document(text)
    if len(ids) > base.context:
        raise ModelError("evaluation", f"a text of {len(ids)} tokens", allowed=f"at most {base.context}", do="shorten the item")
    return ids


@torch.no_grad()
def _tree_logprobs(base: BaseModel, adapter: str, trees: Sequence[_Tree]) -> Iterator[list[TextLogprob]]:
    for group in split_by_tokens([tree.tokens for tree in trees], TEXT_MICRO_TOKENS[base.device.type]):
        group_trees = [trees[index] for index in group]
        segments: list[Segment] = []
        rows = 0
        for tree in group_trees:
            if tree.shared:
                segments += tree_segments(tree.shared, tree.branches, first_row=rows, index=len(segments))
            else:
                segments += row_segments(tree.branches[0], [False] + [True] * (len(tree.branches[0]) - 1), rows)
            rows += len(tree.branches)
        sums = _row_sums(base, adapter, segments, rows)
        for tree in group_trees:
            yield [sums.pop(0) for _ in tree.branches]


def _row_sums(base: BaseModel, adapter: str, segments: Sequence[Segment], rows: int) -> list[TextLogprob]:
    """The summed log-probability of each row's targets, from one packed forward pass."""
    batch = to_device(pack(segments, rows), base.device)
    sum_B = sum_by_row(batch_logprobs(base, batch, adapter).double(), batch)
    count_B = torch.bincount(batch.row_N, minlength=rows)
    return [TextLogprob(logprob, count) for logprob, count in zip(sum_B.tolist(), count_B.tolist(), strict=True)]
