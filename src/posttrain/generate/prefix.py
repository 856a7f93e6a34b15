"""The prefix cache: keys and values of earlier prompts and answers, for prompts that start with the same tokens.

It stores blocks of 64 tokens. The name of a block is the hash of its adapter's weights and of all tokens up to its end,

    name_0 = H(adapter),   name_{b+1} = H(name_b, tokens of block b)

so blocks of other weights never match, and a change of weights needs no invalidation. The least recently used blocks are
evicted when the cache is full. Prompts of weights without a hash, as in training, are not cached.
"""

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor

from posttrain.generate.requests import Row
from posttrain.models.cache import BLOCK, CachedTokens, Shapes, Shelf, zeros

# Bytes allocated at once for blocks.
ALLOCATION_BYTES = 4 * 2**20
# Bytes of a block besides its numbers: name and objects.
BLOCK_OVERHEAD_BYTES = 1024


class PrefixCache:
    """Blocks by name, at most `budget` bytes; 0 disables the cache."""

    def __init__(self, budget: int) -> None:
        self._budget, self._bytes = budget, 0
        self._blocks: OrderedDict[bytes, CachedTokens] = OrderedDict()
        # Memory of evicted blocks, by size.
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        # The shapes of blocks, stored once because most are equal.
        self._shapes: dict[Shapes, Shapes] = {}
        self.hits, self.asked = 0, 0

    @property
    def bytes(self) -> int:
        """The current size."""
        return self._bytes

    def fill(self, row: Row, shelf: Shelf, place: int) -> int:
        """Copy the longest cached prefix of a row's prompt to its place. Returns its tokens, fewer than the prompt has."""
        if not self._budget or row.fingerprint is None or row.request.prompt_logprobs:
            return 0
        tokens = 0
        for name in _names(row.fingerprint, row.prompt[: len(row.prompt) - 1]):
            block = self._blocks.get(name)
            if block is None:
                break
            self._blocks.move_to_end(name)
            shelf.put(place, tokens, block)
            tokens += BLOCK
        self.asked += len(row.prompt)
        self.hits += tokens
        return tokens

    def keep(self, row: Row, shelf: Shelf, place: int) -> None:
        """Store the full blocks of a finished row, prompt and answer."""
        if not self._budget or row.fingerprint is None:
            return
        tokens = (*row.prompt, *row.ids)[: row.cached]
        for index, name in enumerate(_names(row.fingerprint, tokens)):
            if name in self._blocks:
                self._blocks.move_to_end(name)
                continue
            block = shelf.take(place, index * BLOCK, BLOCK)
            size = _size(block)
            while self._blocks and self._bytes + size > self._budget:
                evicted = self._blocks.popitem(last=False)[1]
                self._free[len(evicted.numbers_X)].append(evicted.numbers_X)
                self._bytes -= _size(evicted)
            if size > self._budget:
                return
            shapes = self._shapes.setdefault(block.layers, block.layers)
            self._blocks[name] = CachedTokens(self._placed(block.numbers_X), shapes)
            self._bytes += size

    def _placed(self, numbers_X: Tensor) -> Tensor:
        """A copy in memory that is used for blocks only, which avoids fragmentation."""
        free = self._free[len(numbers_X)]
        if not free:
            free += zeros((-(-ALLOCATION_BYTES // numbers_X.nbytes), len(numbers_X)), numbers_X)
        return free.pop().copy_(numbers_X)


def _size(block: CachedTokens) -> int:
    return block.numbers_X.nbytes + BLOCK_OVERHEAD_BYTES


def _names(fingerprint: str, tokens: Sequence[int]) -> Iterator[bytes]:
    """The names of the full blocks of these tokens."""
    name = hashlib.sha256(fingerprint.encode()).digest()
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        text = ",".join(map(str, tokens[start : start + BLOCK]))
        name = hashlib.sha256(name + text.encode()).digest()
        yield name
