"""What one server gives away at most: each limit is held at its edge, and nothing a client sends is a defect."""

import asyncio
import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest
from listening import BASE, Listening, chat, listening

from posttrain.generate.engine import ROWS, Engine
from posttrain.generate.requests import Event
from posttrain.models.base_model import BaseModel
from posttrain.serve.limits import Limits
from posttrain.serve.protocol import BIASES, MESSAGES, STOP_CHARS, STOPS, CompletionRequest
from posttrain.serve.service import Service
from posttrain.serve.store import AdapterStore

LIMITS = Limits(body_bytes=40_000, prompt_chars=300, max_tokens=20, default_tokens=6, completions=3, queue=4, body_seconds=1.0)
CHAT, COMPLETIONS = "/v1/chat/completions", "/v1/completions"


@pytest.fixture(scope="module")
def server(tiny: BaseModel) -> Iterator[Listening]:
    with listening(tiny, limits=LIMITS) as running:
        yield running


def told(response: httpx.Response, status: int, param: str | None) -> None:
    """The envelope, whole."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/json"
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param


def text_body(**more: Any) -> dict[str, Any]:
    return {"model": BASE, "prompt": "Hi", "temperature": 0, "max_tokens": 2, **more}


def padded(length: int) -> bytes:
    """A good request of so many bytes: spaces after JSON mean nothing."""
    return json.dumps(chat("Hi", tokens=1)).encode().ljust(length)


def test_a_body_of_just_the_limit_and_one_byte_more(server: Listening):
    assert server.post(CHAT, padded(40_000)).status_code == 200
    told(server.post(CHAT, padded(40_001)), 413, None)


def test_a_body_without_a_length_is_counted_as_it_comes(server: Listening):
    def pieces(count: int) -> Iterator[bytes]:
        data = padded(count)
        yield from (data[i : i + 1000] for i in range(0, count, 1000))

    headers = {"content-type": "application/json"}
    assert httpx.post(server.url + CHAT, content=pieces(40_000), headers=headers).status_code == 200
    told(httpx.post(server.url + CHAT, content=pieces(41_000), headers=headers), 413, None)


def test_a_sender_that_stops_is_not_waited_for(server: Listening):
    with socket.create_connection((urlsplit(server.url).hostname, urlsplit(server.url).port), timeout=30) as sender:
        head = f"POST {CHAT} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 100\r\n\r\n"
        sender.sendall(head.encode() + b"{")
        assert sender.recv(4096).startswith(b"HTTP/1.1 408 ")
    server.settle()


AT_THE_EDGE: list[tuple[str, dict[str, Any], dict[str, Any], str]] = [
    (CHAT, chat("x" * 300), chat("x" * 301), "messages"),
    (COMPLETIONS, text_body(prompt="x" * 300), text_body(prompt="x" * 301), "prompt"),
    (COMPLETIONS, text_body(prompt=["x" * 150] * 2), text_body(prompt=["x" * 150, "x" * 151]), "prompt"),
    (CHAT, chat("Hi", tokens=20), chat("Hi", tokens=21), "max_tokens"),
    (CHAT, chat("Hi", tokens=1), chat("Hi", tokens=0), "max_tokens"),
    (COMPLETIONS, text_body(max_tokens=0), text_body(max_tokens=-1), "max_tokens"),
    (CHAT, chat("Hi", n=3), chat("Hi", n=4), "n"),
    (COMPLETIONS, text_body(prompt=["a"] * 3), text_body(prompt=["a"] * 4), "n"),
    (COMPLETIONS, text_body(prompt=["a"], n=3), text_body(prompt=["a"] * 2, n=2), "n"),
    (CHAT, chat("Hi", stop=["x"] * STOPS), chat("Hi", stop=["x"] * (STOPS + 1)), "stop"),
    (CHAT, chat("Hi", stop="x" * STOP_CHARS), chat("Hi", stop="x" * (STOP_CHARS + 1)), "stop"),
    (CHAT, chat("Hi", stop=["x"]), chat("Hi", stop=[""]), "stop[0]"),
    (
        COMPLETIONS, text_body(logit_bias={"0" * (i // 250) + str(i % 250 + 10): 0 for i in range(BIASES)}),
        text_body(logit_bias={str(i): 0 for i in range(BIASES + 1)}), "logit_bias",
    ),
    (CHAT, chat("Hi", logit_bias={"5": 100}), chat("Hi", logit_bias={"5": 100.5}), "logit_bias.5"),
    (
        CHAT, chat("", messages=[{"role": "system", "content": "x"}] * (MESSAGES - 1) + [{"role": "user", "content": "x"}]),
        chat("", messages=[{"role": "user", "content": "x"}] * (MESSAGES + 1)), "messages",
    ),
    (COMPLETIONS, text_body(prompt=[1] * 2046), text_body(prompt=[1] * 2047), "max_tokens"),
    (COMPLETIONS, text_body(prompt=[0]), text_body(prompt=[-1]), "prompt[0]"),
    (COMPLETIONS, text_body(prompt=[2]), text_body(prompt=[100_000]), "prompt"),
    (COMPLETIONS, text_body(logprobs=20), text_body(logprobs=21), "logprobs"),
    (CHAT, chat("Hi", seed=2**63 - 1), chat("Hi", seed=2**63), "seed"),
    (CHAT, chat("Hi", seed=-(2**63)), chat("Hi", seed=-(2**63) - 1), "seed"),
    (CHAT, chat("Hi", temperature=2), chat("Hi", temperature=2.01), "temperature"),
    (CHAT, chat("Hi", top_p=1), chat("Hi", top_p=0), "top_p"),
    (CHAT, chat("Hi", n=1), chat("Hi", n=True), "n"),
]  # fmt: skip


@pytest.mark.parametrize(("path", "fits", "does_not", "param"), AT_THE_EDGE)
def test_a_limit_is_held_at_its_edge(server: Listening, path: str, fits: Any, does_not: Any, param: str):
    assert server.post(path, fits).status_code == 200
    told(server.post(path, does_not), 400, param)


def test_an_answer_without_a_length_has_the_servers(server: Listening):
    body = chat("Hi", min_tokens=6)
    del body["max_tokens"]
    assert server.post(CHAT, body).json()["usage"]["completion_tokens"] == 6


@pytest.mark.parametrize("tiny_number", [5e-324, 1e-46, 1e-38, 1e-5, 1e-3])
@pytest.mark.parametrize("field", ["temperature", "top_p", "min_p", "repetition_penalty"])
def test_numbers_near_nothing_do_not_harm_the_engine(server: Listening, field: str, tiny_number: float):
    asked = {"temperature": 1, "seed": 1, "logit_bias": {"65": 100, "66": -100}, field: tiny_number}
    assert server.post(CHAT, chat("Hi", tokens=4, **asked)).status_code == (400 if field == "repetition_penalty" else 200)
    assert server.post(CHAT, chat("Hi", tokens=4, repetition_penalty=0.01)).status_code == 200


BAD_BODIES = [
    b"", b"{", b"null", b"[]", b"3", b'"x"', b"\xff\xfe", b'{"model": NaN}', b"[" * 20_000, b'{"a":' * 5_000,
    b'{"model": 1' + b"0" * 5000 + b"}", json.dumps({"model": BASE}).encode(), b'{"messages": [[]], "model": "a"}',
    json.dumps(chat("Hi", temperature="0")).encode(), json.dumps(chat("Hi", messages=[])).encode(),
    json.dumps(chat("Hi", messages=[{"role": "tool", "content": "x"}])).encode(),
    json.dumps(chat("Hi", messages=[{"role": "user"}])).encode(),
    json.dumps(chat("Hi", logit_bias={"a": 1})).encode(),
    json.dumps(chat("Hi", logit_bias={str(i): "x" for i in range(1000)})).encode(),
    json.dumps(text_body(prompt=["a", 1])).encode(), json.dumps(text_body(prompt=[])).encode(),
    json.dumps(text_body(prompt=[[]])).encode(), json.dumps(text_body(prompt=[["x"] * 3000])).encode(),
    json.dumps({"\ud800": 1}).encode(), json.dumps(chat("\ud800")).encode(), json.dumps(chat("Hi", model="\udfff")).encode(),
]  # fmt: skip


@pytest.mark.parametrize("body", BAD_BODIES, ids=range(len(BAD_BODIES)))
@pytest.mark.parametrize("path", [CHAT, COMPLETIONS, "/tokenize", "/detokenize", "/v1/load_lora_adapter"])
def test_what_is_no_request_is_the_clients_mistake(server: Listening, path: str, body: bytes):
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    assert set(response.json()["error"]) == {"message", "type", "param", "code"}


@pytest.mark.parametrize("text", ["\x00", "a\x00b", "\u202e", "🙂" * 20, "<end_of_turn>", "\ue0000\ue001", "{{ 7 * 7 }}"])
def test_strange_text_is_text(server: Listening, text: str):
    for path, body in ((CHAT, chat(text, tokens=2)), (COMPLETIONS, text_body(prompt=text, echo=True))):
        assert server.post(path, body).status_code == 200
    (choice,) = server.post(COMPLETIONS, text_body(prompt=text, echo=True, max_tokens=0)).json()["choices"]
    assert choice["text"] == text
    assert server.post(CHAT, chat("Hi", model=text)).status_code == 404
    assert server.post(CHAT, chat("Hi", stop=[text])).status_code == 200


def test_json_is_asked_for_by_its_type(server: Listening):
    """A form of another site can send text/plain without being asked, and must not reach a route."""
    for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data; boundary=a"):
        told(server.post(CHAT, chat("Hi"), headers={"content-type": kind}), 400, None)


def test_requests_that_mean_nothing_are_counted(server: Listening):
    def counted(model: str) -> float:
        found = re.findall(
            rf'^posttrain_requests_total{{model="{model}",status="400"}} (.+)$', server.get("/metrics").text, re.M
        )
        return sum(map(float, found))

    name = server.get("/v1/models").json()["data"][0]["id"]
    before = counted(name), counted("unknown")
    told(server.post(CHAT, {**chat("Hi"), "n": "many"}), 400, "n")
    told(server.post(CHAT, {**chat("Hi"), "model": 7}), 400, "model")
    assert (counted(name), counted("unknown")) == (before[0] + 1, before[1] + 1)


def test_paths_and_methods_that_are_not_there(server: Listening):
    told(server.get("/v1/nothing"), 404, None)
    told(server.get(CHAT), 405, None)
    told(server.post("/health", {}), 405, None)
    assert server.get("/v1/models/").status_code == 404
    assert server.get("/v1/models/..%2f..%2fetc").status_code == 404


def test_a_full_house_says_when_to_come_again(server: Listening):
    with server.gate.places.hold("", server.service.places):
        response = server.post(CHAT, chat("Hi"))
        told(response, 429, None)
        assert response.headers["retry-after"] == "1"
        counted = re.findall(
            r'^posttrain_requests_total{model="unknown",status="429"} (.+)$', server.get("/metrics").text, re.M
        )
        assert counted == ["1.0"], "who watches sees that requests are turned away"
        assert (
            server.get("/health").status_code == server.get("/ready").status_code == server.get("/metrics").status_code == 200
        )


def test_an_answer_that_does_not_begin_in_time(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(ROWS, "cpu", 1)
    with listening(tiny, limits=Limits(queue_seconds=0.2)) as server:
        connection = http.client.HTTPConnection(urlsplit(server.url).netloc)
        long = chat("Hi", tokens=1900, min_tokens=1900, stream=True)
        connection.request("POST", CHAT, json.dumps(long), {"content-type": "application/json"})
        assert connection.getresponse().status == 200
        for stream in (False, True):
            response = server.post(CHAT, chat("Hi", stream=stream))
            told(response, 503, None)
            assert "no token within --queue-seconds" in response.text
        connection.close()


def test_the_queues_limit_is_over_with_a_first_token_that_nobody_waited_for(tiny: BaseModel, monkeypatch: pytest.MonkeyPatch):
    """It came before it was asked for, and the others come later than the queue may last."""
    own = Engine.step

    def step(engine: Engine) -> list[Event]:
        time.sleep(0.8 if engine._places.rows() else 0)
        return own(engine)

    monkeypatch.setattr(Engine, "step", step)

    async def work() -> None:
        service = Service(tiny, AdapterStore(tiny, base_name=BASE, folder=None, budget_bytes=2**30), Limits(queue_seconds=0.5))
        async with service.running():
            body = CompletionRequest(**text_body(max_tokens=3, min_tokens=3, stream=True))
            flow = await service.open(body, "")
            await asyncio.sleep(0.3)
            assert len([piece async for piece in flow.events()]) == 3
            flow.cancel()

    asyncio.run(work())
