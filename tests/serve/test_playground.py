"""The playground in headless Chromium: what it asks, what it shows, and that texts of models and people stay texts."""

import json
import re
import threading
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hostile_texts import HOSTILE_TEXTS
from stand_in import PAGE, StandIn, piece, sse, standing_in, whole

from browsers import IN_CHROMIUM, until

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = IN_CHROMIUM


@pytest.fixture
def server() -> Iterator[StandIn]:
    with standing_in() as made:
        yield made


class Visit:
    """One open page: what the browser said, and what it asked for."""

    def __init__(self, page: "Page", url: str) -> None:
        self.page, self.url = page, url
        self.said: list[str] = []
        self.requests: list[str] = []
        page.on("console", lambda message: self.said.append(message.text))
        page.on("pageerror", lambda error: self.said.append(str(error)))
        page.on("dialog", self._dialog)
        page.on("request", lambda request: self.requests.append(request.url.removeprefix(url)))
        page.goto(url)
        self.until("document.getElementById('status').textContent !== ''")

    def until(self, expression: str) -> None:
        """Wait until an expression is true."""
        try:
            until(self.page, expression)
        except AssertionError as error:
            error.add_note(f"status {self.status!r}, problems {self.texts('.problem')}")
            raise

    def _dialog(self, dialog: Any) -> None:
        self.said.append(f"dialog {dialog.message}")
        dialog.dismiss()

    def send(self, text: str, *, answers: int = 1) -> None:
        """Ask and wait for so many more answers to end."""
        before = self.page.locator(".answer").count()
        self.write(text)
        self.page.locator("#prompt").press("Enter")
        self.until(f"document.querySelectorAll('.answer[aria-busy=false]').length === {before + answers}")
        self.until("document.getElementById('stop').disabled")

    def write(self, text: str) -> None:
        """Put any text into the box: it travels as ASCII."""
        self.page.locator("#prompt").evaluate("(box, text) => { box.value = JSON.parse(text); }", json.dumps(text))

    def texts(self, selector: str) -> list[str]:
        """The texts of elements, to the last letter."""
        script = "s => JSON.stringify([...document.querySelectorAll(s)].map((one) => one.textContent))"
        found: list[str] = json.loads(self.page.evaluate(script, selector))
        return found

    @property
    def status(self) -> str:
        return self.texts("#status")[0]


@pytest.fixture
def visit(browser: "Browser", server: StandIn) -> Iterator[Callable[..., Visit]]:
    """Opens the page; at the end nothing was said on the console and nothing asked for but what the page needs."""
    opened: list[Visit] = []

    def make(**options: Any) -> Visit:
        opened.append(Visit(browser.new_page(**options), server.url))
        return opened[-1]

    yield make
    for one in opened:
        assert [line for line in one.said if "Failed to load resource" not in line] == []  # a refusal that a test wanted
        assert set(one.requests) <= {"", "v1/models", "v1/chat/completions"}
        one.page.close()
    assert {path for path, _, _ in server.asked} <= {"/", "/v1/models", "/v1/chat/completions", "/favicon.ico"}


def bodies(server: StandIn) -> list[dict[str, Any]]:
    return [body for path, _, body in server.asked if path == "/v1/chat/completions"]


# --- texts stay texts -------------------------------------------------------------------------------------------------


def test_hostile_texts_are_shown_and_sent_to_the_letter_and_do_nothing(server: StandIn, visit: Callable[..., Visit]):
    assert len(HOSTILE_TEXTS) >= 120
    server.policy = None  # what the policy would stop must not be tried in the first place
    server.models = ["<img src=/leak onerror=pwned=1>", "sft\u202e"]
    server.reply = lambda body: whole(body["messages"][-1]["content"] + "!")
    seen = visit()
    seen.page.select_option("#model-b", index=2)
    names = "JSON.stringify(Object.getOwnPropertyNames(window).sort())"
    before = seen.page.evaluate(names)
    for text in HOSTILE_TEXTS:
        seen.page.evaluate("document.getElementById('clear').click()")
        seen.send(text, answers=2)
        assert seen.texts(".asked .text") == [text]
        assert seen.texts(".answer .text") == [f"{text}!"] * 2
        assert seen.texts(".problem") == ["", ""]
    assert seen.said == []
    assert seen.page.evaluate("typeof pwned") == "undefined"
    assert seen.page.evaluate(names) == before
    assert seen.requests.count("v1/chat/completions") == 2 * len(HOSTILE_TEXTS)
    assert seen.requests[:2] == ["", "v1/models"]
    assert [body["messages"] for body in bodies(server)[::2]] == [[{"role": "user", "content": t}] for t in HOSTILE_TEXTS]
    assert seen.texts(".answer h2") == server.models
    assert elements(seen) == ["section.turn", "div.asked", "div.text", "div.answers", *CARD, *CARD]


