"""Keys and values of prompts that may come again: a system prompt, the conversation so far.

They are kept in blocks of 64 tokens. A block is named by the hash of its adapter's weights and of all tokens up to its end,

    name_0 = H(adapter),   name_{b+1} = H(name_b, tokens of block b)

so that what other weights computed is never found, whatever the weights are called, and after a change of weights nothing has
to be thrown away. The least recently used blocks leave when there is no more room. Prompts computed by weights without a known
hash, as in training, are not kept.
"""

import hashlib
from collections import OrderedDict, defaultdict
from collections.abc import Iterator, Sequence

from torch import Tensor

from posttrain.generate.requests import Row
from posttrain.models.cache import BLOCK, Kept, Shapes, Shelf, zeros

# Bytes that are taken at once, for as many blocks.
TAKEN = 4 * 2**20
# Bytes that a block takes beside its numbers: its name and objects.
BESIDE = 1024


class PrefixCache:
    """Blocks by name, of at most `budget` bytes; 0 keeps none."""

    def __init__(self, budget: int) -> None:
        self._budget, self._bytes = budget, 0
        self._blocks: OrderedDict[bytes, Kept] = OrderedDict()
        # Places of blocks that have left, by their numbers.
        self._free: defaultdict[int, list[Tensor]] = defaultdict(list)
        # The shapes of all blocks, which are mostly the same, once.
        self._shapes: dict[Shapes, Shapes] = {}
        self.hits, self.asked = 0, 0

    @property
    def bytes(self) -> int:
        """What is kept now."""
        return self._bytes

    def fill(self, row: Row, shelf: Shelf, place: int) -> int:
        """Copy the longest known beginning of a row's prompt to its place; returns its tokens, fewer than the prompt has."""
        if not self._budget or row.fingerprint is None or row.request.prompt_logprobs:
            return 0
        found = 0
        for name in _names(row.fingerprint, row.prompt[: len(row.prompt) - 1]):
            block = self._blocks.get(name)
            if block is None:
                break
            self._blocks.move_to_end(name)
            shelf.put(place, found, block)
            found += BLOCK
        self.asked += len(row.prompt)
        self.hits += found
        return found

    def keep(self, row: Row, shelf: Shelf, place: int) -> None:
        """Keep the full blocks of a row that leaves, prompt and answer."""
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
                gone = self._blocks.popitem(last=False)[1]
                self._free[len(gone.numbers_X)].append(gone.numbers_X)
                self._bytes -= _size(gone)
            if size > self._budget:
                return
            shapes = self._shapes.setdefault(block.layers, block.layers)
            self._blocks[name] = Kept(self._placed(block.numbers_X), shapes)
            self._bytes += size

    def _placed(self, numbers_X: Tensor) -> Tensor:
        """A copy where blocks alone lie: among other memory, what leaves and what comes would leave ever more gaps."""
        free = self._free[len(numbers_X)]
        if not free:
            free += zeros((-(-TAKEN // numbers_X.nbytes), len(numbers_X)), numbers_X)
        return free.pop().copy_(numbers_X)


def _size(block: Kept) -> int:
    return block.numbers_X.nbytes + BESIDE


def _names(fingerprint: str, tokens: Sequence[int]) -> Iterator[bytes]:
    """The names of the full blocks of these tokens."""
    name = hashlib.sha256(fingerprint.encode()).digest()
    for start in range(0, len(tokens) - BLOCK + 1, BLOCK):
        told = ",".join(map(str, tokens[start : start + BLOCK]))
        name = hashlib.sha256(name + told.encode()).digest()
        yield name
