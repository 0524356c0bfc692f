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
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import sqlalchemy
from optuna.storages import RDBStorage
from sqlalchemy.engine import make_url

from tuner.errors import StorageError
from tuner.search.patience import ATTEMPT_SECONDS, Patience
from tuner.search.storage_errors import explain_database_failures, explain_failures
from tuner.search.urls import mask_secrets

DEFAULT_URL = "sqlite:///studies.db"
_BUSY_SECONDS = 60.0
_SLUG_BYTES = 120


def resolve_url(given: str | None = None, from_spec: str | None = None) -> str:
    """Return the storage URL to use: the command line's, the study file's, ``TUNER_STORAGE`` or the default."""
    return given or from_spec or os.environ.get("TUNER_STORAGE") or DEFAULT_URL


def find_database(url: str) -> Path:
    """Return the file of a SQLite URL.

    Raises:
        StorageError: If the URL is none, or names no file.
    """
    expected = f"storage: must be an SQLite URL such as {DEFAULT_URL}"
    shown = repr(mask_secrets(url))
    try:
        parsed = make_url(url)
    except (sqlalchemy.exc.ArgumentError, ValueError):
        raise StorageError(f"{expected}, got {shown}") from None
    if parsed.get_backend_name() != "sqlite":
        raise StorageError(f"{expected}, got {shown}")
    if not parsed.database or parsed.database == ":memory:":
        raise StorageError(f"{expected}, got {shown}, which keeps nothing")
    if parsed.username or parsed.password or parsed.host or parsed.query:  # they would be stored and printed
        raise StorageError(f"{expected}, without user, host or options, got {shown}")
    with explain_failures(Path(parsed.database)):  # the working directory may be gone
        path = Path(parsed.database).absolute()
    if not _is_writable_name(str(path)):
        raise StorageError(f"{expected}, of a path in UTF-8 and without NUL, got {shown}")
    return path


