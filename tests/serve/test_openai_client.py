"""The openai package against a real server: answers, streams, usage, log-probabilities, and its classes of errors."""

import asyncio
from collections.abc import Iterator

import openai
import pytest
from listening import BASE, Listening, listening

from posttrain.generate.engine import generate
from posttrain.generate.sampling import SamplingSettings
from posttrain.models.load import BaseModel
from posttrain.records import Message

HI = [{"role": "user", "content": "Hi"}]


@pytest.fixture(scope="module")
def server(tiny: BaseModel) -> Iterator[Listening]:
    with listening(tiny) as running:
        yield running


@pytest.fixture
def client(server: Listening) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as found:
        yield found


def alone(base: BaseModel, text: str, tokens: int) -> str:
    prompt = base.chat.encode_prompt([Message("user", text)])
    return generate(base, [prompt], SamplingSettings(tokens), "base")[0].text


def test_an_answer_is_the_engines(tiny: BaseModel, client: openai.OpenAI):
    found = client.chat.completions.create(model=BASE, messages=HI, temperature=0, max_tokens=9)
    assert found.choices[0].message.content == alone(tiny, "Hi", 9)
    assert found.choices[0].finish_reason == "length"
    assert (found.usage.completion_tokens, found.usage.prompt_tokens) == (
        9,
        len(tiny.chat.encode_prompt([Message("user", "Hi")])),
    )


def test_a_stream_adds_up_to_the_answer(tiny: BaseModel, client: openai.OpenAI):
    chunks = list(
        client.chat.completions.create(
            model=BASE, messages=HI, temperature=0, max_tokens=9, stream=True, stream_options={"include_usage": True}
        )
    )
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1]) == alone(tiny, "Hi", 9)
    assert chunks[-2].choices[0].finish_reason == "length"
    assert chunks[-1].choices == []
    assert chunks[-1].usage.completion_tokens == 9


def test_async_clients_at_once(tiny: BaseModel, server: Listening):
    async def work() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none") as client:
            asks = [
                client.chat.completions.create(
                    model=BASE, messages=[{"role": "user", "content": f"Hi {i}"}], temperature=0, max_tokens=7
                )
                for i in range(20)
            ]
            return [found.choices[0].message.content for found in await asyncio.gather(*asks)]

    assert asyncio.run(work()) == [alone(tiny, f"Hi {i}", 7) for i in range(20)]
