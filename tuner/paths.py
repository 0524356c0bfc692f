"""Where the program keeps what it can rebuild, and how files are written so that no reader sees half of one."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def cache_root() -> Path:
    """Folder of everything that can be rebuilt: ``TUNER_CACHE_DIR``, or ``tuner`` under the user's cache folder."""
    if chosen := os.environ.get("TUNER_CACHE_DIR"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "tuner"


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary file beside ``path``; on success it is flushed to disk and takes ``path``'s place.

    Args:
        path: The file to create or replace. Its folder is created.

    Yields:
        The temporary file to write to, which is there and empty. It is removed if the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    temporary.unlink(missing_ok=True)  # a killed writer's, or a link to what is not ours
    os.close(os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666))
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
