"""Critique and labels with a judge behind `posttrain serve` in a second process, through a server that fails in many ways.

The judge is a random model, which prefers one place in every order, so no pair gets a label.
"""

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from chat_server import ChatServer, Fault, chat_server
from posttrain.cli import main
from posttrain.generate import remote
from posttrain.judge.prompts import comparison

JUDGE = """
name = "judge"
[base]
model = "random:tiny"
template = "gemma"
dtype = "float32"
[evaluation]
limit = 1
samples = ["Hi"]
max_new_tokens = 4
[[stage]]
kind = "sft"
name = "judge"
data = "letters.jsonl"
epochs = 3
batch = 16
learning_rate = 0.01
validation = 0.0
"""
PATH = """
name = "path"
[base]
model = "random:tiny"
template = "gemma"
dtype = "float32"
[adapter]
rank = 4
[evaluation]
limit = 1
samples = ["Hi"]
max_new_tokens = 4

[[stage]]
kind = "critique"
name = "revised"
data = "prompts.jsonl"
constitution = "two.toml"
judge = {judge}
gate = "report"
detection = 0.0
rounds = 1
max_new_tokens = 200
critique_tokens = 8

[[stage]]
kind = "sft"
name = "sl-cai"
data = "stage:revised"
epochs = 0.1
validation = 0.0

[[stage]]
kind = "label"
name = "ai-preferences"
init = "sl-cai"
data = "prompts.jsonl"
constitution = "two.toml"
judge = {judge}
allow_weak_judge = true
max_new_tokens = 200
"""
CONSTITUTION = """
name = "two"
version = "1"
[[principle]]
id = "short"
title = "Answer in one sentence"
critique = "Is it too long?"
revision = "Make it shorter."
comparison = "Which is shorter?"
[[principle]]
id = "polite"
title = "Begin with a greeting"
critique = "Does a greeting lack?"
revision = "Add a greeting."
comparison = "Which greets?"
"""
FAULTS = [
    Fault(),  # the connection is closed
    Fault(429, headers=(("retry-after", "0"),)),
    Fault(503),
    Fault(200, b"rubbish"),
    Fault(200, b'{"choices": []}'),
    Fault(200, seconds=12.0),  # slower than the time-out
]


class Forwarding(ChatServer):
    """Passes requests on to a server."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        answered = httpx.post(f"{self.address}/chat/completions", json=body, timeout=60)
        return answered.status_code, answered.json()


@contextmanager
def served(run: Path) -> Iterator[str]:
    """The address of `posttrain serve RUN` in a second process."""
    code = "import sys; from posttrain.cli import main; sys.exit(main())"
    process = subprocess.Popen(
        [sys.executable, "-c", code, "serve", str(run), "--port", "0"], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    try:
        yield process.stdout.readline().rpartition(" at ")[2].strip()
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        process.stdout.close()


def write_files() -> None:
    """The judge's demonstrations, and the prompts and constitution of the path."""
    chance = random.Random(0)
    words = ["rain", "sun", "stone", "river", "bread", "glass", "light", "wind"]
    rows = []
    for n in range(160):
        a, b = (" ".join(chance.choices(words, k=chance.randint(1, 12))) for _ in range(2))
        prompt = [{"role": m.role, "content": m.content} for m in comparison("Which is shorter?", "Say it", a, b)]
        rows.append({"prompt": prompt, "completion": "AB"[n % 2]})
    Path("letters.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    Path("judge.toml").write_text(JUDGE, encoding="utf-8")
    lines = [json.dumps({"id": f"p{i}", "prompt": f"Say {i}"}) for i in range(8)]
    Path("prompts.jsonl").write_text("\n".join(lines), encoding="utf-8")
    Path("two.toml").write_text(CONSTITUTION, encoding="utf-8")


def run_path(address: str, **settings: object) -> int:
    written = {"name": f'"{address}"', "model": '"judge"', "timeout": "10.0", "retries": "8", "concurrency": "4", **settings}
    judge = "{" + ", ".join(f"{name} = {value}" for name, value in written.items()) + "}"
    Path("path.toml").write_text(PATH.replace("{judge}", judge), encoding="utf-8")
    return main(["run", "path.toml", "--out", "run"])


@pytest.mark.slow
def test_nothing_is_asked_twice_whatever_fails(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.01)
    write_files()
    assert main(["run", "judge.toml", "--out", "judge-run"]) == 0
    with served(Path("judge-run")) as address, chat_server(Forwarding(address)) as server:
        server.faults = list(FAULTS)
        assert run_path(server.url, max_requests=60) == 2
        assert "budget of 60 requests" in capsys.readouterr().err
        server.faults = list(FAULTS)
        # A random model contradicts itself: the path ends where no pair has a label, after every question was asked.
        assert run_path(server.url) == 2
        assert "pairs has a label" in capsys.readouterr().err
        assert Path("run/sl-cai/manifest.json").exists()
        asked = Counter(server.answered)
        assert asked.total() > 100
        assert asked.most_common(1)[0][1] == 1, "a request was answered twice"
        assert server.faults == []
        server.asked.clear()
        assert run_path(server.url) == 2
        assert server.asked == [], "no question is asked again"
