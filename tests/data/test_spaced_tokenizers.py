"""Tokenizers that put a space in front of a text: a conversation has the ids of its whole text, and loses no space."""
# ruff: noqa: E501 - a template stays as it is

import random

import pytest

from posttrain.data.chat import TEMPLATES, ChatFormat
from posttrain.generate.text import TextStream
from posttrain.models.tokenizer import HuggingFaceTokenizer
from posttrain.records import Message
from spaced_tokenizers import KINDS, spaced_tokenizer

LLAMA2 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% elif m.role == 'system' %}<<SYS>> {{ m.content }} <</SYS>>{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
PHI3 = (
    "{{ bos_token }}{% for m in messages %}<|{{ 'assistant' if m.role == 'assistant' else 'user' }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
# The border between a prompt and its answer falls into a word ("▁an" for " " and "an").
SPLIT = (
    "{% for m in messages %}{{ m.role }}: {{ m.content }}{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}assistant: {% endif %}"
)
ASK, SAY = Message("user", "a question"), Message("assistant", "an answer")
TALK = [Message("system", "the sea"), ASK, SAY, Message("user", "The capital of Norway is"), Message("assistant", "Oslo and")]


def chat_of(kind: str, template: str) -> tuple[ChatFormat, HuggingFaceTokenizer]:
    tokenizer = HuggingFaceTokenizer(spaced_tokenizer(kind, template))
    return ChatFormat(tokenizer), tokenizer


@pytest.mark.parametrize("template", [LLAMA2, PHI3], ids=["Llama 2", "Phi 3"])
@pytest.mark.parametrize("kind", KINDS)
def test_ids_are_those_of_the_whole_text(kind: str, template: str):
    chat, tokenizer = chat_of(kind, template)
    for messages in (TALK, TALK[1:3], TALK[1:], [Message("user", "  é\n漢 "), SAY, ASK, Message("assistant", " two  spaces")]):
        plain = [{"role": m.role, "content": m.content} for m in messages]
        theirs = tokenizer.inner.apply_chat_template(plain, return_dict=False)
        ours = chat.encode(messages)
        assert theirs[: len(ours.ids)] == ours.ids
        assert chat.decode(theirs[len(ours.ids) :]).strip() == ""
        assert chat.trained_turns(ours) == sum(m.role == "assistant" for m in messages)
        asked = tokenizer.inner.apply_chat_template(plain[:-1], add_generation_prompt=True, return_dict=False)
        assert asked == chat.encode_prompt(messages[:-1])


def words(rng: random.Random) -> str:
    bits = ("an", " answer", "  ", "Oslo", "\n", "é", "漢", "</s>", "<|end|>", "12", "3 ", "<s>", "[/INST]", "▁", "a", "\ue000")
    return "".join(rng.choices(bits, k=rng.randint(1, 6)))


@pytest.mark.parametrize("template", [LLAMA2, PHI3, SPLIT, TEMPLATES["plain"]], ids=["Llama 2", "Phi 3", "split", "plain"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_prompt_is_the_beginning_of_its_conversation_and_control_tokens_are_letters(kind: str, template: str):
    chat, tokenizer = chat_of(kind, template)
    control = {tokenizer.token_id(token) for token in tokenizer.control_tokens} - {0}
    rng, differ, spelled = random.Random(kind), 0, 0
    for _ in range(60):
        talk = [Message("user" if i % 2 == 0 else "assistant", words(rng)) for i in range(rng.choice((2, 4, 6)))]
        ids, (answer,) = chat.encode_completions(talk[:-1], talk[-1:])
        differ += [*ids, *answer] != chat.encode(talk).ids or ids != chat.encode_prompt(talk[:-1])
        calm = [Message(m.role, "a") for m in talk]
        spelled += [i for i in chat.encode(talk).ids if i in control] != [i for i in chat.encode(calm).ids if i in control]
    assert (differ, spelled) == (0, 0)


def test_where_a_word_crosses_the_border_the_answer_begins_inside_of_a_text():
    chat, tokenizer = chat_of("llama 2", SPLIT)
    _, answer = chat.encode_completions([ASK], [SAY])
    tokens = tokenizer.inner.convert_ids_to_tokens(answer[0])
    assert "".join(tokens) == "an▁answer</s>"


@pytest.mark.parametrize("kind", KINDS)
def test_a_completion_keeps_the_space_in_front_of_it(kind: str):
    chat, tokenizer = chat_of(kind, LLAMA2)
    whole, prompt = "The capital of Norway is Oslo and", "The capital of Norway is"
    ids = chat.encode_text(whole)[len(chat.encode_text(prompt)) :]
    for middle, text in ((True, " Oslo and"), (False, "Oslo and")):
        assert chat.decode(ids, middle=middle) == text
        stream = TextStream(lambda some, middle=middle: chat.decode(some, middle=middle))
        assert "".join(map(stream.add, ids)) + stream.end() == text
        stream = TextStream(lambda some, middle=middle: chat.decode(some, middle=middle), [" Oslo"])
        assert ("".join(map(stream.add, ids)), stream.stopped) == (("", True) if middle else (text, False))
    assert chat.decode(tokenizer.encode("é", plain=True, middle=True)[:1], middle=True) in ("\ufffd", "é", "")


def test_a_token_reads_the_same_anywhere_in_a_byte_level_vocabulary(tiny_tokenizer: HuggingFaceTokenizer):
    ids = tiny_tokenizer.encode(" é", plain=True)
    for some in (ids, ids[1:], ids[:2], []):
        assert tiny_tokenizer.decode(some, special=True, middle=True) == tiny_tokenizer.decode(some, special=True)
