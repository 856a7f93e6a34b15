"""More is asked for than can be answered: what is taken is answered, the rest is turned away at once and in words."""

import asyncio
import threading
from collections import Counter
from collections.abc import Sequence

import httpx
import pytest
from listening import BASE, chat, listening

from posttrain.generate.engine import ROWS
from posttrain.models.base_model import BaseModel
from posttrain.serve.answering import Flow
from posttrain.serve.limits import Limits

CHAT = "/v1/chat/completions"


@pytest.mark.parametrize("seconds", [3, pytest.param(60, marks=pytest.mark.slow)])
def test_at_ten_times_what_can_be_answered_there_is_200_and_429_and_nothing_else(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch, seconds: int
):
    """The generator is open-loop: it asks by the clock, whatever has been answered."""
    monkeypatch.setitem(ROWS, "cpu", 2)
    body = chat("Hi", tokens=30, min_tokens=30)

    async def capacity(client: httpx.AsyncClient) -> float:
        """Answers a second with as many clients as there are rows."""
        before = asyncio.get_running_loop().time()
        for _ in range(10):
            found = await asyncio.gather(*(client.post(CHAT, json=body) for _ in range(2)))
            assert [one.status_code for one in found] == [200, 200]
        return 20 / (asyncio.get_running_loop().time() - before)

    async def work(url: str) -> list[httpx.Response]:
        limits = httpx.Limits(max_connections=None, max_keepalive_connections=100)
        async with httpx.AsyncClient(base_url=url, timeout=60, limits=limits) as client:
            rate = min(10 * await capacity(client), 400)
            begin, asked = asyncio.get_running_loop().time(), []
            for number in range(int(rate * seconds)):
                await asyncio.sleep(max(0.0, begin + number / rate - asyncio.get_running_loop().time()))
                asked.append(asyncio.create_task(client.post(CHAT, json=body)))
            return await asyncio.gather(*asked)

    with listening(tiny, limits=Limits(queue=4)) as server:
        found = asyncio.run(work(server.url))
        server.settle()
    counts = Counter(response.status_code for response in found)
    assert set(counts) == {200, 429}, counts
    for response in found:
        if response.status_code == 429:
            assert response.headers["retry-after"] == "1"
            assert response.json()["error"]["code"] == "queue_full"
        else:
            assert response.json()["usage"]["completion_tokens"] == 30


def test_a_burst_of_prompts_that_take_long_to_read_does_not_stop_the_rest(tiny: BaseModel):
    """Templates and tokenizers run beside the event loop, which goes on answering while they do."""
    many = {"messages": [{"role": ("user", "assistant")[i % 2], "content": "word " * 400} for i in range(99)]}

    async def work(url: str) -> tuple[list[int], int]:
        async with httpx.AsyncClient(base_url=url, timeout=120) as client:
            asked = [asyncio.create_task(client.post(CHAT, json=chat("", **many))) for _ in range(3)]
            healthy = 0
            while not all(task.done() for task in asked):
                assert (await client.get("/health")).status_code == 200
                healthy += 1
            return [(await task).status_code for task in asked], healthy

    with listening(tiny) as server:
        statuses, healthy = asyncio.run(work(server.url))
    assert statuses == [400] * 3  # far more than the context holds
    assert healthy > 10


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_of_many_tokens_are_written_beside_the_loop(
    tiny: BaseModel, monkeypatch: pytest.MonkeyPatch, stream: bool
):
    """16 answers of 1,500 tokens with 20 likely ones each held everybody else up for seconds."""
    seen: set[str] = set()
    token_text, decode = Flow.token_text, tiny.chat.decode

    def noted(flow: Flow, token: int) -> str:
        seen.add(threading.current_thread().name)
        return token_text(flow, token)

    def noted_too(ids: Sequence[int], special: bool = False, *, middle: bool = True) -> str:
        seen.add(threading.current_thread().name)
        return decode(ids, special, middle=middle)

    scored = {"model": BASE, "prompt": [list(range(7, 107))] * 3, "echo": True, "logprobs": 5, "max_tokens": 0}
    with listening(tiny) as server:
        monkeypatch.setattr(Flow, "token_text", noted)
        if not stream:  # a stream tells few at a time
            assert server.post(CHAT, chat("Hi", n=3, tokens=30, logprobs=True, top_logprobs=5)).status_code == 200
        monkeypatch.setattr(tiny.chat, "decode", noted_too)
        assert server.post("/v1/completions", scored | {"stream": stream}).status_code == 200
    assert seen
    assert "server under test" not in seen
