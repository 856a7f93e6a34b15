"""Answers of a model whose tokenizer puts a space in front of a text: a completion keeps it, whole and streamed."""

import json
from collections.abc import Iterator

import httpx
import pytest
import transformers
from listening import Listening, listening

from posttrain.models.base_model import BaseModel, load_base
from spaced_tokenizers import spaced_tokenizer

TEMPLATE = "{{ bos_token }}{% for m in messages %}[INST] {{ m.content }} [/INST]{% endfor %}"
PROMPT = "The capital of Norway is"


@pytest.fixture(scope="module")
def base(own_cache: None, tmp_path_factory: pytest.TempPathFactory) -> BaseModel:
    folder = tmp_path_factory.mktemp("spaced")
    tokenizer = spaced_tokenizer("llama 2", TEMPLATE)
    tokenizer.save_pretrained(folder)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return load_base(str(folder), dtype="float32", device="cpu")


@pytest.fixture(scope="module")
def server(base: BaseModel) -> Iterator[Listening]:
    with listening(base) as running:
        yield running


def ask(server: Listening, path: str, **more: object) -> httpx.Response:
    """Two times the token of " Oslo": a bias makes it sure."""
    tokenizer = server.service.base.tokenizer
    word = tokenizer.token_id("▁Oslo")
    model = httpx.get(f"{server.url}/v1/models").json()["data"][0]["id"]
    body = {"model": model, "temperature": 0, "max_tokens": 2, "logit_bias": {str(word): 100}} | more
    return httpx.post(f"{server.url}/v1/{path}", json=body, timeout=60)


def streamed(server: Listening, **more: object) -> str:
    lines = ask(server, "completions", stream=True, **more).text.splitlines()
    events = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    return "".join(choice["text"] for event in events for choice in event["choices"])


def test_a_completion_goes_on_with_its_space(server: Listening, base: BaseModel):
    ids = base.chat.encode_text(PROMPT)
    for prompt in (PROMPT, ids):
        assert ask(server, "completions", prompt=prompt).json()["choices"][0]["text"] == " Oslo Oslo"
        assert streamed(server, prompt=prompt) == " Oslo Oslo"
        echoed = ask(server, "completions", prompt=prompt, echo=True, logprobs=1).json()["choices"][0]
        assert echoed["text"] == f"{PROMPT} Oslo Oslo" == streamed(server, prompt=prompt, echo=True)
        told = echoed["logprobs"]
        assert told["tokens"][-2:] == [" Oslo", " Oslo"]
        places = list(zip(told["tokens"], told["text_offset"], strict=True))
        assert all(echoed["text"].startswith(token, place) for token, place in places[2:])
        assert told["text_offset"][-2:] == [len(PROMPT), len(PROMPT) + 5]


def test_a_stop_string_may_begin_with_the_space(server: Listening):
    choice = ask(server, "completions", prompt=PROMPT, stop=" Oslo").json()["choices"][0]
    assert (choice["text"], choice["finish_reason"]) == ("", "stop")
    assert streamed(server, prompt=PROMPT, stop="o O") == " Osl"


def test_an_answer_is_a_text_by_itself(server: Listening, base: BaseModel):
    answer = ask(server, "chat/completions", messages=[{"role": "user", "content": "hello"}]).json()
    assert answer["choices"][0]["message"]["content"] == "Oslo Oslo"
    assert ask(server, "completions", prompt=[base.chat.bos_id]).json()["choices"][0]["text"] == "Oslo Oslo"
