"""Tests of tuner.search.urls: no secret of a storage URL is shown."""

import pytest

from tuner.errors import StorageError
from tuner.search.storage import find_database
from tuner.search.urls import mask_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h/db", "postgresql://***@h/db"),
        ("postgresql://u:sec/ret@se@cret@h:1/db", "postgresql://***@h:1/db"),
        ("postgresql://u:sec\nret@h/db", "postgresql://***@h/db"),
        ("u:secret@h/db", "u:***@h/db"),
        ("postgresql:u:secret@h", "postgresql:***@h"),
        ("redis://:secret@h", "redis://***@h"),
        ("mysql+x://h/db?password=secret&ssl=secret", "mysql+x://h/db?password=***&ssl=***"),
        ("sqlite://u:secret@/x.db", "sqlite://***@/x.db"),
        ("sqlite:///x.db?password=secret", "sqlite:///x.db?password=***"),
    ],
)
def test_find_database_refuses_secrets_and_prints_none(url: str, shown: str) -> None:
    """Whatever a URL looks like, what could be a password in it is neither printed nor used."""
    with pytest.raises(StorageError, match="storage: must be an SQLite URL") as caught:
        find_database(url)
    assert f"got '{shown}'" in str(caught.value)
    assert "secret" not in str(caught.value)


def test_mask_leaves_paths_alone() -> None:
    """An "@" in a path is no login."""
    assert mask_secrets("sqlite:////home/a@b/c:d@e.db") == "sqlite:////home/a@b/c:d@e.db"
