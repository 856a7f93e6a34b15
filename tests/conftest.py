"""What all tests share: no network, a cache of their own, one thread (tiny models are slower on two), one tiny base."""

import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

from browsers import NO_BROWSER, chromium

if TYPE_CHECKING:
    from playwright.sync_api import Browser

    from posttrain.models.base_model import BaseModel

# Read by libraries when they are imported, and inherited by the processes that tests start.
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Converted and made-up models go into a folder of this session, not into the user's cache."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("POSTTRAIN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="session")
def tiny(own_cache: None) -> "BaseModel":
    """The tiny random-weight Llama, float32 on the CPU. Whoever changes its weights puts them back."""
    from posttrain.models.base_model import load_base

    return load_base("random:tiny", template="gemma", dtype="float32", device="cpu")


@pytest.fixture
def base(tiny: "BaseModel") -> Iterator["BaseModel"]:
    """The shared tiny base; adapters of a test are forgotten after it."""
    yield tiny
    for name in tiny.adapters.names():
        tiny.adapters.remove(name)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Headless Chromium, for tests that bear the marks `browsers.IN_CHROMIUM`."""
    with chromium() as started:
        yield started


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The last lines say which tests were skipped for want of a browser: a green run must not hide them."""
    skipped = [report for report in terminalreporter.stats.get("skipped", []) if NO_BROWSER in str(report.longrepr)]
    if skipped:
        terminalreporter.write_line(f"{len(skipped)} browser tests were skipped · {NO_BROWSER}", yellow=True)
