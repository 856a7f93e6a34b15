"""The tokenizer behind `data/chat.py`'s protocol; the only file that imports tokenizers.

Tokenizers of SentencePiece's kind write "▁" in front of a text and leave the space out again when they decode. That is
right at the beginning of a text and wrong inside of one: `middle` says that other text stands before.
"""

import json
import os
from collections.abc import Collection, Sequence
from typing import Any

import tokenizers

from posttrain.errors import ModelError

# Texts are tokenised one by one, so threads would be idle, and they print a warning when a process is forked.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class HuggingFaceTokenizer:
    """The tokenizer behind `data/chat.py`'s protocol."""

    def __init__(self, inner: Any) -> None:
        """`inner` is transformers' object."""
        self.inner = inner
        backend = self.inner.backend_tokenizer
        added = self.inner.added_tokens_decoder
        self._ids = {token.content: index for index, token in added.items()}
        self._control_ids = frozenset(index for index, token in added.items() if token.special)
        self._added_ids = frozenset(added)
        # Tokenizers that take '<eos>' as letters: the same vocabulary without its added tokens, at the beginning of a
        # text and inside of one.
        self._plain = _same_model(backend, backend)
        unprefixed = _without_prefix(backend)
        self._middle = self._plain if unprefixed is None else _same_model(backend, unprefixed)
        # For byte-pair encodings transformers does nothing beside the tokenizer's own function, and takes longer.
        self._byte_pairs = type(backend.model).__name__ == "BPE"
        if self._byte_pairs and len(_words(self._plain, "one two three")) == 1:
            _disable_word_cache(backend)
        self._anchor = self._find_anchor()

    def encode(self, text: str, *, plain: bool, middle: bool = False) -> list[int]:
        """Ids of a text without added tokens. With `middle` the text continues another one, and gets no leading space."""
        if plain:
            return self._letters(text, middle)
        backend = self.inner.backend_tokenizer
        if not middle or self._middle is self._plain:
            return _ids(backend, text)
        encoding = backend.encode_batch([text], add_special_tokens=False)[0]
        first = next((place for place, index in enumerate(encoding.ids) if index in self._added_ids), None)
        if first is None:
            return _ids(self._middle, text)
        return [*_ids(self._middle, text[: encoding.offsets[first][0]]), *encoding.ids[first:]]

    def _letters(self, text: str, middle: bool) -> list[int]:
        """Ids of a text without control tokens. A vocabulary may contain their names as words; these are cut in two."""
        ids = _ids(self._middle if middle else self._plain, text)
        if len(text) < 2 or self._control_ids.isdisjoint(ids):
            return ids
        half = len(text) // 2
        return self._letters(text[:half], middle) + self._letters(text[half:], True)

    def decode(self, ids: Sequence[int], *, special: bool, middle: bool = False) -> str:
        """Text of ids. With `middle` the ids continue another text, and a leading space is kept."""
        if not middle or self._anchor is None or not ids:
            return self._decode(ids, special)
        before = self._decode([self._anchor], special)
        return self._decode([self._anchor, *ids], special)[len(before) :]

    def _decode(self, ids: Sequence[int], special: bool) -> str:
        decode = self.inner.backend_tokenizer.decode if self._byte_pairs else self.inner.decode
        return str(decode(list(ids), skip_special_tokens=not special))

    def _find_anchor(self) -> int | None:
        """A token to put before others when decoding; None if the text of a token does not depend on its position."""
        ids = self._letters("a a", False)
        anchor, word = self._letters("a", True)[-1:], ids[-1:]
        alone = self._decode(word, False)
        after = self._decode([*anchor, *word], False).removeprefix(self._decode(anchor, False))
        return anchor[0] if anchor and after != alone else None

    def token_id(self, token: str) -> int | None:
        """Id of a whole token."""
        index: int | None = self._ids.get(token)
        if index is None:
            index = self.inner.get_vocab().get(token)
        return index

    @property
    def bos(self) -> str | None:
        """Text of BOS."""
        token: str | None = self.inner.bos_token
        return token

    @property
    def eos(self) -> str | None:
        """Text of EOS."""
        token: str | None = self.inner.eos_token
        return token

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """Texts of the special tokens; of the other added ones ("<h1>", tabs) text is made as in pretraining."""
        return tuple(token.content for token in self.inner.added_tokens_decoder.values() if token.special)

    @property
    def separators(self) -> dict[int, str]:
        """Added tokens by id that split a text: what stands before one has no part in the ids from there on."""
        added = self.inner.added_tokens_decoder
        return {i: t.content for i, t in added.items() if not (t.lstrip or t.single_word or t.normalized)}

    @property
    def chat_template(self) -> str | None:
        """The model's own template; of several the one named "default". Raises ModelError where none of them is."""
        template = self.inner.chat_template
        if not isinstance(template, dict):
            return template if isinstance(template, str) else None
        if "default" not in template:
            raise ModelError(
                "chat template", f"the model has the templates {', '.join(sorted(template))}",
                allowed='one named "default", or one in chat_template.jinja', do="copy one there, or set [base] template",
            )  # fmt: skip
        return str(template["default"])

    @property
    def adds_bos(self) -> bool:
        """Whether the tokenizer itself puts a BOS in front."""
        ids = self.inner("a").input_ids
        return self.inner.bos_token_id is not None and ids[:1] == [self.inner.bos_token_id]


