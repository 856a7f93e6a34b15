"""The playground from the real server, in headless Chromium, under the content security policy that the server sends."""

import shutil
import warnings
from typing import TYPE_CHECKING

import pytest
from listening import BASE, alone, listening

from posttrain.models.load import BaseModel

if TYPE_CHECKING:
    from playwright.sync_api import Page

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
pytestmark = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason="chromium is not installed (apt-get install chromium)"),
]


def until(page: "Page", expression: str) -> None:
    """Wait until an expression is true. Playwright's own waiting evaluates texts in the page, which the policy forbids."""
    for _ in range(1500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {expression}")


def test_the_page_streams_what_the_model_says(tiny: BaseModel):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of playwright's own
        from playwright.sync_api import sync_playwright
    said: list[str] = []
    with listening(tiny) as server, sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.goto(server.url)
        until(page, f"document.getElementById('model-a').value === '{BASE}'")
        page.evaluate("document.getElementById('settings').open = true")
        page.locator("#temperature").fill("0")
        page.locator("#max-tokens").fill("8")
        page.locator("#prompt").fill("Hi")
        page.locator("#prompt").press("Enter")
        until(page, "document.querySelectorAll('.answer[aria-busy=false]').length === 1")
        shown = page.locator(".answer").inner_text()
        browser.close()
    answer = alone(tiny, "Hi", 8)
    assert answer.strip()
    assert answer.strip() in shown
    assert said == []
