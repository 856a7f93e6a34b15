"""From pieces of a rendered text to token ids, where the ids of what came first never change.

A conversation is one text, but a prompt must have the same ids with and without its answer. So a text is given piece by
piece. A piece gets the ids that the whole text has, wherever the ids of what stands before stay as they are; where the
tokenizer would merge letters across the border, the piece is tokenised by itself, as the inside of a text.

Text of a message that spells a control token is replaced by a stand-in while a template handles it, and tokenised as
plain text here.
"""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from posttrain.errors import DataError
from posttrain.records import Message

# Private-use characters around a number stand for a control token that a message spells, while a template handles it.
_OPEN, _CLOSE = "\ue000", "\ue001"
_STAND_IN = re.compile(f"{_OPEN}([0-9]{{1,9}}){_CLOSE}")
_MARK = re.compile(_OPEN)
# What in a template's source may be the name of a token: <...>, and [...] in capitals.
_TOKEN_NAME = re.compile(r"<[^<>\s{}]{1,60}>|\[/?[A-Z_]+\]")
# Characters before a piece that are tokenised again with it, before a shorter beginning is looked for.
_LONG = 64


class Tokenizer(Protocol):
    """What the renderer needs of a tokenizer."""

    def encode(self, text: str, *, plain: bool, middle: bool = False) -> list[int]:
        """Ids of a text without added tokens; `plain` takes control-token text literally, `middle` is inside of a text."""

    def decode(self, ids: Sequence[int], *, special: bool, middle: bool = False) -> str:
        """Text of ids; `special` keeps control tokens, `middle` is inside of a text."""

    def token_id(self, token: str) -> int | None:
        """Id of a whole token, or None where the vocabulary does not have it."""

    @property
    def bos(self) -> str | None:
        """Text of the token that begins a sequence."""

    @property
    def eos(self) -> str | None:
        """Text of the token that ends a sequence."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts of the special tokens, which are parsed wherever they stand."""

    @property
    def separators(self) -> Mapping[int, str]:
        """Tokens by id that split a text: what stands before one has no part in the ids from there on."""

    @property
    def chat_template(self) -> str | None:
        """The model's own template."""

    @property
    def adds_bos(self) -> bool:
        """Whether the model expects a BOS in front of everything."""


class Guard:
    """Control tokens that a message spells, and the stand-ins for them."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        # The opening mark itself comes first: a message that holds it must not forge a stand-in.
        self.texts = (_OPEN, *sorted(_control_texts(tokenizer, template)))
        self._index = {text: index for index, text in enumerate(self.texts)}
        self.pattern = re.compile(_any_of(self.texts))
        tags = _tags(self.texts) - {*tokenizer.control_tokens, tokenizer.bos, tokenizer.eos}
        self._in_answers = re.compile(_any_of([text for text in self.texts if text not in tags])) if tags else self.pattern

    def text(self, text: str, *, control: bool = False) -> str:
        """The text with stand-ins; with `control` it may spell control tokens, and only marks of stand-ins are replaced."""
        return (_MARK if control else self.pattern).sub(self._stand_in, text)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with stand-ins. An answer may hold tags of its own (`<think>`), which the template looks for."""
        patterns = {"system": self.pattern, "user": self.pattern, "assistant": self._in_answers}
        return [Message(m.role, patterns[m.role].sub(self._stand_in, m.content)) for m in messages]

    def _stand_in(self, match: re.Match[str]) -> str:
        return f"{_OPEN}{self._index[match.group()]}{_CLOSE}"


class PieceEncoder:
    """Ids of one text, given piece by piece."""

    def __init__(self, tokenizer: Tokenizer, guard: Guard, *, bos_id: int | None, adds_bos: bool) -> None:
        self._tokenizer, self._guard = tokenizer, guard
        self._bos_id, self._adds_bos = bos_id, adds_bos
        self._empty = True
        # The text that a further piece may be merged with, its ids, and whether it stands inside of a text.
        self._text, self._ids, self._middle = "", list[int](), False

    def add(self, piece: str) -> list[int]:
        """Ids of the next piece. Raises DataError where a template wrote a stand-in that no message has."""
        found: list[int] = []
        for position, part in enumerate(_STAND_IN.split(piece)):
            if position % 2:
                found += self._spelled(int(part))
            elif part:
                found += self._extend(part)
        if self._empty and self._bos_id is not None and (self._adds_bos or found[:1] == [self._bos_id]):
            found = [self._bos_id, *itertools.dropwhile(lambda index: index == self._bos_id, found)]
        self._empty = self._empty and not found
        return found

    def fork(self) -> "PieceEncoder":
        """Another encoder that goes on from here."""
        made = PieceEncoder(self._tokenizer, self._guard, bos_id=self._bos_id, adds_bos=self._adds_bos)
        made._empty, made._text, made._ids, made._middle = self._empty, self._text, self._ids, self._middle
        return made

    def _spelled(self, index: int) -> list[int]:
        if index >= len(self._guard.texts):
            raise DataError("chat template", "writes private-use characters of its own", do="set [base] template")
        inside = self._middle or bool(self._text)
        ids = self._tokenizer.encode(self._guard.texts[index], plain=True, middle=inside)
        self._text, self._ids, self._middle = "", [], True
        return ids

    def _extend(self, part: str) -> list[int]:
        self._shorten()
        text, before = self._text + part, len(self._ids)
        ids = self._tokenizer.encode(text, plain=False, middle=self._middle)
        if ids[:before] == self._ids:
            self._text, self._ids = text, ids
            return ids[before:]
        self._text, self._middle = part, True
        self._ids = self._tokenizer.encode(part, plain=False, middle=True)
        return self._ids

    def _shorten(self) -> None:
        """Keep what follows the last token that splits a text, or a long text would be tokenised with every piece."""
        if len(self._text) <= _LONG:
            return
        separators = self._tokenizer.separators
        last = next((place for place in range(len(self._ids) - 1, 0, -1) if self._ids[place] in separators), 0)
        start = self._text.rfind(separators[self._ids[last]]) if last else 0
        if start > 0 and self._tokenizer.encode(self._text[start:], plain=False) == self._ids[last:]:
            self._text, self._ids, self._middle = self._text[start:], self._ids[last:], False


def _control_texts(tokenizer: Tokenizer, template: str) -> frozenset[str]:
    """Tokens that no message may speak: the special ones, and whatever the template itself marks turns with."""
    named = [name for name in _TOKEN_NAME.findall(template) if tokenizer.token_id(name) is not None]
    ends = [token for token in (tokenizer.bos, tokenizer.eos) if token]
    return frozenset((*tokenizer.control_tokens, *named, *ends))


def _tags(texts: Collection[str]) -> set[str]:
    """Names of tags that open and close: no such pair marks turns."""
    closed = {text for text in texts if text[:2] == "</" and f"<{text[2:]}" in texts}
    return closed | {f"<{text[2:]}" for text in closed}


def _any_of(texts: Collection[str]) -> str:
    """A pattern for the longest of many texts; shared beginnings stand once, or thousands would be tried one by one."""
    ways = [
        re.escape(letter) + _any_of([text[1:] for text in group])
        for letter, group in itertools.groupby(sorted(text for text in texts if text), key=lambda text: text[0])
    ]
    return f"(?:{'|'.join(ways)}){'?' if '' in texts else ''}" if ways else ""
