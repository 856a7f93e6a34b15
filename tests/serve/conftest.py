"""What the tests of a server's adapters share."""

from collections.abc import Iterator

import pytest

from posttrain.models.load import BaseModel


@pytest.fixture
def base(tiny: BaseModel) -> Iterator[BaseModel]:
    """The shared tiny base; adapters of a test are forgotten after it."""
    yield tiny
    for name in tiny.adapters.names():
        tiny.adapters.remove(name)
