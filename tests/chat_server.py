"""A server that speaks the OpenAI chat protocol, in a thread of the test process, with faults to inject.

It is the other party of `generate/remote.py`: it reads the prompt of a judge and answers by a rule.
"""

import json
import math
import re
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple

Rule = Callable[[str, str], float]


class Fault(NamedTuple):
    """One bad answer: a status with a body, after some seconds; no status closes the connection."""

    status: int | None = None
    body: bytes = b"{}"
    headers: tuple[tuple[str, str], ...] = ()
    seconds: float = 0.0


def longer(first: str, second: str) -> float:
    """The probability that the longer answer is better."""
    return 0.5 if len(first) == len(second) else 0.9 if len(first) > len(second) else 0.2


class ChatServer:
    """Answers every request by `rule`, unless a fault is left. `asked` has the bodies in the order of their arrival."""

    def __init__(self, rule: Rule = longer, *, logprobs: bool = True, models: tuple[str, ...] = ("judge",)) -> None:
        self.rule, self.logprobs, self.models = rule, logprobs, models
        self.usage, self.most_choices, self.context = True, 128, 10**6
        self.faults: list[Fault] = []
        self.asked: list[dict[str, Any]] = []
        self.answered: list[str] = []
        self.times: list[float] = []
        self.keys: set[str] = set()
        self.active, self.most_active, self.seconds = 0, 0, 0.0
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Status and JSON of an answer without a fault."""
        if body["model"] not in self.models:
            return 404, {"error": {"message": "no such model", "code": "model_not_found"}}
        text = body["messages"][-1]["content"]
        if len(text) > self.context:
            return 400, {"error": {"message": f"maximum context length is {self.context} characters"}}
        if body.get("logprobs") and not self.logprobs:
            return 400, {"error": {"message": "logprobs are not supported"}}
        options, p = self.judged(text)
        count = min(body.get("n", 1), self.most_choices)
        reasoning = "step by step" in text
        chosen = [options[0] if n < round(p * count) else options[1] for n in range(count)]
        words = [f"One is longer.\nAnswer: {word}" if reasoning else word for word in chosen]
        top = [{"token": option, "logprob": math.log(max(q, 1e-9))} for option, q in zip(options, (p, 1 - p), strict=True)]
        shown = {"content": [{"token": chosen[0], "logprob": -0.1, "top_logprobs": top[: body.get("top_logprobs", 0)]}]}
        choices = [
            {"index": n, "message": {"role": "assistant", "content": word}, "finish_reason": "stop",
             "logprobs": shown if body.get("logprobs") else None}
            for n, word in enumerate(words)
        ]  # fmt: skip
        return 200, {"choices": choices, **({"usage": {"total_tokens": 10}} if self.usage else {})}

    def judged(self, text: str) -> tuple[tuple[str, str], float]:
        """The options of a prompt and the probability of the first."""
        found = dict(re.findall(r"<(answer\w*)>\n(.*?)\n</", text, re.DOTALL))
        if "answer_A" in found:
            return ("A", "B"), self.rule(found["answer_A"], found["answer_B"])
        return ("Yes", "No"), self.rule(found["answer"], "a text of some length")


@contextmanager
def chat_server(server: ChatServer) -> Iterator[ChatServer]:
    """Run a server on a free port of this machine for the length of the block."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            with server.lock:
                server.asked.append(body)
                server.times.append(time.monotonic())
                server.keys.add(self.headers.get("authorization", ""))
                fault = server.faults.pop(0) if server.faults else None
                server.active += 1
                server.most_active = max(server.active, server.most_active)
            time.sleep(server.seconds)
            if fault is None and self.path == "/v1/chat/completions":
                status, reply = server.answer(body)
                if status == 200:
                    server.answered.append(json.dumps(body, sort_keys=True))
                fault = Fault(status, json.dumps(reply).encode())
            fault = fault or Fault(404)
            time.sleep(fault.seconds)
            with server.lock:
                server.active -= 1
            self.close_connection = fault.status is None
            if fault.status is not None:
                self.send_response(fault.status)
                for name, value in (*fault.headers, ("content-length", str(len(fault.body)))):
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(fault.body)

        def handle(self) -> None:
            with suppress(ConnectionError):  # a client that did not wait for a slow answer
                super().handle()

        def log_message(self, format: str, *arguments: Any) -> None:
            """Say nothing."""

    listener = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.url = f"http://127.0.0.1:{listener.server_address[1]}/v1"
    thread = threading.Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.02}, name="chat server")
    thread.start()
    try:
        yield server
    finally:
        listener.shutdown()
        listener.server_close()
        thread.join()
