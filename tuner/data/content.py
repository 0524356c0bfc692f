"""What is in the image files that a search may open: two data sets are the same only if their bytes are."""

import json
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from hashlib import file_digest, sha256
from zlib import crc32

import numpy as np
from numpy.typing import NDArray

from tuner.data.cache import touch
from tuner.data.decode import open_file
from tuner.data.index import ImageIndex
from tuner.paths import cache_root, replacing

_N_THREADS = 4


def hash_content(index: ImageIndex, rows: NDArray[np.int64]) -> str:
    """Return a SHA-256 of the bytes of image files, in order; of their stamps where there are no files.

    Args:
        index: The images.
        rows: Which of them. Only these are opened, so TEST images must not be among them.
    """
    if index.find_file is None:
        return sha256(_list_versions(index, rows).encode()).hexdigest()
    return sha256("".join(digest or "unreadable" for digest in list_digests(index, rows)).encode()).hexdigest()


def list_digests(index: ImageIndex, rows: NDArray[np.int64]) -> tuple[str, ...]:
    """Return a hash of what is in each image, the same for the same bytes; empty where it is not known.

    Files are read once: their hashes are remembered under their names, sizes and times, so that the other workers and
    later runs only look at those. Where there are no files, the stamps are hashes.

    Args:
        index: The images.
        rows: Which of them. Only these are opened.
    """
    if index.find_file is None:
        return tuple("" if index.read_version else index.stamps[row] for row in rows)
    # The word keeps them apart from what earlier versions remembered: one hash for all files.
    key = sha256(f"each {_list_versions(index, rows)}".encode()).hexdigest()
    path = cache_root() / "content" / f"{key}.txt"
    with suppress(OSError, ValueError):
        *known, checksum = path.read_text(encoding="ascii").split("\n")
        if checksum == _compute_checksum("\n".join(known)) and len(known) == len(rows):
            touch(path)
            return tuple(known)
    with ThreadPoolExecutor(_N_THREADS) as pool:
        digests = tuple(pool.map(lambda row: _hash_file(index, int(row)), rows))
    text = "\n".join(digests)
    with suppress(OSError), replacing(path) as temporary:  # that the cache cannot be written is said elsewhere
        temporary.write_text(f"{text}\n{_compute_checksum(text)}", encoding="ascii")
    return digests


def _list_versions(index: ImageIndex, rows: NDArray[np.int64]) -> str:
    return json.dumps([(index.names[row], index.image_version(int(row))) for row in rows])


def _compute_checksum(digests: str) -> str:
    """Return what shows that a disk has changed remembered digests."""
    return f"{crc32(digests.encode()):08x}"


def _hash_file(index: ImageIndex, row: int) -> str:
    """Return the hash of one file; of one that cannot be read, a bad image when it is decoded, nothing."""
    assert index.find_file is not None  # noqa: S101 - the caller checked
    try:
        with open_file(index.find_file(row)) as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError:
        return ""
