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
    """Yield a temporary name beside ``path``; on success the file is flushed to disk and takes ``path``'s place.

    Args:
        path: The file to create or replace. Its folder is created.

    Yields:
        The temporary name to write to. It is removed if the block raises.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        with temporary.open("rb") as written:
            os.fsync(written.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
