"""The tokenizer behind `data/chat.py`'s protocol; the only file that imports tokenizers."""

import json
import os
from collections.abc import Sequence
from typing import Any

import tokenizers

# Texts are tokenised one by one; threads would find nothing to do, and would warn where a process is forked.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


class HuggingFaceTokenizer:
    """The tokenizer behind `data/chat.py`'s protocol."""

    def __init__(self, inner: Any) -> None:
        """`inner` is transformers' object."""
        self.inner = inner
        self._ids = {token.content: index for index, token in self.inner.added_tokens_decoder.items()}
        self._plain = self._without_control_tokens()
        # For byte-pair encodings transformers does nothing beside the tokenizer's own function, and takes longer.
        self._byte_pairs = type(self.inner.backend_tokenizer.model).__name__ == "BPE"
        if self._byte_pairs and len(_words(self._plain, "one two three")) == 1:
            for tokenizer in (self.inner.backend_tokenizer, self._plain):
                _keep_no_words(tokenizer)

    def _without_control_tokens(self) -> Any:
        """A tokenizer that takes '<eos>' as letters: the same vocabulary with its added tokens not parsed."""
        state = json.loads(self.inner.backend_tokenizer.to_str())
        state["added_tokens"] = []
        return tokenizers.Tokenizer.from_str(json.dumps(state))

    def encode(self, text: str, *, plain: bool) -> list[int]:
        """Ids of a text without added tokens."""
        backend = self._plain if plain else self.inner.backend_tokenizer
        # As a batch of one, other threads go on meanwhile: `encode` by itself holds them up.
        return list(backend.encode_batch_fast([text], add_special_tokens=False)[0].ids)

    def decode(self, ids: Sequence[int], *, special: bool) -> str:
        """Text of ids."""
        decode = self.inner.backend_tokenizer.decode if self._byte_pairs else self.inner.decode
        return str(decode(list(ids), skip_special_tokens=not special))

    def token_id(self, token: str) -> int | None:
        """Id of a whole token."""
        found: int | None = self._ids.get(token)
        if found is None:
            found = self.inner.get_vocab().get(token)
        return found

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
    def chat_template(self) -> str | None:
        """The model's own template."""
        template = self.inner.chat_template
        return template if isinstance(template, str) else None

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


def _words(tokenizer: tokenizers.Tokenizer, text: str) -> list[str]:
    """What the encoding treats one by one, and remembers."""
    if tokenizer.normalizer is not None:
        text = tokenizer.normalizer.normalize_str(text)
    return [text] if tokenizer.pre_tokenizer is None else [w for w, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text)]


def _keep_no_words(tokenizer: tokenizers.Tokenizer) -> None:
    """The library remembers 10,000 words. Where a word is a whole text, as for Gemma, none comes again, and they take 70 MB."""
    resize = getattr(tokenizer.model, "_resize_cache", None)
    if resize is not None:
        resize(0)
