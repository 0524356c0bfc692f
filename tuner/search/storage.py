"""The SQLite file: opened, checked, and written by one process per study.

WAL with synchronous=NORMAL survives the death of any process; a loss of power may lose the last commits, never the
file. Facts behind the settings: Optuna's default rollback journal makes readers block writers, and two processes that
create the schema at once fail.
"""

import fcntl
import hashlib
import os
import re
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.exceptions import StorageInternalError
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url

from tuner.errors import StorageError

DEFAULT_URL = "sqlite:///studies.db"
_BUSY_SECONDS = 60


def resolve_url(given: str | None = None, from_spec: str | None = None) -> str:
    """Return the storage URL to use: the command line's, the study file's, ``TUNER_STORAGE`` or the default."""
    return given or from_spec or os.environ.get("TUNER_STORAGE") or DEFAULT_URL


def find_database(url: str) -> Path:
    """Return the file of a SQLite URL.

    Raises:
        StorageError: If the URL is none, or names no file.
    """
    expected = f"storage: must be an SQLite URL such as {DEFAULT_URL}"
    shown = repr(re.sub(r"//[^/]*@", "//***@", url))  # a password must not be printed, however wrong the URL is
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise StorageError(f"{expected}, got {shown}") from None
    if parsed.get_backend_name() != "sqlite":
        raise StorageError(f"{expected}, got {shown}")
    if not parsed.database or parsed.database == ":memory:":
        raise StorageError(f"{expected}, got {shown}, which keeps nothing")
    return Path(parsed.database).absolute()


def open_storage(url: str, *, create: bool = False) -> RDBStorage:
    """Open a database.

    Args:
        url: An SQLite URL; relative paths are relative to the working directory.
        create: Make the file and its schema if it is not there. Call it in one process only, under a lock.

    Raises:
        StorageError: If the file is missing, unreadable, not writable, or of another program.
    """
    path = find_database(url)
    if not create and not path.is_file():
        raise StorageError(f"storage: no database at {path}; 'tuner run STUDY_FILE' makes one, --storage names another")
    if create:
        _prepare_file(path)
    else:
        _check_owner(path)
    storage = _connect(path, create=create)
    sqlalchemy.event.listen(storage.engine, "connect", _set_pragmas)
    storage.engine.dispose()  # so that every connection meets the listener
    return storage


@contextmanager
def use_storage(url: str, *, create: bool = False) -> Iterator[RDBStorage]:
    """Open a database for a block, and close it after; arguments and errors as for ``open_storage``.

    Raises:
        StorageError: Also if the database fails later, inside the block.
    """
    storage = open_storage(url, create=create)
    try:
        yield storage
    except (StorageInternalError, sqlalchemy.exc.SQLAlchemyError) as error:
        reason = str(error.__cause__ or error).splitlines()[0]
        raise StorageError(f"storage: must stay readable and writable, got {find_database(url)}: {reason}") from error
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _connect(path: Path, *, create: bool) -> RDBStorage:
    try:
        return RDBStorage(
            # Not an f-string: "?" and "#" may stand in a path.
            sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string(),
            engine_kwargs={"connect_args": {"timeout": _BUSY_SECONDS}},
            skip_table_creation=not create,
        )
    except (RuntimeError, sqlalchemy.exc.SQLAlchemyError) as error:
        raise StorageError(f"storage: must be a database that Optuna 5 can use, got {path}: {error}") from error


def _set_pragmas(connection: Any, _: object) -> None:
    connection.execute("PRAGMA synchronous=NORMAL")
    connection.execute(f"PRAGMA busy_timeout={_BUSY_SECONDS * 1000}")


def _prepare_file(path: Path) -> None:
    """Check that the file can be ours, and switch it to WAL."""
    if not path.parent.is_dir():
        raise StorageError(f"storage: must lie in a folder that exists, got {path}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise StorageError(f"storage: must be writable, got {path}; choose another file with --storage")
    if path.exists():
        _check_owner(path)
    with _sqlite(path) as connection:
        mode = connection.execute("PRAGMA journal_mode=WAL").fetchone()[0]
    if mode != "wal":
        raise StorageError(f"storage: must lie on a local disk that allows SQLite's WAL, got {path}")


def _check_owner(path: Path) -> None:
    """Refuse a file that is no SQLite database, or one in which another program keeps its tables."""
    with _sqlite(path) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and not {"studies", "trials", "version_info"} <= tables:
        listed = ", ".join(sorted(tables)[:3])
        raise StorageError(
            f"storage: must be a database of Optuna, got {path} with the tables {listed}; choose another with --storage"
        )


@contextmanager
def _sqlite(path: Path) -> Iterator[sqlite3.Connection]:
    try:
        connection = sqlite3.connect(path, timeout=_BUSY_SECONDS)
        try:
            yield connection
        finally:
            connection.close()
    except sqlite3.Error as error:
        raise StorageError(f"storage: must be an SQLite database that can be used, got {path}: {error}") from error


def files_folder(url: str) -> Path:
    """Return the folder beside the database that holds what its studies keep in files."""
    path = find_database(url)
    return path.with_name(f"{path.name}.models")


def study_slug(name: str) -> str:
    """Return a file name for a study: its readable characters, and a hash where that is not the whole name."""
    readable = "".join(character if character.isalnum() or character in "-_" else "_" for character in name)[:60]
    # A name that looks like another one's slug gets a hash as well.
    if readable == name and not re.search(r"-[0-9a-f]{8}$", name):
        return name
    return f"{readable}-{hashlib.sha256(name.encode()).hexdigest()[:8]}"


@contextmanager
def hold_lock(path: Path, *, wait: bool = False) -> Iterator[bool]:
    """Hold an advisory lock that ends with this process, however it ends, and that no child inherits.

    Args:
        path: The lock file; it is left in place.
        wait: Wait for the lock instead of giving up.

    Yields:
        Whether the lock was free.

    Raises:
        StorageError: If the file cannot be made.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"storage: must lie in a writable folder, got {path}: {error.strerror}") from error
    try:
        yield _try_lock(descriptor, wait=wait)
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int, *, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    return True


def schema_lock_path(url: str) -> Path:
    """Return the lock that is held while a database is made."""
    return find_database(url).with_name(f"{find_database(url).name}.lock")


def study_lock_path(url: str, study_name: str) -> Path:
    """Return the lock that is held while a study runs."""
    path = find_database(url)
    return path.with_name(f"{path.name}.{study_slug(study_name)}.lock")
