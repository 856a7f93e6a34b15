"""Incremental tokenisation of a rendered text: the ids of earlier pieces never change.

A prompt must have the same ids with and without its answer, so a conversation is tokenised piece by piece. A piece gets the ids
that it has in the whole text, if the ids before it stay the same. If the tokenizer would merge characters across the border,
the piece is tokenised separately, as text within a text.

Text in a message that looks like a control token is replaced by a placeholder while the template runs, and tokenised as plain
text here.
"""

import itertools
import re
from collections.abc import Collection, Mapping, Sequence
from typing import Protocol

from posttrain.errors import DataError
from posttrain.records import Message

# Placeholders: a number between private-use characters stands for a control token in the text of a message.
_OPEN, _CLOSE = "\ue000", "\ue001"
_STAND_IN = re.compile(f"{_OPEN}([0-9]{{1,9}}){_CLOSE}")
_MARK = re.compile(_OPEN)
# Possible token names in the source of a template: <...>, and [...] in capitals.
_TOKEN_NAME = re.compile(r"<[^<>\s{}]{1,60}>|\[/?[A-Z_]+\]")
# Longer text before a piece is shortened before it is tokenised again with the piece.
_CONTEXT_CHARS = 64


class Tokenizer(Protocol):
    """The interface of a tokenizer."""

    def encode(self, text: str, *, plain: bool, middle: bool = False) -> list[int]:
        """Ids of a text without added tokens. `plain` treats control tokens as text; `middle` is for text within a text."""

    def decode(self, ids: Sequence[int], *, special: bool, middle: bool = False) -> str:
        """Text of ids. `special` keeps control tokens; `middle` is for text within a text."""

    def token_id(self, token: str) -> int | None:
        """The id of a token, or None if the vocabulary lacks it."""

    @property
    def bos(self) -> str | None:
        """Text of the token that begins a sequence."""

    @property
    def eos(self) -> str | None:
        """Text of the token that ends a sequence."""

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The texts of the special tokens, which are parsed everywhere."""

    @property
    def separators(self) -> Mapping[int, str]:
        """Tokens by id that split a text: the text before such a token does not affect the ids from it on."""

    @property
    def chat_template(self) -> str | None:
        """The model's own template."""

    @property
    def adds_bos(self) -> bool:
        """Whether the model expects a BOS at the start."""


class Guard:
    """Replaces control tokens in the text of messages by placeholders."""

    def __init__(self, tokenizer: Tokenizer, template: str) -> None:
        # The opening mark is replaced too, so that a message cannot forge a placeholder.
        self.texts = (_OPEN, *sorted(_control_texts(tokenizer, template)))
        self._index = {text: index for index, text in enumerate(self.texts)}
        self.pattern = re.compile(_any_of(self.texts))
        tags = _tags(self.texts) - {*tokenizer.control_tokens, tokenizer.bos, tokenizer.eos}
        self._in_answers = re.compile(_any_of([text for text in self.texts if text not in tags])) if tags else self.pattern

    def text(self, text: str, *, control: bool = False) -> str:
        """The text with placeholders. With `control`, control tokens are kept and only the marks are replaced."""
        return (_MARK if control else self.pattern).sub(self._stand_in, text)

    def messages(self, messages: Sequence[Message]) -> list[Message]:
        """Messages with placeholders. Answers keep tags (`<think>`), which the template may look for."""
        patterns = {"system": self.pattern, "user": self.pattern, "assistant": self._in_answers}
        return [Message(m.role, patterns[m.role].sub(self._stand_in, m.content)) for m in messages]

    def _stand_in(self, match: re.Match[str]) -> str:
        return f"{_OPEN}{self._index[match.group()]}{_CLOSE}"


class PieceEncoder:
    """Tokenises one text piece by piece."""

    def __init__(self, tokenizer: Tokenizer, guard: Guard, *, bos_id: int | None, adds_bos: bool) -> None:
        self._tokenizer, self._guard = tokenizer, guard
        self._bos_id, self._adds_bos = bos_id, adds_bos
        self._empty = True
        # The text that the next piece may merge with, its ids, and whether it is within a text.
        self._text, self._ids, self._middle = "", list[int](), False

    def add(self, piece: str) -> list[int]:
        """Ids of the next piece. Raises DataError if the template wrote an unknown placeholder."""
        ids: list[int] = []
        for position, part in enumerate(_STAND_IN.split(piece)):
            if position % 2:
                ids += self._spelled_token(int(part))
            elif part:
                ids += self._extend(part)
        if self._empty and self._bos_id is not None and (self._adds_bos or ids[:1] == [self._bos_id]):
            ids = [self._bos_id, *itertools.dropwhile(lambda index: index == self._bos_id, ids)]
        self._empty = self._empty and not ids
        return ids

    def fork(self) -> "PieceEncoder":
        """A copy of this encoder with the same state."""
        encoder = PieceEncoder(self._tokenizer, self._guard, bos_id=self._bos_id, adds_bos=self._adds_bos)
        encoder._empty, encoder._text, encoder._ids, encoder._middle = self._empty, self._text, self._ids, self._middle
        return encoder

    def _spelled_token(self, index: int) -> list[int]:
        if index >= len(self._guard.texts):
            raise DataError("chat template", "writes private-use characters", do="set [base] template")
        in_text = self._middle or bool(self._text)
        ids = self._tokenizer.encode(self._guard.texts[index], plain=True, middle=in_text)
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
        """Keep only the text from the last splitting token on, so that a long text is not tokenised again with every piece."""
        if len(self._text) <= _CONTEXT_CHARS:
            return
        separators = self._tokenizer.separators
        last = next((index for index in range(len(self._ids) - 1, 0, -1) if self._ids[index] in separators), 0)
        start = self._text.rfind(separators[self._ids[last]]) if last else 0
        if start > 0 and self._tokenizer.encode(self._text[start:], plain=False) == self._ids[last:]:
            self._text, self._ids, self._middle = self._text[start:], self._ids[last:], False


def _control_texts(tokenizer: Tokenizer, template: str) -> frozenset[str]:
    """Tokens that messages must not produce: the special ones, and tokens that the template uses."""
    named = [name for name in _TOKEN_NAME.findall(template) if tokenizer.token_id(name) is not None]
    ends = [token for token in (tokenizer.bos, tokenizer.eos) if token]
    return frozenset((*tokenizer.control_tokens, *named, *ends))


def _tags(texts: Collection[str]) -> set[str]:
    """Tags with an opening and a closing form. Such pairs do not mark turns."""
    closed = {text for text in texts if text[:2] == "</" and f"<{text[2:]}" in texts}
    return closed | {f"<{text[2:]}" for text in closed}


def _any_of(texts: Collection[str]) -> str:
    """A pattern for the longest match of many texts. Common prefixes are merged, so that matching is fast."""
    alternatives = [
        re.escape(letter) + _any_of([text[1:] for text in group])
        for letter, group in itertools.groupby(sorted(text for text in texts if text), key=lambda text: text[0])
    ]
    return f"(?:{'|'.join(alternatives)}){'?' if '' in texts else ''}" if alternatives else ""