def _is_writable_name(path: str) -> bool:
    """Whether a path is text that a URL can hold, and that names a file."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return "\0" not in path


def open_storage(url: str, *, create: bool = False, busy_seconds: float = _BUSY_SECONDS) -> RDBStorage:
    """Open a database.

    Args:
        url: An SQLite URL; relative paths are relative to the working directory.
        create: Make the file and its schema if it is not there, and check that it can be written. Call it in one
            process only, under a lock.
        busy_seconds: How long one statement waits for another program's lock.

    Raises:
        StorageError: If the file is missing, unreadable, not writable, or of another program.
    """
    path = find_database(url)
    if create:
        with explain_failures(path):
            _prepare_file(path, busy_seconds)
    else:
        check_owner(path, busy_seconds)
    storage = _connect(path, create=create, busy_seconds=busy_seconds)
    storage.remove_session()
    storage.engine.dispose()  # so that every connection meets the listener, and none is in the way of WAL
    if create:
        _check_writing(path, busy_seconds)

    def set_pragmas(connection: Any, _: object) -> None:
        connection.execute("PRAGMA synchronous=NORMAL")
        connection.execute(f"PRAGMA busy_timeout={busy_seconds * 1000:.0f}")

    sqlalchemy.event.listen(storage.engine, "connect", set_pragmas)
    return storage


@contextmanager
def use_storage(
    url: str, *, create: bool = False, busy_seconds: float = _BUSY_SECONDS, patience: Patience | None = None
) -> Iterator[RDBStorage]:
    """Open a database for a block, and close it after.

    Args:
        url: As for ``open_storage``.
        create: The same.
        busy_seconds: The same.
        patience: Waits for a database that cannot be opened now, in short attempts between which signals are heard.

    Raises:
        StorageError: As ``open_storage``; also if the database fails later, inside the block.
    """
    if patience is None:
        storage = open_storage(url, create=create, busy_seconds=busy_seconds)
    else:
        storage = patience.keep_trying(lambda: open_storage(url, create=create, busy_seconds=ATTEMPT_SECONDS))
    try:
        with explain_database_failures(find_database(url)):  # the block may have other files to do with
            yield storage
    finally:
        storage.remove_session()
        storage.engine.dispose()


def _connect(path: Path, *, create: bool, busy_seconds: float) -> RDBStorage:
    try:
        with explain_failures(path):
            return _make_storage(path, create=create, busy_seconds=busy_seconds)
    except RuntimeError as error:
        raise StorageError(f"storage: must be a database that Optuna 5 can use, got {path}: {error}") from error


def _make_storage(path: Path, *, create: bool, busy_seconds: float) -> RDBStorage:
    return RDBStorage(
        # Not an f-string: "?" and "#" may stand in a path.
        sqlalchemy.URL.create("sqlite", database=str(path)).render_as_string(),
        engine_kwargs={"connect_args": {"timeout": busy_seconds}},
        skip_table_creation=not create,
    )


def _prepare_file(path: Path, busy_seconds: float) -> None:
    """Check that the file can be ours, and make it if it is not there."""
    if not path.parent.is_dir():
        raise StorageError(f"storage: must lie in a folder that exists, got {path}")
    if not os.access(path.parent, os.W_OK) or (path.exists() and not os.access(path, os.W_OK)):
        raise StorageError(f"storage: must be writable, got {path}; choose another file with --storage")
    if path.exists():
        check_owner(path, busy_seconds)
    else:
        _make_file(path)


def _make_file(path: Path) -> None:
    """Make the schema aside and move it into place: a kill must not leave half a schema, which nobody can use."""
    aside = path.with_name(f".{path.name}.new")
    remove_database(aside)
    try:
        with explain_failures(path):
            storage = _make_storage(aside, create=True, busy_seconds=_BUSY_SECONDS)
            storage.remove_session()
            storage.engine.dispose()
        if not path.exists():
            aside.rename(path)
    finally:
        remove_database(aside)


def remove_database(path: Path) -> None:
    """Remove a database that nobody uses, with the files that SQLite keeps beside it."""
    for suffix in ("", "-journal", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def _check_writing(path: Path, busy_seconds: float) -> None:
    """Switch a database to WAL, and write one page as it is: only that shows that file, WAL and disk take a write."""
    with _sqlite(path, busy_seconds) as connection:
        if connection.execute("PRAGMA journal_mode=WAL").fetchone()[0] != "wal":
            raise StorageError(f"storage: must lie on a local disk that allows SQLite's WAL, got {path}")
        connection.execute("BEGIN IMMEDIATE")
        version = connection.execute("PRAGMA user_version").fetchone()[0]
        connection.execute(f"PRAGMA user_version={version}")
        connection.execute("COMMIT")


def check_owner(path: Path, busy_seconds: float = _BUSY_SECONDS) -> None:
    """Refuse what is not there, no SQLite database, or one in which another program keeps its tables.

    Raises:
        StorageError: If it is one of these.
    """
    with explain_failures(path):  # Python 3.11 raises for a folder out of reach, and for a name that is too long
        is_there = path.exists()
    if not is_there:
        raise StorageError(f"storage: no database at {path}; 'tuner run STUDY_FILE' makes one, --storage names another")
    with _sqlite(path, busy_seconds) as connection:
        tables = {row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")}
    if tables and not {"studies", "trials", "version_info"} <= tables:
        listed = ", ".join(sorted(tables)[:3])
        raise StorageError(
            f"storage: must be a database of Optuna, got {path} with the tables {listed}; choose another with --storage"
        )


@contextmanager
def _sqlite(path: Path, busy_seconds: float) -> Iterator[sqlite3.Connection]:
    with explain_failures(path), closing(sqlite3.connect(path, timeout=busy_seconds, isolation_level=None)) as opened:
        yield opened


def files_folder(url: str) -> Path:
    """Return the folder beside the database that holds what its studies keep in files."""
    path = find_database(url)
    return path.with_name(f"{path.name}.models")


def refuse_links(folder: Path, what: str) -> None:
    """Check that no link stands in the place of a study's folder, or of the one around it that all studies share.

    Args:
        folder: The study's; it need not exist.
        what: What it holds, in a word.

    Raises:
        StorageError: If there is a link: files would be written and removed who knows where.
    """
    with explain_failures(folder):
        for each in (folder.parent, folder):
            if each.is_symlink():
                raise StorageError(f"storage: must keep its {what} in a folder, got the link '{each}'; remove it")


def study_slug(name: str) -> str:
    """Return a file name for a study: its readable characters, and a hash where that is not the whole name.

    No two studies share one, also on a disk that knows no upper case or that composes letters.
    """
    # A name that looks like another one's slug gets a hash as well.
    if re.fullmatch(r"[a-z0-9_-]{1,60}", name) and not re.search(r"-[0-9a-f]{8}$", name):
        return name
    readable = "".join(character if character.isalnum() or character in "-_" else "_" for character in name)[:60]
    readable = readable.encode()[:_SLUG_BYTES].decode(errors="ignore")  # a file name has 255 bytes, not characters
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
        StorageError: If the file cannot be made, or its disk keeps no locks.
    """
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
    except OSError as error:
        raise StorageError(f"storage: must lie in a writable folder, got {path}: {error.strerror}") from error
    try:
        with explain_failures(path):
            is_free = _try_lock(descriptor, wait=wait)
        yield is_free
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
    return Path(f"{_find_real(url)}.lock")


def study_lock_path(url: str, study_name: str) -> Path:
    """Return the lock that is held while a study runs, the same one through every link to the database."""
    return Path(f"{_find_real(url)}.{study_slug(study_name)}.lock")


def _find_real(url: str) -> str:
    """Return where the links to a database lead; ``Path.resolve`` would raise for those that lead in a circle."""
    return os.path.realpath(find_database(url))