CARD = ["article.answer", "h2.", "div.text", "p.figures", "p.problem"]


def elements(seen: Visit) -> list[str]:
    """Every element that answers have made, with its class; none may have an attribute more."""
    found: list[list[Any]] = seen.page.evaluate(
        "[...document.querySelectorAll('#log *')].map((e) => [`${e.localName}.${e.className}`, e.getAttributeNames()])"
    )
    assert {name for _, names in found for name in names} <= {"class", "aria-busy"}
    return [element for element, _ in found]


def test_hostile_errors_are_shown_to_the_letter(server: StandIn, visit: Callable[..., Visit]):
    seen = visit()
    for number, text in enumerate(HOSTILE_TEXTS[::9]):
        error = {"error": {"message": text, "type": "invalid_request_error", "param": None, "code": None}}
        server.reply = [lambda body, e=error: (400, {}, json.dumps(e).encode()), lambda body, e=error: [sse(e)]][number % 2]
        seen.page.evaluate("document.getElementById('clear').click()")
        seen.send("Hi")
        assert seen.texts(".problem") == [text + (" (HTTP 400)" if number % 2 == 0 else "")]
    assert elements(seen) == ["section.turn", "div.asked", "div.text", "div.answers", *CARD]


def test_the_page_is_one_file_without_handlers_styles_or_addresses():
    markup = PAGE.split("<body>")[1].split("<script>")[0] + PAGE.split("</script>")[1]
    assert [PAGE.count(f"<{tag}>") for tag in ("script", "style")] == [1, 1]
    assert re.findall(r"\b(?:src|href|style|on\w+)=|https?:|url\(|@import", markup) == []
    unsafe = (
        r"innerHTML|outerHTML|insertAdjacent|document\.write|createContextual|setHTML|eval\(|Function\(|Storage|cookie|https?:"
    )
    assert re.findall(unsafe, PAGE) == []


def test_the_last_stage_of_a_run_is_chosen_at_first(server: StandIn, visit: Callable[..., Visit]):
    """Not the base, whose answers do not end."""
    server.models, server.parents = ["base", "dpo", "sft"], {"sft": "base", "dpo": "sft"}
    seen = visit()
    assert [seen.page.locator(f"#model-{place}").input_value() for place in "ab"] == ["dpo", ""]


# --- a conversation ---------------------------------------------------------------------------------------------------


