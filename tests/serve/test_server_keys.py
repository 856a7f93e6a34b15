"""Who may ask: every route by every method, with and without a key; names of the machine; what the answers forbid browsers."""

import asyncio
import base64
import os
import re
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from listening import BASE, Listening, chat, listening

from posttrain.cli import main
from posttrain.generate.engine import ROWS
from posttrain.models.base_model import BaseModel
from posttrain.serve.app import page_policy
from posttrain.serve.keys import KeyFile, add_key
from posttrain.serve.middleware import ADMIN_PATHS, OPEN_PATHS

# Every route of the application, with the scope that it needs. A route that is not in here fails the test below.
ROUTES = {
    ("GET", "/health"): None,
    ("GET", "/ready"): "use",
    ("GET", "/metrics"): "use",
    ("GET", "/openapi.json"): "use",
    ("GET", "/v1/models"): "use",
    ("GET", "/v1/models/{model:path}"): "use",
    ("POST", "/v1/chat/completions"): "use",
    ("POST", "/v1/completions"): "use",
    ("POST", "/tokenize"): "use",
    ("POST", "/detokenize"): "use",
    ("POST", "/v1/load_lora_adapter"): "admin",
    ("POST", "/v1/unload_lora_adapter"): "admin",
}
METHODS = ("GET", "HEAD", "POST", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE")


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """A file of keys, a key for use and one for everything."""
    path = tmp_path_factory.mktemp("keys") / "keys.json"
    return path, add_key(path, "ann", ("use",)), add_key(path, "root", ("use", "admin"))


@pytest.fixture(scope="module")
def server(tiny: BaseModel, keys: tuple[Path, str, str]) -> Iterator[Listening]:
    with listening(tiny, keys=KeyFile(keys[0])) as running:
        yield running


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def concrete(path: str) -> str:
    return path.replace("{model:path}", BASE)


def test_every_route_is_in_the_table(server: Listening):
    found = {
        (method, route.path)
        for route in server.routes
        for method in route.methods - {"HEAD"}  # the framework adds it to its own
    }
    assert found - {("GET", "/")} == set(ROUTES)  # the page is there where its file is
    assert {path for (_, path), scope in ROUTES.items() if scope == "admin"} == ADMIN_PATHS
    assert {path for (_, path), scope in ROUTES.items() if scope is None} == OPEN_PATHS


@pytest.mark.parametrize("path", [*sorted({path for _, path in ROUTES} - {"/health"}), "/", "/docs", "/nothing", "//health"])
def test_nothing_answers_without_a_key(server: Listening, path: str, keys: tuple[Path, str, str]):
    wrong = [
        {},
        {"authorization": "Bearer"},
        bearer("wrong"),
        bearer(keys[1][:-1]),
        {"authorization": f"Basic {keys[1]}"},
        bearer("é"),
    ]
    wrong += [{"authorization": keys[1]}, {"x-api-key": keys[1]}, {"cookie": f"key={keys[1]}"}]
    with httpx.Client(base_url=server.url) as client:
        for method in METHODS:
            for headers in wrong:
                sent = {name: value.encode("utf-8") for name, value in headers.items()}
                response = client.request(method, server.url + concrete(path), headers=sent, params={"key": keys[1]})
                assert response.status_code == 401, (method, headers)
                assert response.headers["www-authenticate"].startswith("Basic realm=" if path == "/" else "Bearer")
                assert method == "HEAD" or response.json()["error"]["code"] == "invalid_api_key"


@pytest.mark.parametrize("path", [path for _, path in sorted(ROUTES) if path != "/health"])
def test_a_key_as_a_password_opens_the_page_alone(server: Listening, path: str, keys: tuple[Path, str, str]):
    """A browser asks for it where it opens an address; anywhere else, a page of another site could use what it remembers."""
    for user in ("", "anybody"):
        assert httpx.get(server.url + "/", auth=(user, keys[1])).status_code == 200
        assert httpx.get(server.url + concrete(path), auth=(user, keys[1])).status_code == 401
    for given in ("Basic", "Basic !", "Basic /w==", "Basic " + base64.b64encode(keys[1].encode()).decode()):
        assert httpx.get(server.url + "/", headers={"authorization": given}).status_code == 401


def test_health_alone_is_open(server: Listening):
    assert server.get("/health").json() == {"status": "ok"}


@pytest.mark.parametrize(("method", "path"), sorted(ROUTES))
def test_a_key_opens_what_its_scope_says(server: Listening, method: str, path: str, keys: tuple[Path, str, str]):
    statuses = []
    for key in keys[1:]:
        body = {} if method == "POST" else None
        statuses.append(httpx.request(method, server.url + concrete(path), headers=bearer(key), json=body).status_code)
    inside = 400 if method == "POST" else 200  # an empty request is the route's business
    assert statuses == [403 if ROUTES[method, path] == "admin" else inside, inside]


def test_a_key_in_a_request_is_not_in_the_answer(server: Listening, keys: tuple[Path, str, str]):
    for headers in (bearer(keys[1]), bearer(keys[1] + "x")):
        for body in (chat("Hi", model=keys[1][:5]), {"model": 3}):
            assert keys[1] not in server.post("/v1/chat/completions", body, headers=headers).text


def test_who_floods_the_server_waits_behind_himself(
    tiny: BaseModel, keys: tuple[Path, str, str], monkeypatch: pytest.MonkeyPatch
):
    """Few places in the engine, many long requests of one key, then a short one of another: it is one of the first to end."""
    monkeypatch.setitem(ROWS, "cpu", 4)
    ended: list[str] = []

    async def work(server: Listening) -> None:
        async with httpx.AsyncClient(base_url=server.url, timeout=120) as client:

            async def one(name: str, key: str, tokens: int) -> None:
                body = chat("Hi", tokens=tokens, min_tokens=tokens)
                found = await client.post("/v1/chat/completions", json=body, headers=bearer(key))
                assert found.status_code == 200, found.text
                ended.append(name)

            flood = [asyncio.create_task(one("ann", keys[1], 150)) for _ in range(16)]
            while server.gate.admitted < 16:
                await asyncio.sleep(0.001)
            await asyncio.gather(one("root", keys[2], 5), *flood)

    with listening(tiny, keys=KeyFile(keys[0])) as server:
        asyncio.run(work(server))
    assert "root" in ended[:8]


def test_a_key_that_is_revoked_opens_nothing_any_more_and_what_it_began_ends_well(tiny: BaseModel, tmp_path: Path):
    """The server is not told: it sees that the file is another one."""
    path = tmp_path / "keys.json"
    ann, bob = add_key(path, "ann", ("use",)), add_key(path, "bob", ("use",))
    with listening(tiny, keys=KeyFile(path)) as server, httpx.Client(base_url=server.url, timeout=60) as client:
        body = chat("Hi", tokens=300, min_tokens=300, stream=True)
        with client.stream("POST", "/v1/chat/completions", json=body, headers=bearer(ann)) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert main(["keys", "revoke", str(path), "ann"]) == 0
            assert [server.get("/v1/models", headers=bearer(key)).status_code for key in (ann, bob)] == [401, 200]
            assert "data: [DONE]" in list(lines)
        assert server.post("/v1/chat/completions", chat("Hi"), headers=bearer(ann)).status_code == 401
        cat = add_key(path, "cat", ("use",))
        assert server.get("/v1/models", headers=bearer(cat)).status_code == 200


def test_a_file_that_cannot_be_read_any_more_leaves_the_keys_that_there_were(tmp_path: Path, caplog: pytest.LogCaptureFixture):
    """Told once each time; what is written into the file in place, in the same length and with an old date, is seen."""
    path = tmp_path / "keys.json"
    ann = add_key(path, "ann", ("use",))
    good, before = path.read_text(), path.stat()
    keys = KeyFile(path)

    def check(count: int) -> None:
        for _ in range(3):
            assert keys.check(ann) is not None
        assert len(caplog.messages) == count
        assert all(message.endswith("; the keys that were read last stay valid") for message in caplog.messages)

    check(0)
    path.write_text(good[:-20])
    check(1)
    path.write_text(good)
    check(1)
    path.chmod(0o644)
    check(2)
    path.unlink()
    check(3)
    os.mkfifo(path, 0o600)
    check(4)
    path.unlink()
    path.write_text(good)
    path.chmod(0o600)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - 10**12))
    check(4)
    path.write_text(good.replace('"ann"', '"bob"'))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns - 10**12))
    assert [key.name for key in (keys.check(ann),) if key] == ["bob"]


