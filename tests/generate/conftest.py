"""Fixtures of the engine tests."""

import pytest

from posttrain.generate import engine as engine_module


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps that take 48 tokens of prompts."""
    monkeypatch.setitem(engine_module.PREFILL_TOKENS, "cpu", 48)
    monkeypatch.setitem(engine_module.SERVED_PREFILL_TOKENS, "cpu", 48)
