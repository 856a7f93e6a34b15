"""Tokenizers for the data tests: the byte-level one of random:tiny, and one with merges and tokens for every template."""

import json
from collections.abc import Callable

import pytest
import tokenizers
import transformers

from posttrain.data.chat import ChatFormat
from posttrain.data.sources import STARTER
from posttrain.models.base_model import load_tokenizer
from posttrain.models.source import locate_base
from posttrain.models.tokenizer import HuggingFaceTokenizer

SPECIALS = (
    "<pad>", "<bos>", "<eos>", "<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>",
    "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
)  # fmt: skip


@pytest.fixture(scope="session")
def tiny_tokenizer(own_cache: None) -> HuggingFaceTokenizer:
    """One token a byte, no template of its own."""
    return load_tokenizer(locate_base("random:tiny").folder)


@pytest.fixture(scope="session")
def make_tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., HuggingFaceTokenizer]:
    """Makes a tokenizer with merges learned from the starter's prose and with the tokens of every built-in template."""
    texts = [json.loads(line)["text"] for line in (STARTER / "evaluation/prose.jsonl").read_text("utf-8").splitlines()]
    trained = tokenizers.Tokenizer(tokenizers.models.BPE())
    trained.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    trained.decoder = tokenizers.decoders.ByteLevel()
    trained.train_from_iterator(
        texts,
        tokenizers.trainers.BpeTrainer(
            vocab_size=700, special_tokens=list(SPECIALS), show_progress=False,
            initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        ),
    )  # fmt: skip

    def make(
        template: str | None = None, *, pad: str = "<pad>", eos: str = "<eos>", adds_bos: bool = False
    ) -> HuggingFaceTokenizer:
        inner = tokenizers.Tokenizer.from_str(trained.to_str())
        if adds_bos:
            inner.post_processor = tokenizers.processors.TemplateProcessing(
                "<bos> $A", None, [("<bos>", inner.token_to_id("<bos>"))]
            )
        made = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<bos>", eos_token=eos, pad_token=pad)
        made.chat_template = template
        folder = tmp_path_factory.mktemp("tokenizer")
        made.save_pretrained(folder)
        return load_tokenizer(folder)

    return make


@pytest.fixture(scope="session")
def tokenizer(make_tokenizer: Callable[..., HuggingFaceTokenizer]) -> HuggingFaceTokenizer:
    """The tokenizer with merges, without a template of its own."""
    return make_tokenizer()


@pytest.fixture(scope="session")
def gemma(tiny_tokenizer: HuggingFaceTokenizer) -> ChatFormat:
    """One token a byte under the gemma template: lengths can be counted by hand."""
    return ChatFormat(tiny_tokenizer, "gemma")
