"""What SQLite and the file system say when they fail, in words for the user, and whether it may pass."""

import errno
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import sqlalchemy
from optuna.exceptions import StorageInternalError

from tuner.errors import StorageBusyError, StorageError

_AGAIN = "then run the same command again"
_WORDS = {
    sqlite3.SQLITE_BUSY: ("must not be locked by another program", f"end what holds it, {_AGAIN}"),
    sqlite3.SQLITE_LOCKED: ("must not be locked by another program", f"end what holds it, {_AGAIN}"),
    sqlite3.SQLITE_FULL: ("must have room on its disk", f"make room, {_AGAIN}"),
    sqlite3.SQLITE_IOERR: ("must lie on a disk with room that can be read and written", f"see to the disk, {_AGAIN}"),
    sqlite3.SQLITE_READONLY: ("must be writable, with its folder", "allow it, or choose another with --storage"),
    sqlite3.SQLITE_CORRUPT: ("must be undamaged", "go on with a copy that 'tuner backup' made"),
}
"""By SQLite's primary result code: what must hold, and what to do."""
_PASSING = {sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR}
_PASSING_NUMBERS = {
    errno.EAGAIN,
    errno.EDQUOT,
    errno.EIO,
    errno.ENOLCK,
    errno.ENOSPC,
    errno.ESTALE,
    errno.ETIMEDOUT,
}
"""Of what the file system says."""


@contextmanager
def explain_failures(path: Path) -> Iterator[None]:
    """Turn what goes wrong in a block that works on a database, or on the files beside it, into one line.

    Raises:
        StorageBusyError: If the same may work soon: a lock, a full disk, a disk that failed once.
        StorageError: If it will not.
    """
    try:
        with explain_database_failures(path):
            yield
    except OSError as error:
        kind = StorageBusyError if error.errno in _PASSING_NUMBERS else StorageError
        raise kind(
            f"storage: must lie where it can be read and written, got {path}: {error.strerror or error}; "
            f"see to its folder and disk, or choose another with --storage, {_AGAIN}"
        ) from error


@contextmanager
def explain_database_failures(path: Path) -> Iterator[None]:
    """Do the same for what SQLite, SQLAlchemy and Optuna raise, in a block that has other files to do with as well.

    Raises:
        StorageBusyError, StorageError: As ``explain_failures``.
    """
    try:
        yield
    except (sqlite3.Error, sqlalchemy.exc.SQLAlchemyError, StorageInternalError) as error:
        raise _explain(error, path) from error


def _explain(error: Exception, path: Path) -> StorageError:
    cause = _find_cause(error)
    code = (getattr(cause, "sqlite_errorcode", None) or 0) & 0xFF  # the low byte of an extended code
    reason = str(cause).splitlines()[0]
    if code not in _WORDS:
        return StorageError(f"storage: must be an SQLite database that can be used, got {path}: {reason}")
    must, advice = _WORDS[code]
    kind = StorageBusyError if code in _PASSING else StorageError
    return kind(f"storage: {must}, got {path}: {reason}; {advice}")


def _find_cause(error: BaseException) -> BaseException:
    """Return what SQLite itself raised, below what SQLAlchemy and Optuna made of it."""
    while not isinstance(error, sqlite3.Error) and error.__cause__ is not None:
        error = error.__cause__
    return error
