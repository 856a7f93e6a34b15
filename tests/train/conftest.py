"""The tiny base for training tests: whatever a test trains is undone after it."""

from collections.abc import Iterator

import pytest

from posttrain.models.adapter_files import reload_base
from posttrain.models.base_model import BaseModel


@pytest.fixture
def base(base: BaseModel) -> Iterator[BaseModel]:
    """The tiny base, put back after the test."""
    yield base
    base.model.requires_grad_(False)
    reload_base(base)