def test_an_address_that_is_taken_is_told(capsys: pytest.CaptureFixture[str]):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        assert main(["serve", "random:tiny", "--template", "gemma", "--port", str(port)]) == 2
    told = f"error: --host 127.0.0.1 --port {port} · Address already in use · choose another address or port\n"
    assert capsys.readouterr().err == told


def test_without_keys_only_names_of_this_machine_are_heard(tiny: BaseModel):
    """A page whose name was made to point here by its own DNS (rebinding) sends its own name."""
    with listening(tiny) as server:
        for host in ("127.0.0.1", "localhost", "LOCALHOST:8000", "[::1]:8000"):
            assert server.get("/v1/models", headers={"host": host}).status_code == 200
        for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", "", "localhost.evil.example"):
            response = server.get("/v1/models", headers={"host": host})
            assert (response.status_code, response.json()["error"]["type"]) == (403, "permission_error")


def test_every_answer_forbids_browsers_what_they_do_not_need(server: Listening):
    for response in (server.get("/health"), server.get("/v1/models"), server.post("/v1/completions", {})):
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["cache-control"] == "no-store"
        assert response.headers["content-security-policy"] == "default-src 'none'; frame-ancestors 'none'"
        assert "server" not in response.headers
        assert "access-control-allow-origin" not in response.headers


def test_the_pages_own_script_and_style_are_allowed_by_hash():
    """sha256 of "a" in base64, as OpenSSL says it."""
    policy = page_policy("<style>a</style><p>x</p><script>a</script>")
    digest = "'sha256-ypeBEsobvcr6wjGzmiPcTaeG7/gUfE5yuYB3ha/uSLs='"
    assert f"script-src {digest};" in policy
    assert f"style-src {digest};" in policy
    assert re.findall(r"unsafe|\*|https?:", policy) == []


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.0.2.1", "example.com"])
def test_an_address_that_others_reach_needs_keys(host: str, capsys: pytest.CaptureFixture[str]):
    assert main(["serve", "random:tiny", "--host", host]) == 2
    told = capsys.readouterr().err
    assert told.startswith(f"error: --host {host} · can be reached from other machines, and there are no keys")


def test_a_missing_package_is_named():
    code = (
        "import sys; from importlib.machinery import PathFinder as P; found = P.find_spec\n"
        "P.find_spec = classmethod(lambda c, n, *a: None if n in ('fastapi', 'uvicorn') else found(n, *a))\n"
        "from posttrain.cli import main; sys.exit(main(['serve', 'random:tiny']))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == 'error: posttrain serve · fastapi, uvicorn not installed · pip install "posttrain[serve]"\n'