def byte_tokenizer(specials: Sequence[str]) -> tokenizers.Tokenizer:
    """Every byte is a token, behind these special ones."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    inner = tokenizers.Tokenizer(tokenizers.models.BPE({t: i for i, t in enumerate([*specials, *alphabet])}, []))
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = tokenizers.decoders.ByteLevel()
    inner.add_special_tokens(list(specials))
    return inner


def _ids(tokenizer: tokenizers.Tokenizer, text: str) -> list[int]:
    # As a batch of one, other threads go on meanwhile: `encode` by itself holds them up.
    return list(tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids)


def _same_model(of: tokenizers.Tokenizer, steps: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    """A tokenizer without added tokens that shares the vocabulary of one and the steps before it of another."""
    made = tokenizers.Tokenizer(of.model)
    if steps.normalizer is not None:
        made.normalizer = steps.normalizer
    if steps.pre_tokenizer is not None:
        made.pre_tokenizer = steps.pre_tokenizer
    return made


def _without_prefix(tokenizer: tokenizers.Tokenizer) -> tokenizers.Tokenizer | None:
    """The steps before the vocabulary without what puts a space in front of a text; None where nothing does."""
    empty = tokenizers.Tokenizer(tokenizers.models.BPE())
    if tokenizer.normalizer is not None:
        empty.normalizer = tokenizer.normalizer
    if tokenizer.pre_tokenizer is not None:
        empty.pre_tokenizer = tokenizer.pre_tokenizer
    state = json.loads(empty.to_str())
    changed = {name: _unprefixed(state[name]) for name in ("normalizer", "pre_tokenizer")}
    if all(state[name] == step for name, step in changed.items()):
        return None
    return tokenizers.Tokenizer.from_str(json.dumps(state | changed))


def _unprefixed(step: dict[str, Any] | None) -> dict[str, Any] | None:
    if step is None or step["type"] == "Prepend":
        return None
    if step["type"] == "Metaspace":
        return step | {"prepend_scheme": "never"}
    if step["type"] == "ByteLevel" and "add_prefix_space" in step:
        return step | {"add_prefix_space": False}
    if step["type"] == "Sequence":
        inside = "normalizers" if "normalizers" in step else "pretokenizers"
        return step | {inside: [part for inner in step[inside] if (part := _unprefixed(inner)) is not None]}
    return step


def refuse_beyond(tokenizer: HuggingFaceTokenizer, used: Collection[int], rows: int, where: str) -> None:
    """Raises ModelError if text, or a token of the template (`used`), can get an id for which the embedding has no row.

    Special tokens beyond the rows that no template uses, such as gemma-3-1b's image tokens, never result from text.
    """
    special = {index for index, token in tokenizer.inner.added_tokens_decoder.items() if token.special}
    vocabulary: dict[str, int] = tokenizer.inner.get_vocab()
    beyond = {index: token for token, index in vocabulary.items() if index >= rows and (index in used or index not in special)}
    if beyond:
        first = min(beyond)
        more = f" and {len(beyond) - 1} more" if len(beyond) > 1 else ""
        raise ModelError(
            where, f"its tokenizer has the id {first} ({beyond[first]!r}{more}), and its embedding {rows} rows",
            allowed=f"ids below {rows}", do="use the model's own tokenizer, or enlarge the embedding (resize_token_embeddings)",
        )  # fmt: skip


def _words(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    """The words that the tokenizer encodes separately and caches."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    return [text] if tokenizer.pre_tokenizer is None else [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _disable_word_cache(tokenizer: tokenizers.Tokenizer) -> None:
    """The library caches 10,000 words. If a word is a whole text, as for Gemma, none repeats, and the cache takes 70 MB."""
    resize = getattr(tokenizer.model, "_resize_cache", None)
    if resize is not None:
        resize(0)
