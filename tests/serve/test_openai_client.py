"""The openai package against a real server: answers, streams, usage, log-probabilities, and its classes of errors."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from listening import BASE, Listening, alone, listening

from posttrain.generate.engine import generate
from posttrain.generate.requests import Event, TokenScore
from posttrain.generate.sampling import SamplingSettings
from posttrain.models.base_model import BaseModel
from posttrain.records import Message, Rollout
from posttrain.serve.answering import Choice
from posttrain.serve.keys import KeyFile, add_key
from posttrain.serve.limits import Limits
from posttrain.serve.parse import ParsedRequest

HI: list[Any] = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tiny: BaseModel) -> Iterator[Listening]:
    with listening(tiny) as running:
        yield running


@pytest.fixture
def client(server: Listening) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def rollout(base: BaseModel, settings: SamplingSettings, completions: int = 1) -> list[Rollout]:
    return generate(base, [base.chat.encode_prompt([Message("user", "Hi")])], settings, "base", completions=completions)


def test_an_answer_is_the_engines(tiny: BaseModel, client: openai.OpenAI):
    found = client.chat.completions.create(model=BASE, messages=HI, temperature=0, max_tokens=9)
    assert found.choices[0].message.content == alone(tiny, "Hi", 9)
    assert found.choices[0].finish_reason == "length"
    prompt = len(tiny.chat.encode_prompt([Message("user", "Hi")]))
    assert found.usage is not None
    assert (found.usage.prompt_tokens, found.usage.completion_tokens, found.usage.total_tokens) == (prompt, 9, prompt + 9)
    assert found.usage.prompt_tokens_details is not None
    assert found.usage.prompt_tokens_details.cached_tokens == 0
    assert found.system_fingerprint == f"fp_{tiny.source.weights_hash[:16]}"


def test_every_sampling_field_reaches_the_engine(tiny: BaseModel, client: openai.OpenAI):
    found = client.chat.completions.create(
        model=BASE, messages=HI, temperature=0.8, top_p=0.9, seed=5, n=3, max_completion_tokens=12, logit_bias={"65": 4.0},
        stop=["zz", "AA"], extra_body={"top_k": 40, "min_p": 0.01, "repetition_penalty": 1.2, "min_tokens": 3},
    )  # fmt: skip
    settings = SamplingSettings(
        12, 0.8, 0.9, seed=5, top_k=40, min_p=0.01, repetition_penalty=1.2, min_new_tokens=3, stop=("zz", "AA"),
        logit_bias=((65, 4.0),),
    )  # fmt: skip
    assert [choice.message.content for choice in found.choices] == [r.text for r in rollout(tiny, settings, 3)]


def test_a_stream_adds_up_to_the_answer(tiny: BaseModel, client: openai.OpenAI):
    asked = {"model": BASE, "messages": HI, "temperature": 1, "seed": 3, "max_tokens": 25, "n": 2, "stop": ["a", "Q"]}
    whole = client.chat.completions.create(**asked)
    chunks = list(client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}))
    for choice in whole.choices:
        own = [c.choices[0] for c in chunks[:-1] if c.choices[0].index == choice.index]
        assert own[0].delta.role == "assistant"
        assert "".join(c.delta.content or "" for c in own) == choice.message.content
        assert [c.finish_reason for c in own] == [None] * (len(own) - 1) + [choice.finish_reason]
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert all(chunk.usage is None for chunk in chunks[:-1])
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_without_usage_has_no_such_field_and_ends_with_done(server: Listening):
    body = {"model": BASE, "messages": HI, "max_tokens": 2, "stream": True}
    with httpx.stream("POST", f"{server.url}/v1/chat/completions", json=body) as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in response.iter_lines() if line]
    assert lines[-1] == "data: [DONE]"
    assert all("usage" not in json.loads(line.removeprefix("data: ")) for line in lines[:-1])


def test_log_probabilities_of_a_chat_are_the_models_own(tiny: BaseModel, client: openai.OpenAI):
    settings = SamplingSettings(6, 0.5, seed=2)
    (told,) = rollout(tiny, settings)
    found = client.chat.completions.create(
        model=BASE, messages=HI, temperature=0.5, seed=2, max_tokens=6, logprobs=True, top_logprobs=3
    )
    assert found.choices[0].logprobs is not None
    content = found.choices[0].logprobs.content or []
    assert [entry.logprob for entry in content] == pytest.approx(list(told.model_logprobs), abs=1e-5)
    for entry, token in zip(content, told.completion_ids, strict=True):
        assert entry.token == tiny.chat.decode([token], special=True)
        assert entry.bytes == (None if "\ufffd" in entry.token else list(entry.token.encode()))
        assert len(entry.top_logprobs) == 3
        ordered = [top.logprob for top in entry.top_logprobs]
        assert ordered == sorted(ordered, reverse=True)
        assert entry.logprob <= ordered[0] + 1e-6


def test_completions_of_texts_and_of_token_ids(tiny: BaseModel, client: openai.OpenAI):
    ids = [tiny.chat.encode_text(text) for text in ("One", "Two and")]
    expected = [r.text for r in generate(tiny, ids, SamplingSettings(5), "base")]
    for prompt in (["One", "Two and"], ids):
        found = client.completions.create(model=BASE, prompt=prompt, temperature=0, max_tokens=5)
        assert [choice.text for choice in found.choices] == expected
    assert client.completions.create(model=BASE, prompt=ids[1], temperature=0, max_tokens=5).choices[0].text == expected[1]
    chunks = list(client.completions.create(model=BASE, prompt=["One", "Two and"], temperature=0, max_tokens=5, stream=True))
    for index, text in enumerate(expected):
        assert "".join(c.choices[0].text for c in chunks if c.choices[0].index == index) == text


def test_completions_say_sixteen_tokens_where_none_are_named(client: openai.OpenAI):
    found = client.completions.create(model=BASE, prompt="a", extra_body={"min_tokens": 16})
    assert found.usage is not None
    assert found.usage.completion_tokens == 16


def test_a_prompt_is_scored_without_a_word_being_written(tiny: BaseModel, client: openai.OpenAI):
    """Echo with `max_tokens` 0, as evaluation harnesses ask for log-likelihoods; each token is scored after those before."""
    ids = tiny.chat.encode_text("The cat")
    found = client.completions.create(model=BASE, prompt=ids, max_tokens=0, echo=True, logprobs=2).choices[0]
    assert (found.text, found.finish_reason) == (tiny.chat.decode(ids), "length")
    scores = found.logprobs
    assert scores is not None
    assert scores.tokens == [tiny.chat.decode([token], special=True) for token in ids]
    assert (scores.token_logprobs or [])[0] is None
    for place in range(1, len(ids)):
        bias = ((ids[place], 100.0),)
        (told,) = generate(tiny, [ids[:place]], SamplingSettings(1, logit_bias=bias), "base")
        assert told.completion_ids == (ids[place],)
        assert (scores.token_logprobs or [])[place] == pytest.approx(told.model_logprobs[0], abs=1e-4)
    text = found.text
    for token, place in zip(scores.tokens or [], scores.text_offset or [], strict=True):
        if token != tiny.tokenizer.bos:
            assert text[place : place + len(token)] == token


BY_HAND = "<bos><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n"


def test_a_prompt_that_is_written_with_the_templates_tokens_is_the_conversation(
    tiny: BaseModel, server: Listening, client: openai.OpenAI
):
    """Control tokens that a text spells are these tokens, as in OpenAI's and vLLM's servers."""
    ids = tiny.chat.encode_prompt([Message("user", "Hi")])
    found = server.post("/tokenize", {"prompt": BY_HAND}).json()
    assert (found["tokens"], found["count"]) == (ids, len(ids))
    answer = client.completions.create(model=BASE, prompt=BY_HAND, temperature=0, max_tokens=9)
    assert answer.choices[0].text == alone(tiny, "Hi", 9)
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(ids)
    chat = client.chat.completions.create(
        model=BASE, messages=[{"role": "user", "content": BY_HAND}], temperature=0, max_tokens=1
    )
    assert chat.usage is not None
    assert chat.usage.prompt_tokens > len(ids) + 30, "what a message spells stays text"


def test_marks_of_the_renderer_are_letters_in_a_prompt(tiny: BaseModel, server: Listening):
    """They stand for control tokens inside of it, and nobody may forge them."""
    for prompt in ("\ue0001\ue001", "\ue000999\ue001", "a\ue0000\ue001<eos>"):
        found = server.post("/tokenize", {"prompt": prompt}).json()
        assert tiny.chat.decode(found["tokens"], special=True) == prompt
        assert found["tokens"].count(tiny.chat.eos_id) == prompt.count("<eos>")


@pytest.mark.parametrize("prompt", [BY_HAND, "plain \u00e9\U0001f642", "a<pad><eos>b"])
@pytest.mark.parametrize("stream", [False, True])
def test_tokens_of_a_prompt_stand_where_their_text_does(client: openai.OpenAI, prompt: str, stream: bool):
    asked = {"model": BASE, "prompt": prompt, "max_tokens": 5, "echo": True, "logprobs": 1, "temperature": 0}
    if stream:
        chunks = [chunk.choices[0] for chunk in client.completions.create(**asked, stream=True)]
    else:
        chunks = [client.completions.create(**asked).choices[0]]
    text = "".join(chunk.text for chunk in chunks)
    assert text.startswith(prompt)
    told = [
        pair
        for chunk in chunks
        if chunk.logprobs
        for pair in zip(chunk.logprobs.tokens or [], chunk.logprobs.text_offset or [], strict=True)
    ]
    for token, place in told:
        assert text[place : place + len(token)] == token or "\ufffd" in token
    assert [place for _, place in told] == sorted(place for _, place in told)
    assert told[-5][1] == len(prompt)


def test_a_bos_that_is_put_in_front_of_a_prompt_takes_no_place_in_its_text(tiny: BaseModel):
    settings, ids = SamplingSettings(0), [tiny.chat.bos_id or 0, *tiny.chat.encode_text("a<eos>b", control=True)]
    scores = tuple(TokenScore(token, -1.0, ()) for token in ids[1:])
    places = {}
    for written, echoed in ((True, "a<eos>b"), (True, "<bos>a<eos>b"), (False, "ab")):
        choice = Choice(0, ids, echoed, ParsedRequest([ids], settings, 1, False, [echoed], True, written=written), tiny.chat)
        choice.add(Event(0, None, 0.0, 0.0, None, (), scores))
        places[echoed] = [shown.offset for shown in choice.take_pending()]
    assert places == {"a<eos>b": [0, 0, 1, 6], "<bos>a<eos>b": [0, 5, 6, 11], "ab": [0, 0, 1, 1]}


@pytest.mark.parametrize("stream", [False, True])
def test_of_tokens_with_one_text_the_likeliest_is_told(client: openai.OpenAI, stream: bool):
    """Every byte above 127 is "\ufffd" by itself: twenty likeliest tokens have some ten texts."""
    asked = {"model": BASE, "prompt": "hello", "max_tokens": 6, "logprobs": 20, "temperature": 0, "echo": True}
    chunks = list(client.completions.create(**asked, stream=True)) if stream else [client.completions.create(**asked)]
    told = [chunk.choices[0].logprobs for chunk in chunks if chunk.choices[0].logprobs]
    tokens, logprobs, tops = [], [], []
    for found in told:
        tokens += found.tokens or []
        logprobs += found.token_logprobs or []
        tops += found.top_logprobs or []
    assert len(tokens) == 11
    assert tops[0] is None
    assert any(len(top) < 20 for top in tops[1:]), "no two tokens have one text"
    for token, logprob, top in zip(tokens[-6:], logprobs[-6:], tops[-6:], strict=True):
        assert max(top.values()) == pytest.approx(logprob, abs=1e-5)
        assert top[token] == max(top.values())
    for token, logprob, top in zip(tokens[1:5], logprobs[1:5], tops[1:5], strict=True):
        assert top[token] >= logprob - 1e-6, "the token that stands there is among them"
        assert list(top.values())[: len(top) - 1] == sorted(list(top.values())[: len(top) - 1], reverse=True)


def test_async_clients_at_once(tiny: BaseModel, server: Listening):
    async def work() -> list[str | None]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asks = [
                client.chat.completions.create(
                    model=BASE, messages=[{"role": "user", "content": f"Hi {i}"}], temperature=0, max_tokens=7
                )
                for i in range(20)
            ]
            return [found.choices[0].message.content for found in await asyncio.gather(*asks)]

    assert asyncio.run(work()) == [alone(tiny, f"Hi {i}", 7) for i in range(20)]


def test_a_request_that_makes_the_engine_fail_ends_alone(tiny: BaseModel, server: Listening):
    """With 500, before a stream and in it; whoever asks at the same time gets the same answer as ever."""
    bad = 200

    def refuse(_: Any, inputs: tuple[Any, ...]) -> None:
        if bool((inputs[0] == bad).any()):
            raise ArithmeticError("not this token")

    async def work() -> tuple[list[str], list[openai.APIError]]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            good = [client.completions.create(model=BASE, prompt=f"Hi {i}", temperature=0, max_tokens=9) for i in range(6)]
            asked: Any = {"model": BASE, "max_tokens": 5, "temperature": 0, "n": 2}
            failing = [
                client.completions.create(**asked, prompt=[1, bad]),
                streamed(client.completions.create(**asked, prompt=[1, 9], logit_bias={str(bad): 100}, stream=True)),
            ]
            found = await asyncio.gather(*good, *failing, return_exceptions=True)
            return [one.choices[0].text for one in found[:6]], found[6:]

    async def streamed(stream: Any) -> None:
        async for _ in await stream:
            pass

    handle = tiny.model.get_input_embeddings().register_forward_pre_hook(refuse)
    try:
        texts, errors = asyncio.run(work())
    finally:
        handle.remove()
        server.settle()
    prompts = [tiny.chat.encode_text(f"Hi {i}") for i in range(6)]
    assert texts == [rollout.text for rollout in generate(tiny, prompts, SamplingSettings(9), "base")]
    assert [type(error) for error in errors] == [openai.InternalServerError, openai.APIError]
    assert all("internal error: ArithmeticError" in str(error) for error in errors)
    assert server.get("/ready").status_code == 200


def test_an_async_stream(tiny: BaseModel, server: Listening):
    async def work() -> str:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            stream = await client.chat.completions.create(model=BASE, messages=HI, temperature=0, max_tokens=7, stream=True)
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

    assert asyncio.run(work()) == alone(tiny, "Hi", 7)


def test_models_are_listed_and_found(tiny: BaseModel, client: openai.OpenAI):
    (card,) = client.models.list().data
    assert (card.id, card.object) == (BASE, "model")
    assert client.models.retrieve(BASE) == card
    assert card.model_extra == {
        "root": BASE, "parent": None, "fingerprint": tiny.source.weights_hash, "stage": None, "scores": None,
        "max_model_len": tiny.context,
    }  # fmt: skip
    with pytest.raises(openai.NotFoundError, match="is not served"):
        client.models.retrieve("nope")


@pytest.mark.parametrize(
    ("more", "param"),
    [
        ({"model": "nope"}, "model"),
        ({"temperature": 3}, "temperature"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"n": 17}, "n"),
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"max_tokens": 5000}, "max_tokens"),
        ({"max_tokens": 2048}, "max_tokens"),
        ({"logit_bias": {"99999999": 1}}, "logit_bias"),
        ({"extra_body": {"min_tokens": 9, "max_tokens": 8}}, "min_tokens"),
        ({"extra_body": {"invented": 1}}, "invented"),
        ({"extra_body": {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}}, "messages[0].content[0].type"),
    ],
)
def test_a_mistake_is_told_with_its_field(client: openai.OpenAI, more: dict[str, Any], param: str):
    kind = openai.NotFoundError if param == "model" else openai.BadRequestError
    with pytest.raises(kind) as caught:
        client.chat.completions.create(**{"model": BASE, "messages": HI, **more})
    assert caught.value.param == param
    assert isinstance(caught.value.body, dict)
    assert set(caught.value.body) == {"message", "type", "param", "code"}


def test_fields_that_say_what_is_done_anyway_are_taken(tiny: BaseModel, client: openai.OpenAI):
    parts: Any = {"role": "developer", "content": [{"type": "text", "text": "Be"}, {"type": "text", "text": "."}]}
    found = client.chat.completions.create(
        model=BASE, messages=[parts, *HI],
        tools=[], tool_choice="none", response_format={"type": "text"}, frequency_penalty=0, presence_penalty=0.0, user="ann",
        metadata={"a": "b"}, store=False, service_tier="auto", parallel_tool_calls=True, modalities=["text"], temperature=0,
        max_tokens=5,
    )  # fmt: skip
    prompt = tiny.chat.encode_prompt([Message("system", "Be."), Message("user", "Hi")])
    assert found.choices[0].message.content == generate(tiny, [prompt], SamplingSettings(5), "base")[0].text


def test_a_turn_of_the_assistant_goes_back_as_the_client_got_it(tiny: BaseModel, client: openai.OpenAI):
    first = client.chat.completions.create(model=BASE, messages=HI, temperature=0, max_tokens=5).choices[0].message
    turns: list[Any] = [*HI, first.model_dump(), {"role": "user", "content": "And?"}]
    found = client.chat.completions.create(model=BASE, messages=turns, temperature=0, max_tokens=5)
    asked = [Message("user", "Hi"), Message("assistant", first.content or ""), Message("user", "And?")]
    expected = generate(tiny, [tiny.chat.encode_prompt(asked)], SamplingSettings(5), "base")[0].text
    assert found.choices[0].message.content == expected


def test_keys_and_a_full_house_have_their_classes(tiny: BaseModel, tmp_path: Path):
    secret = add_key(tmp_path / "keys.json", "ann", ("use",))
    with listening(tiny, keys=KeyFile(tmp_path / "keys.json")) as server:
        url = f"{server.url}/v1"
        with openai.OpenAI(base_url=url, api_key="wrong", max_retries=0) as stranger:
            with pytest.raises(openai.AuthenticationError):
                stranger.models.list()
        with openai.OpenAI(base_url=url, api_key=secret, max_retries=0) as ann:
            assert [card.id for card in ann.models.list()] == [BASE]
            with pytest.raises(openai.PermissionDeniedError):
                ann.post("/load_lora_adapter", body={"lora_name": "a", "lora_path": "a"}, cast_to=object)
            full = server.gate.places.hold("ann", server.service.places)
            with full, pytest.raises(openai.RateLimitError) as caught:
                ann.chat.completions.create(model=BASE, messages=HI)
            assert caught.value.response.headers["retry-after"] == "1"


def test_what_goes_wrong_in_a_stream_is_an_error_of_the_client(tiny: BaseModel):
    """The time of a request is over while its answer streams."""
    with listening(tiny, limits=Limits(request_seconds=0.5)) as server:
        with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            stream = client.chat.completions.create(
                model=BASE, messages=HI, max_tokens=2000, stream=True, extra_body={"min_tokens": 2000}
            )
            with pytest.raises(openai.APIError, match="not finished within --request-seconds"):
                list(stream)
            with pytest.raises(openai.InternalServerError, match="not finished within --request-seconds") as caught:
                client.chat.completions.create(model=BASE, messages=HI, max_tokens=2000, extra_body={"min_tokens": 2000})
            assert caught.value.status_code == 503
