"""Tests of tuner.search.storage_errors."""

import errno
import os
import sqlite3
from pathlib import Path

import pytest
import sqlalchemy
from optuna.exceptions import StorageInternalError

from tuner.errors import StorageBusyError, StorageError
from tuner.search.storage_errors import explain_database_failures, explain_failures


def make_error(code: int, text: str) -> sqlite3.OperationalError:
    """Return what SQLite raises."""
    error = sqlite3.OperationalError(text)
    error.sqlite_errorcode = code
    return error


@pytest.mark.parametrize(
    ("code", "may_pass", "words"),
    [
        (sqlite3.SQLITE_BUSY, True, "must not be locked by another program"),
        (sqlite3.SQLITE_BUSY_SNAPSHOT, True, "must not be locked by another program"),
        (sqlite3.SQLITE_FULL, True, "must have room on its disk"),
        (sqlite3.SQLITE_IOERR_WRITE, True, "must lie on a disk with room"),
        (sqlite3.SQLITE_READONLY, False, "must be writable, with its folder"),
        (sqlite3.SQLITE_READONLY_DBMOVED, False, "must be writable, with its folder"),
        (sqlite3.SQLITE_CORRUPT, False, "must be undamaged"),
        (sqlite3.SQLITE_NOTADB, False, "must be an SQLite database that can be used"),
    ],
)
def test_explain_failures_says_what_must_hold_and_whether_waiting_helps(
    code: int, words: str, *, may_pass: bool
) -> None:
    """Every code that a night may bring has its words; extended codes have their primary one's."""
    match = f"^storage: {words}.*, got /a/b.db: as it says"
    with pytest.raises(StorageError, match=match) as caught, explain_failures(Path("/a/b.db")):
        raise make_error(code, "as it says")
    assert isinstance(caught.value, StorageBusyError) == may_pass
    assert caught.value.exit_code == 8


def test_explain_failures_finds_the_reason_below_sqlalchemy_and_optuna() -> None:
    """The statement and Optuna's guesses do not reach the user."""
    locked = make_error(sqlite3.SQLITE_BUSY, "database is locked")
    statement = sqlalchemy.exc.OperationalError("INSERT INTO trials", {}, locked)
    statement.__cause__ = locked
    match = r"^storage: must not be locked .*: database is locked; end"
    with pytest.raises(StorageBusyError, match=match) as caught, explain_failures(Path("/a/b.db")):
        raise StorageInternalError("An exception is raised during the commit.") from statement
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("number", "may_pass"),
    [(errno.EIO, True), (errno.ESTALE, True), (errno.ENOLCK, True), (errno.EACCES, False), (errno.ENAMETOOLONG, False)],
)
def test_explain_failures_says_what_the_file_system_says(number: int, *, may_pass: bool) -> None:
    """A disk that is away for a moment is waited for; in a block that has other files to do with nothing is guessed."""
    match = f"^storage: must lie where it can be read and written, got /a/b.db: {os.strerror(number)}; see to its"
    with pytest.raises(StorageError, match=match) as caught, explain_failures(Path("/a/b.db")):
        raise OSError(number, os.strerror(number), "/a/b.db-wal")
    assert isinstance(caught.value, StorageBusyError) == may_pass
    with pytest.raises(OSError, match=os.strerror(number)), explain_database_failures(Path("/a/b.db")):
        raise OSError(number, os.strerror(number))


def test_explain_failures_lets_bugs_through() -> None:
    """What does not come from the database keeps its traceback."""
    with pytest.raises(KeyError, match="ours"), explain_failures(Path("/a/b.db")):
        raise KeyError("ours")
