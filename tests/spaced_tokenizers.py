"""Tokenizers of SentencePiece's kind, as models ship them: a "▁" in front of a text, which decoding leaves out again."""

import functools
import json
from typing import Any

import tokenizers
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers

_TEXTS = (
    "The capital of Norway is Oslo and the sea is blue", "a question an answer another one", "[INST] hello [/INST] an answer",
    "12 345 is a number", "system user assistant",
)  # fmt: skip
_SPECIALS = ("<unk>", "<s>", "</s>", "<|user|>", "<|assistant|>", "<|end|>")
KINDS = ("llama 2", "always", "first", "unigram")


@functools.cache
def _learnt(kind: str) -> str:
    model = models.Unigram() if kind == "unigram" else models.BPE(unk_token="<unk>", byte_fallback=True)
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    alphabet = [*(chr(code) for code in range(33, 127)), "▁", "\n"]
    common: dict[str, Any] = {"vocab_size": 700, "initial_alphabet": alphabet, "show_progress": False}
    if kind == "unigram":
        trainer = trainers.UnigramTrainer(special_tokens=list(_SPECIALS), unk_token="<unk>", **common)
    else:
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        trainer = trainers.BpeTrainer(special_tokens=[*_SPECIALS, *bytes_], **common)
    tokenizer.train_from_iterator(_TEXTS * 20, trainer)
    state = json.loads(tokenizer.to_str())
    return json.dumps(state | {"added_tokens": [], "pre_tokenizer": None})


def spaced_tokenizer(kind: str, template: str | None = None) -> Any:
    """transformers' tokenizer of a kind: `llama 2` puts "▁" in front of every piece between control tokens ("legacy"),
    `always` and `unigram` as well by other means, `first` in front of a text alone."""
    import transformers

    inner = tokenizers.Tokenizer.from_str(_learnt("unigram" if kind == "unigram" else "bpe"))
    if kind == "llama 2":
        inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        scheme = "first" if kind == "first" else "always"
        inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme, split=kind == "unigram")
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Metaspace() if kind == "unigram" else decoders.Sequence(steps)
    # As in Phi-3, white space behind the end of a turn belongs to its token.
    inner.add_special_tokens([AddedToken(t, special=True, normalized=False, rstrip=t == "<|end|>") for t in _SPECIALS])
    inner.post_processor = processors.TemplateProcessing("<s> $A", None, [("<s>", 1)])
    made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
    made.chat_template = template
    return made
