"""Tests in headless Chromium, and why they are skipped where there is none."""

import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

NO_BROWSER = "no Chromium: run scripts/install-browser (as root), or apt-get install chromium"


def _installed() -> str | None:
    """Debian's Chromium, or the one that Playwright installed."""
    debian = shutil.which("chromium") or shutil.which("chromium-browser")
    if debian is not None:
        return debian
    own = sorted(Path.home().glob(".cache/ms-playwright/chromium-*/chrome-linux*/chrome"))
    return str(own[-1]) if own else None


CHROMIUM = _installed()
IN_CHROMIUM = [
    pytest.mark.browser,
    pytest.mark.skipif(CHROMIUM is None, reason=NO_BROWSER),
]


@contextmanager
def chromium() -> Iterator["Browser"]:
    """A browser for the length of a block."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of playwright's own
        from playwright.sync_api import sync_playwright
    with sync_playwright() as play:
        browser = play.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        yield browser
        browser.close()


def until(page: "Page", expression: str) -> None:
    """Wait until an expression is true. Playwright's own waiting evaluates texts in the page, which a strict policy forbids."""
    for _ in range(1500):
        if page.evaluate(expression):
            return
        page.wait_for_timeout(20)
    raise AssertionError(f"never true: {expression}")
