"""Text that streams: whole characters only, and stop strings wherever tokens are cut."""

from itertools import combinations

import pytest

from posttrain.generate.text import TextStream
from posttrain.models.base_model import BaseModel


def decode(ids: list[int]) -> str:
    """A token is a byte."""
    return bytes(ids).decode("utf-8", errors="replace")


def pieces(text: str, *stop: str, after: int = 0) -> tuple[list[str], bool]:
    """What comes token by token until a stop string is met, and whether one was."""
    stream = TextStream(decode, stop, after=after)
    found = []
    for byte in text.encode():
        found.append(stream.add(byte))
        if stream.stopped:
            return found, True
    return [*found, stream.end()], False


def test_a_character_comes_when_it_is_whole():
    assert pieces("aé漢b") == (["a", "", "é", "", "", "漢", "b", ""], False)


def test_what_may_become_a_stop_string_is_held_back():
    assert pieces("a###", "##") == (["a", "", ""], True)
    assert pieces("a#b#", "##") == (["a", "", "#b", "", "#"], False)
    assert pieces("ab\n\nUser", "\n\nUser:", "zz") == (["a", "b", *[""] * 6, "\n\nUser"], False)


def test_the_first_of_several_stop_strings_counts():
    assert pieces("one two three", "three", "two") == (["o", "n", "e", " ", "", "", ""], True)


def test_a_stop_string_before_the_least_length_is_text():
    found, stopped = pieces("xx-xx-", "xx", after=4)
    assert ("".join(found), stopped) == ("xx-", True)


def test_a_stop_string_is_found_however_the_tokens_are_cut():
    text, stop = "ab STOP c", "STOP"
    for cuts in combinations(range(1, len(text)), 3):
        parts = [text[a:b] for a, b in zip((0, *cuts), (*cuts, len(text)), strict=True)]
        stream = TextStream(lambda ids, parts=parts: "".join(parts[i] for i in ids), (stop,))
        written = ""
        for index in range(4):
            written += stream.add(index)
            if stream.stopped:
                break
        assert (written, stream.stopped) == ("ab ", True)


@pytest.mark.parametrize("text", ["Hello, wörld 漢字 🙂!", "  two  spaces\n\nand lines", ""])
def test_the_pieces_of_a_real_tokenizer_are_its_text(tiny: BaseModel, text: str):
    ids = tiny.chat.encode_text(text)
    stream = TextStream(tiny.chat.decode)
    assert "".join([stream.add(i) for i in ids]) + stream.end() == tiny.chat.decode(ids)
