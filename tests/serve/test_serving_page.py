"""docs/serving.md tells what the server does: routes, fields, limits, metrics, and examples that run."""

import contextlib
import io
import json
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from adapter_folders import write_adapter
from listening import BASE, Listening, alone, chat, listening

from posttrain.cli import build_parser
from posttrain.models.base_model import BaseModel
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

PLACE = Path(__file__).parents[2] / "docs"
PAGE = (PLACE / "serving.md").read_text(encoding="utf-8")


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
    ignored, refused = (row for row in text.splitlines() if "| ignored" in row or "| refused with 400, except" in row)
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
    fixed = f"at most {STOPS} stop strings of {STOP_CHARS} characters, {BIASES:,} logit biases, {MESSAGES} messages"
    assert fixed in PAGE


def test_the_metrics_are_those_of_the_page(server: Listening):
    server.post("/v1/chat/completions", chat("Hi", tokens=3))
    found = set(re.findall(r"^# HELP (posttrain_\w+)", server.get("/metrics").text, re.MULTILINE))
    told = quoted(section("Metrics").split("`model` is")[0]) - {"model", "status"}
    assert {name for name in found if not name.endswith("_created")} == told


CURLS = [
    (page.name, line)
    for page in (*sorted(PLACE.glob("*.md")), PLACE.parent / "README.md")
    for line in page.read_text(encoding="utf-8").splitlines()
    if line.startswith("curl ")
]


@pytest.mark.skipif(shutil.which("curl") is None, reason="there is no curl")
@pytest.mark.parametrize(("page", "line"), CURLS)
def test_a_curl_command_is_answered_as_it_is_written(base: BaseModel, tmp_path: Path, page: str, line: str):
    """By a server that has a policy of the name; nothing is changed but the port."""
    assert line.count("http://127.0.0.1:8000/") == 1
    with listening(base, adapters={"dpo": write_adapter(tmp_path / "dpo", base, 1)}) as server:
        command = shlex.split(line.replace("http://127.0.0.1:8000", server.url))
        done = subprocess.run([*command, "-sS", "--fail-with-body"], capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    answer = json.loads(done.stdout)
    assert answer["model"] == "dpo"
    assert answer["choices"][0]["finish_reason"] in ("stop", "length")
    assert answer["usage"]["completion_tokens"]  # one that ends the turn at once leaves no text


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
