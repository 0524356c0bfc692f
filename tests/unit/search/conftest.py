"""No test leaves a database open."""

from collections.abc import Iterator

import pytest

from .builders import close_storages


@pytest.fixture(autouse=True)
def closed_storages() -> Iterator[None]:
    """Close the storages of a test after it."""
    yield
    close_storages()
