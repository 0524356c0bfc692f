"""The study's book of when its test split was looked at: every look makes the next one less unbiased."""

import os
from datetime import UTC, datetime

from tuner.errors import StorageError
from tuner.production.reading import open_stored
from tuner.search.storage import find_database

OPENINGS_ATTR = "tuner:test_openings"
"""User attribute of the study: a list of ``{"time": …, "reason": …}``, the oldest first."""


def list_openings(study: str, *, storage: str | None = None) -> list[dict[str, str]]:
    """Return when and why a study's test split was looked at.

    Raises:
        StudyError, StorageError: If there is no such study.
    """
    with open_stored(study, storage) as (stored, _):
        openings: list[dict[str, str]] = stored.study.user_attrs.get(OPENINGS_ATTR, [])
        return openings


def check_writable(url: str) -> None:
    """Check that an opening can be recorded, before hours of training lead up to it.

    Raises:
        StorageError: If not.
    """
    path = find_database(url)
    # SQLite writes a journal beside the file.
    if not os.access(path, os.W_OK) or not os.access(path.parent, os.W_OK):
        raise StorageError(f"storage: must be writable, so that the look at test can be recorded, got {path}")


def record_opening(study: str, reason: str, *, storage: str | None = None) -> None:
    """Write into the study that its test split is looked at now.

    Raises:
        StudyError, StorageError: If there is no such study, or it cannot be written.
    """
    opening = {"time": datetime.now(UTC).isoformat(timespec="seconds"), "reason": reason}
    with open_stored(study, storage) as (stored, _):
        earlier = stored.study.user_attrs.get(OPENINGS_ATTR, [])
        stored.study.set_user_attr(OPENINGS_ATTR, [*earlier, opening])
