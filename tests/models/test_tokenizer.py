"""What a tokenizer keeps of the texts that it has seen, and one that has more ids than the embedding has rows."""

import ctypes
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import tokenizers
import transformers

from posttrain.cli import main
from posttrain.errors import ModelError
from posttrain.models.base_model import BaseModel, load_base, load_chat
from posttrain.models.source import locate_base
from posttrain.models.tokenizer import HuggingFaceTokenizer, byte_tokenizer
from posttrain.records import Message

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


@pytest.fixture
def extended(tiny: BaseModel, tmp_path: Path) -> Callable[..., Path]:
    """Makes a copy of the tiny base whose tokenizer has one more token, and whose embedding has not."""

    def make(token: str, *, special: bool) -> Path:
        folder = Path(shutil.copytree(tiny.source.folder, tmp_path / "model"))
        tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
        tokenizer.add_tokens([token], special_tokens=special)
        tokenizer.save_pretrained(folder)
        return folder

    return make


def test_an_id_without_a_row_in_the_embedding_is_refused_when_the_base_is_loaded(
    extended: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    folder = extended("<extra_word>", special=False)
    for load in (lambda: load_base(str(folder), template="gemma"), lambda: load_chat(locate_base(str(folder)), "gemma")):
        with pytest.raises(ModelError, match=r"has the id 263 \('<extra_word>'\), and its embedding 263 rows"):
            load()
    (tmp_path / "a.jsonl").write_text('{"prompt": "q <extra_word>", "completion": "r"}\n')
    assert main(["data", "check", str(tmp_path / "a.jsonl"), "--model", str(folder), "--template", "gemma"]) == 2
    assert "resize_token_embeddings" in capsys.readouterr().err


def test_a_special_token_without_a_row_is_letters_in_a_message(extended: Callable[..., Path]):
    """As gemma-3-1b has one, for images."""
    base = load_base(str(extended("<image_soft_token>", special=True)), template="gemma", device="cpu")
    assert max(base.chat.encode_prompt([Message("user", "an <image_soft_token> here")])) < base.vocabulary == 263


def test_a_special_token_without_a_row_is_refused_where_the_template_has_it(extended: Callable[..., Path]):
    with pytest.raises(ModelError, match=r"'<\|eot_id\|>'"):
        load_base(str(_with_llama3(extended("<|eot_id|>", special=True))), template="llama3")


def _with_llama3(folder: Path) -> Path:
    """The other tokens of the template take the places of tokens that it does not use."""
    path = folder / "tokenizer.json"
    text = path.read_text(encoding="utf-8")
    for old, new in (("<start_of_turn>", "<|start_header_id|>"), ("<end_of_turn>", "<|end_header_id|>")):
        text = text.replace(old, new)
    path.write_text(text, encoding="utf-8")
    return folder
