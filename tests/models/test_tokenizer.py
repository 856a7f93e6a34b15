"""What a tokenizer keeps of the texts that it has seen."""

import ctypes

import pytest
import tokenizers
import transformers

from posttrain.models.tokenizer import HuggingFaceTokenizer, byte_tokenizer

LIBRARY = ctypes.CDLL(None)


def allocated() -> int:
    """Bytes that the process has from malloc."""
    fields = ["arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"]
    info = type("Info", (ctypes.Structure,), {"_fields_": [(name, ctypes.c_size_t) for name in fields]})
    LIBRARY.mallinfo2.restype = info
    return int(LIBRARY.mallinfo2().uordblks)


@pytest.mark.skipif(not hasattr(LIBRARY, "mallinfo2"), reason="needs glibc's count of memory")
@pytest.mark.parametrize("splits", [True, False])
def test_texts_that_are_one_word_each_are_not_remembered(splits: bool):
    """The library keeps 10,000 words of any length, and where it splits no text a word is a text that never comes again."""
    inner = byte_tokenizer(["<eos>"])
    inner.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=splits)
    tokenizer = HuggingFaceTokenizer(transformers.PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>"))
    before = allocated()
    for number in range(3000):
        assert len(tokenizer.encode(f"{number:04} the sea " * 10, plain=True)) == 13 * 10
    grown = (allocated() - before) / 3000
    assert grown < 1000, "bytes a text"
