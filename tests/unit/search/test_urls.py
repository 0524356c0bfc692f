"""Tests of tuner.search.urls: no secret of a storage URL is shown."""

import pytest

from tuner.errors import StorageError
from tuner.search.storage import find_database
from tuner.search.urls import is_file_url, mask_secrets


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("postgresql://u:secret@h/db", "postgresql://***"),
        ("postgresql://u:sec/ret@se@cret@h:1/db", "postgresql://***"),
        ("postgresql://u:sec\nret@h/db", "postgresql://***"),
        ("postgresql://h/secret", "postgresql://***"),
        ("u:secret@h/db", "***"),
        ("postgresql:u:secret@h", "***"),
        ("u:secret://h", "***"),
        ("redis://:secret@h", "redis://***"),
        ("mysql+x://h/db?password=secret&ssl=secret", "mysql+x://***"),
        ("mysql+x://h/db?password=secret&secret", "mysql+x://***"),
        ("sqlite://u:secret@/x.db", "sqlite://***"),
        ("sqlite:///x.db?password=secret", "sqlite:///x.db?***"),
        ("sqlite:///x.db?password=sec&secret", "sqlite:///x.db?***"),
    ],
)
def test_find_database_refuses_secrets_and_prints_none(url: str, shown: str) -> None:
    """Whatever a URL looks like, what could be a password in it is neither printed nor used."""
    with pytest.raises(StorageError, match="storage: must be an SQLite URL") as caught:
        find_database(url)
    assert f"got '{shown}'" in str(caught.value)
    assert "secret" not in str(caught.value)
    assert not is_file_url(url)


@pytest.mark.parametrize("url", ["sqlite:////home/a@b/c:d@e.db", "studies.db", "/data/my-studies.sqlite3"])
def test_mask_leaves_paths_alone(url: str) -> None:
    """An "@" in a path is no login, and a path in place of a URL is shown, so that its user sees what is missing."""
    assert mask_secrets(url) == url
