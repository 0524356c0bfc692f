"""Who writes an entry of the cache, and who has it mapped. The locks end with their process, however it ends."""

import errno
import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let one process at a time write a file of the cache; the others wait and then find it done.

    Half-written files of killed writers are swept: whoever writes holds the lock.

    Args:
        path: The data file. Its folder is created.

    Raises:
        OSError: If the folder cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = _take_lock(path, waits=True)
    assert lock is not None  # noqa: S101 - it waited
    with lock:
        for half in list_halves(path):
            half.unlink(missing_ok=True)
        yield


@contextmanager
def claimed(path: Path) -> Iterator[bool]:
    """Take the lock of a data file without waiting; yields False if another holds it, who writes just now."""
    lock = _take_lock(path, waits=False)
    if lock is None:
        yield False
        return
    with lock:
        yield True


def list_halves(path: Path) -> list[Path]:
    """Return the temporary files of a data file and of its sidecar, as ``paths.replacing`` names them."""
    return list(path.parent.glob(f".{path.stem}.*.tmp"))


def find_lock(path: Path) -> Path:
    """Return the lock file of a data file."""
    return path.with_suffix(".lock")


def mark_mapped(file: IO[bytes]) -> None:
    """Show others that an open data file is in use. A map made from it keeps the mark until it is gone."""
    with suppress(OSError):  # a file system without locks
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)


def is_mapped(path: Path) -> bool:
    """Whether a process, this one included, has the data file in use."""
    try:
        with path.open("r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # gone, or a file system without locks
        return False
    return False


def _take_lock(path: Path, *, waits: bool) -> IO[bytes] | None:
    """Return the open lock file, or None if another holds the lock."""
    while True:
        lock = _open_lock(find_lock(path))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX if waits else fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.close()
            return None
        except OSError:  # a file system without locks: the same file is then written twice
            return lock
        with suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock.fileno()), find_lock(path).lstat()):
                return lock
        lock.close()  # the entry was evicted with its lock while this process waited


def _open_lock(path: Path) -> IO[bytes]:
    """Open a lock file as it is. A link in its place is removed: a stranger may have put it into a shared cache."""
    while True:
        try:
            return os.fdopen(os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666), "rb")
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            path.unlink(missing_ok=True)
