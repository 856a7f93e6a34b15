"""The playground from the real server, in headless Chromium, under the content security policy that the server sends."""

from typing import TYPE_CHECKING

from listening import BASE, alone, listening

from browsers import IN_CHROMIUM, until
from posttrain.models.base_model import BaseModel

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = IN_CHROMIUM


def test_the_page_streams_what_the_model_says(browser: "Browser", tiny: BaseModel):
    said: list[str] = []
    with listening(tiny) as server:
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
        page.close()
    answer = alone(tiny, "Hi", 8)
    assert answer.strip()
    assert answer.strip() in shown
    assert said == []
