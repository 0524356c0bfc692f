"""A consistent copy of a database, made while studies run."""

import os
import sqlite3
import stat
import tempfile
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from tuner.errors import StorageError
from tuner.search.storage import check_owner, find_database, remove_database
from tuner.search.storage_errors import explain_failures

_BUSY_SECONDS = 60.0
_PAGES_AT_ONCE = 1024


@dataclass(frozen=True, kw_only=True)
class Backup:
    """What ``back_up`` made."""

    path: Path
    n_studies: int
    n_bytes: int


def back_up(url: str, target: Path, *, force: bool = False) -> Backup:
    """Copy a database as it is at one moment into a file that needs no other.

    The copy reads one snapshot, so that it never starts again, and in WAL mode readers keep nobody from writing. The
    file is whole on the disk before it gets its name. The models that studies keep beside the database stay there.

    Args:
        url: The database's.
        target: The file to make.
        force: Replace a file that is there.

    Raises:
        StorageError: If there is no database, or the file cannot be written, exists, or is the database itself.
    """
    source, target = find_database(url), target.absolute()
    check_owner(source)
    try:
        _check_target(source, target, force=force)  # Python 3.11 raises for a name that is too long, or out of reach
        descriptor, name = tempfile.mkstemp(prefix=f".{target.name}.", suffix=".tmp", dir=target.parent)
    except OSError as error:
        raise StorageError(f"backup: must lie in a writable folder, got {target}: {error.strerror}") from error
    os.close(descriptor)
    temporary = Path(name)
    try:
        _copy(source, temporary, target)
        with explain_failures(target):
            n_studies = _check_copy(temporary)
        temporary.chmod(stat.S_IMODE(source.stat().st_mode))
        _sync(temporary)
        _check_target(source, target, force=force)
        temporary.replace(target)
        _sync(target.parent)
    finally:
        remove_database(temporary)
    return Backup(path=target, n_studies=n_studies, n_bytes=target.stat().st_size)


def _check_target(source: Path, target: Path, *, force: bool) -> None:
    if not target.parent.is_dir():
        raise StorageError(f"backup: must lie in a folder that exists, got {target}")
    if target.is_dir():
        raise StorageError(f"backup: must be a file, got the folder {target}")
    if target.exists() and target.samefile(source):
        raise StorageError(f"backup: must be another file than the database, got {target}")
    if target.exists() and not force:
        raise StorageError(f"backup: must not exist yet, got {target}; choose another name, or replace it with --force")
    for suffix in ("-wal", "-journal"):
        # SQLite would take it for the copy's own, and write into the copy what it holds.
        if (beside := target.with_name(target.name + suffix)).exists():
            raise StorageError(f"backup: must not be a database in use, got {target} with {beside.name} beside it")


def _copy(source: Path, temporary: Path, target: Path) -> None:
    with (
        explain_failures(source),
        closing(sqlite3.connect(f"{source.as_uri()}?mode=rw", uri=True, isolation_level=None)) as reader,
    ):
        reader.execute(f"PRAGMA busy_timeout={_BUSY_SECONDS * 1000:.0f}")
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM sqlite_master").fetchone()  # the snapshot begins with the first read
        with explain_failures(target), closing(sqlite3.connect(temporary, isolation_level=None)) as writer:
            writer.execute("PRAGMA synchronous=OFF")  # the whole file is synced once, at the end
            reader.backup(writer, pages=_PAGES_AT_ONCE, progress=_hear_signals)


def _hear_signals(*_: int) -> None:
    """Let Python run between two steps of the copy: Ctrl-C ends it there."""


def _check_copy(temporary: Path) -> int:
    """Make the copy one file without a WAL, and check it; return its number of studies."""
    with closing(sqlite3.connect(temporary, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        found = str(connection.execute("PRAGMA integrity_check").fetchone()[0])
        if found != "ok":
            raise StorageError(f"storage: must be undamaged, got {found!r} from SQLite's integrity_check of its copy")
        return int(connection.execute("SELECT count(*) FROM studies").fetchone()[0])


def _sync(path: Path) -> None:
    """Have a file, or the names in a folder, reach the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
