"""The page in headless Chromium: wide and narrow, light and dark; no error, no request, nothing wider than the screen."""

from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from planted_texts import HOSTILE, planted

from browsers import IN_CHROMIUM
from posttrain.report.render import write_report
from tiny_runs import copied_run, finished_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = IN_CHROMIUM


def visit(browser: "Browser", page_file: Path, width: int, scheme: str) -> tuple[list[str], list[str], int, str]:
    """Console messages and errors, requests, the document's width, and the background's colour, with all details open."""
    page = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)  # type: ignore[arg-type]
    said: list[str] = []
    asked: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.on("dialog", lambda dialog: said.append(dialog.message))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(page_file.as_uri())
    page.evaluate("document.querySelectorAll('details').forEach(one => one.open = true)")
    wide = page.evaluate("document.documentElement.scrollWidth")
    colour = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.close()
    return said, [url for url in asked if url != page_file.as_uri() and not url.startswith("data:")], wide, colour


@pytest.mark.parametrize("width", [1280, 400])
def test_it_reads_light_and_dark_without_errors_requests_or_overflow(browser: "Browser", width: int):
    seen = {scheme: visit(browser, finished_run() / "report.html", width, scheme) for scheme in ("light", "dark")}
    for said, asked, wide, _ in seen.values():
        assert said == []
        assert asked == []
        assert wide <= width
    assert seen["light"][3] != seen["dark"][3]


def test_hostile_texts_do_nothing_in_a_real_browser(browser: "Browser", tmp_path: Path):
    run = planted(copied_run(tmp_path / "run"), HOSTILE)
    said, asked, wide, _ = visit(browser, write_report(run), 400, "light")
    assert said == []
    assert asked == []
    assert wide <= 400
