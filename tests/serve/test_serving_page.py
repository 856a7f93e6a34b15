"""docs/serving.md tells what the server does: routes, fields, limits, metrics, and examples that run."""

import contextlib
import io
import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import pytest
from listening import BASE, Listening, alone, chat, listening

from posttrain.cli import build_parser
from posttrain.models.load import BaseModel
from posttrain.serve.app import PLAYGROUND, page_policy
from posttrain.serve.limits import Limits
from posttrain.serve.protocol import (
    BIASES,
    IGNORED,
    MESSAGE_IGNORED,
    MESSAGE_REFUSED,
    MESSAGES,
    REFUSED,
    STOP_CHARS,
    STOPS,
    ChatRequest,
    CompletionRequest,
)

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")


def section(name: str) -> str:
    return PAGE.split(f"## {name}\n")[1].split("\n## ")[0]


def quoted(text: str) -> set[str]:
    return set(re.findall(r"`([^`]+)`", text))


@pytest.fixture(scope="module")
def server(tiny: BaseModel) -> Iterator[Listening]:
    with listening(tiny) as running:
        yield running


def test_every_route_stands_on_the_page(server: Listening):
    routes = {f"{method} {route.path}" for route in server.routes for method in route.methods - {"HEAD"}}
    told = {name for name in quoted(section("Routes")) if re.match(r"(GET|POST) /", name)}
    assert told | {"GET /"} == {name.replace("{model:path}", "{id}") for name in routes} | {"GET /"}


def test_every_field_stands_on_the_page_as_what_is_done_with_it():
    text = section("Fields")
    ignored, refused = (row for row in text.splitlines() if "| ignored" in row or "| refused with 400, unless" in row)
    assert quoted(ignored.split("|")[1]) == IGNORED | MESSAGE_IGNORED
    assert quoted(refused.split("|")[1]) == set(REFUSED) | set(MESSAGE_REFUSED)
    taken = {*ChatRequest.model_fields, *CompletionRequest.model_fields} - {"model", "messages", "prompt", "stream_options"}
    assert taken - quoted(text.split("\n|")[0]) == set()


def test_the_limits_are_those_of_the_command():
    defaults = vars(build_parser().parse_args(["serve", "x"]))
    told = dict(re.findall(r"^\| `--([a-z-]+)` \| ([0-9,]+)(?: MiB)? \|", section("Limits"), re.MULTILINE))
    told["body-bytes"] = str(2**20 * int(told["body-bytes"]))
    assert {name: float(value.replace(",", "")) for name, value in told.items()} == {
        name: defaults[name.replace("-", "_")] for name in told
    }
    assert Limits()._asdict() == {
        name: defaults["shutdown_timeout" if name == "shutdown_seconds" else name] for name in Limits._fields
    }
    assert len(told) == len(Limits._fields)
    fixed = f"At most {STOPS} stop strings of {STOP_CHARS} characters, {BIASES:,} logit biases, {MESSAGES} messages."
    assert fixed in PAGE


def test_the_metrics_are_those_of_the_page(server: Listening):
    server.post("/v1/chat/completions", chat("Hi", tokens=3))
    found = set(re.findall(r"^# HELP (posttrain_\w+)", server.get("/metrics").text, re.MULTILINE))
    told = quoted(section("Metrics").split("`model` is")[0]) - {"model", "status"}
    assert {name for name in found if not name.endswith("_created")} == told


def test_the_curl_example_is_answered(server: Listening):
    (line,) = [line for line in PAGE.splitlines() if line.startswith("curl ")]
    words = shlex.split(line)
    body = json.loads(words[words.index("-d") + 1])
    assert words[1].endswith("/v1/chat/completions")
    assert server.post("/v1/chat/completions", body | {"model": BASE}).status_code == 200


def test_the_openai_example_runs(tiny: BaseModel, server: Listening):
    (code,) = re.findall(r"^```python\n(.*?)^```$", PAGE, re.MULTILINE | re.DOTALL)
    code = code.replace("http://127.0.0.1:8000", server.url).replace('"dpo"', f'"{BASE}"') + "\nclient.close()\n"
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(code, "serving.md", "exec"), {})
    assert printed.getvalue() == alone(tiny, "Hi", 32)


def test_the_page_to_try_policies_on_comes_with_a_policy_of_its_own(server: Listening):
    response = server.get("/")
    if not PLAYGROUND.is_file():
        assert response.status_code == 404
        return
    page = PLAYGROUND.read_text(encoding="utf-8")
    assert response.text == page
    assert response.headers["content-type"] == "text/html; charset=utf-8"
    assert response.headers["content-security-policy"] == page_policy(page)