def test_two_models_answer_side_by_side_each_in_its_own_conversation(server: StandIn, visit: Callable[..., Visit]):
    server.reply = lambda body: whole(f"{body['model']} says {len(body['messages'])}", tokens=4)
    seen = visit()
    assert seen.status == "2 models are served."
    seen.send("Hi")  # one model is chosen at first
    seen.page.select_option("#model-b", "sft")
    seen.page.locator("summary").click()
    seen.page.fill("#system", "Be brief.")
    seen.page.fill("#temperature", "0")
    seen.page.fill("#max-tokens", "7")
    seen.send("Why?", answers=2)
    assert seen.texts(".answer h2") == ["base", "base", "sft"]
    assert seen.texts(".answer .text") == ["base says 1", "base says 4", "sft says 2"]
    first, *others = bodies(server)
    settings = {"stream": True, "stream_options": {"include_usage": True}}
    asked = [{"role": "user", "content": "Hi"}]
    assert first == {"model": "base", "messages": asked, "temperature": 0.7, "max_tokens": 256, **settings}
    system, why = {"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}
    told = [system, *asked, {"role": "assistant", "content": "base says 1"}, why]
    assert sorted(others, key=lambda body: body["model"]) == [
        {"model": "base", "messages": told, "temperature": 0, "max_tokens": 7, **settings},
        {"model": "sft", "messages": [system, why], "temperature": 0, "max_tokens": 7, **settings},
    ]
    for figures in seen.texts(".figures"):
        assert re.match(r"4 tokens · first after \d+\.\d\d s", figures)
    assert seen.status == "Answered."


def test_figures_are_what_the_server_counted(server: StandIn, visit: Callable[..., Visit]):
    gate = threading.Event()

    def slowly(body: dict[str, Any]) -> Iterator[bytes]:
        yield sse(piece("a"))
        gate.wait(10)
        yield sse(piece("b"), {"choices": [{"delta": {}, "finish_reason": "length"}]})
        yield sse({"choices": [], "usage": {"completion_tokens": 101}}, "[DONE]")

    server.reply = slowly
    seen = visit()
    seen.write("Hi")
    seen.page.locator("#prompt").press("Enter")
    seen.until("document.querySelector('.answer .text')?.textContent === 'a'")
    assert seen.status == "Answering…"
    seen.page.wait_for_timeout(50)
    gate.set()
    seen.page.wait_for_selector(".answer[aria-busy=false]")
    count, first, rate, cut = seen.texts(".figures")[0].split(" · ")
    assert (count, cut) == ("101 tokens", "cut at the most tokens")
    assert re.fullmatch(r"first after \d+\.\d\d s", first)
    assert 0 < float(rate.removesuffix(" tokens/s")) < 100 / 0.05


def endless(body: dict[str, Any]) -> Iterator[bytes]:
    pause = threading.Event()
    for number in range(10_000):
        yield sse(piece(f"{number} "))
        pause.wait(0.01)


@pytest.mark.parametrize("way", ["button", "Escape", "clear"])
def test_an_answer_can_be_stopped(server: StandIn, visit: Callable[..., Visit], way: str):
    server.reply = endless
    seen = visit()
    seen.write("Count")
    seen.page.locator("#prompt").press("Enter")
    seen.until("document.querySelector('.answer .text')?.textContent.startsWith('0 1 ')")
    assert seen.page.is_disabled("#send")
    if way == "Escape":
        seen.page.keyboard.press("Escape")
    else:
        seen.page.click("#stop" if way == "button" else "#clear")
    assert server.left.wait(30), "the connection was not closed"
    seen.until("document.getElementById('stop').disabled")
    server.reply = lambda body: whole("Well.")
    if way == "clear":
        assert seen.status == "Cleared."
        seen.send("Hi")
        assert bodies(server)[-1]["messages"] == [{"role": "user", "content": "Hi"}]
        return
    assert seen.texts(".problem") == ["Stopped."]
    assert seen.status == "Stopped."
    kept = seen.texts(".answer .text")[0]
    seen.send("Go on")
    assert bodies(server)[-1]["messages"][:2] == [
        {"role": "user", "content": "Count"}, {"role": "assistant", "content": kept},
    ]  # fmt: skip


def test_the_keyboard_is_enough(server: StandIn, visit: Callable[..., Visit]):
    seen = visit()
    assert seen.page.evaluate("document.activeElement.id") == "prompt"
    seen.page.keyboard.type("one")
    seen.page.keyboard.press("Shift+Enter")
    seen.page.keyboard.type("two")
    seen.page.keyboard.press("Enter")
    seen.page.wait_for_selector(".answer[aria-busy=false]")
    assert bodies(server)[0]["messages"] == [{"role": "user", "content": "one\ntwo"}]
    seen.page.keyboard.type("three")
    seen.page.keyboard.press("Tab")
    assert seen.page.evaluate("document.activeElement.id") == "send"
    seen.page.keyboard.press("Space")
    seen.until("document.querySelectorAll('.answer[aria-busy=false]').length === 2")
    for _ in range(2):  # an empty message is not sent
        seen.page.locator("#prompt").press("Enter")
    assert len(bodies(server)) == 2
    unnamed = "[...document.querySelectorAll('input, select, textarea')].filter((one) => !one.labels.length).length"
    assert seen.page.evaluate(unnamed) == 0


# --- what goes wrong --------------------------------------------------------------------------------------------------


def test_errors_say_what_the_server_said_and_leave_the_conversation_as_it_was(server: StandIn, visit: Callable[..., Visit]):
    seen = visit()
    full = {"error": {"message": "2 completions wait", "type": "rate_limit_error", "param": None, "code": None}}
    replies: list[tuple[Any, str]] = [
        ((429, {"Retry-After": "3"}, json.dumps(full).encode()), "2 completions wait (HTTP 429; try again in 3 s)"),
        ((502, {}, b"<html>bad gateway</html>"), "The server gave no reason. (HTTP 502)"),
        ([sse(piece("Half")), sse(full)], "2 completions wait"),
        ([sse(piece("Half"))], "The connection ended before the answer did."),
    ]
    for reply, words in replies:
        server.reply = lambda body, reply=reply: reply
        seen.send("Hi")
        assert seen.texts(".problem")[-1] == words
        assert seen.status == "An error: not part of the conversation."
        assert seen.page.input_value("#prompt") == "Hi"  # to send again
    server.reply = lambda body: whole("Well.")
    seen.send("Hi")
    assert bodies(server)[-1]["messages"] == [{"role": "user", "content": "Hi"}]


def test_a_server_that_is_gone_is_said_to_be(visit: Callable[..., Visit]):
    seen = visit()
    seen.page.route("**/v1/chat/completions", lambda route: route.abort())
    seen.send("Hi")
    assert seen.texts(".problem") == ["The server cannot be reached."]


def test_a_key_is_sent_and_kept_nowhere(server: StandIn, visit: Callable[..., Visit]):
    refused = {"error": {"message": "no key", "type": "authentication_error", "param": None, "code": None}}
    server.models = (401, {}, json.dumps(refused).encode())
    seen = visit()
    assert seen.status == "no key (HTTP 401)"
    server.models = ["sft"]
    seen.page.fill("#key", " secret-1 ")
    seen.page.locator("#key").press("Tab")
    seen.until("document.getElementById('status').textContent === '1 model is served.'")
    seen.send("Hi")
    assert [headers.get("Authorization") for _, headers, _ in server.asked] == [None, None, *["Bearer secret-1"] * 2]
    assert all("secret" not in url for url in seen.requests)
    assert seen.page.evaluate("[document.cookie, localStorage.length, sessionStorage.length]") == ["", 0, 0]
    seen.page.reload()
    assert seen.page.input_value("#key") == ""
    seen.page.locator("summary").click()
    seen.page.fill("#key", "schlüssel")
    seen.send("Hi")
    assert seen.texts(".problem") == ["The key has characters that no key has."]
    assert len(bodies(server)) == 1


def test_settings_that_cannot_be_are_not_sent(server: StandIn, visit: Callable[..., Visit]):
    seen = visit()
    seen.page.locator("summary").click()
    for field, value in (("#temperature", "-1"), ("#temperature", ""), ("#max-tokens", "0"), ("#max-tokens", "1.5")):
        before = seen.page.input_value(field)
        seen.page.fill(field, value)
        seen.write("Hi")
        seen.page.locator("#prompt").press("Enter")
        assert seen.page.evaluate("document.activeElement.id") == field[1:]
        assert seen.status != "Answering…"
        seen.page.fill(field, before)
    assert bodies(server) == []


# --- how it looks -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [1280, 390, 320])
def test_it_fits_the_screen_light_and_dark(server: StandIn, visit: Callable[..., Visit], width: int):
    server.reply = lambda body: whole("x" * 400 + " word" * 200 + "\n" * 30)
    colours = set()
    for scheme in ("light", "dark"):
        seen = visit(viewport={"width": width, "height": 700}, color_scheme=scheme)
        seen.page.select_option("#model-b", "sft")
        seen.send("y" * 300, answers=2)
        view = "document.getElementById('view')"
        assert seen.page.evaluate(f"{view}.scrollHeight - {view}.scrollTop - {view}.clientHeight") < 2  # the newest is in sight
        seen.page.locator("summary").click()
        assert seen.page.evaluate("document.documentElement.scrollWidth") <= width
        assert seen.page.evaluate("document.documentElement.scrollHeight") <= 700
        box = seen.page.locator("#send").bounding_box()
        assert box is not None
        assert box["y"] + box["height"] <= 700
        first, second = (seen.page.locator(".answer").nth(place).bounding_box() for place in (0, 1))
        assert first is not None
        assert second is not None
        assert (first["y"] == second["y"]) == (width > 700)  # side by side, or one below the other
        colours.add(seen.page.evaluate("getComputedStyle(document.body).backgroundColor"))
    assert len(colours) == 2
