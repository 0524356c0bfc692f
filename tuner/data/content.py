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

    The files are read once: the hash is remembered under their names, sizes and times, so that the other workers and
    later runs only look at those.

    Args:
        index: The images.
        rows: Which of them. Only these are opened, so TEST images must not be among them.
    """
    versions = json.dumps([(index.names[row], index.image_version(int(row))) for row in rows])
    if index.find_file is None:
        return sha256(versions.encode()).hexdigest()
    path = cache_root() / "content" / f"{sha256(versions.encode()).hexdigest()}.txt"
    with suppress(OSError, ValueError):
        known, checksum = path.read_text(encoding="ascii").splitlines()
        if checksum == _compute_checksum(known):
            touch(path)
            return known
    with ThreadPoolExecutor(_N_THREADS) as pool:
        digests = list(pool.map(lambda row: _hash_file(index, int(row)), rows))
    digest = sha256("".join(digests).encode()).hexdigest()
    with suppress(OSError), replacing(path) as temporary:  # that the cache cannot be written is said elsewhere
        temporary.write_text(f"{digest}\n{_compute_checksum(digest)}\n", encoding="ascii")
    return digest


def _compute_checksum(digest: str) -> str:
    """Return what shows that a disk has changed a remembered digest."""
    return f"{crc32(digest.encode()):08x}"


def _hash_file(index: ImageIndex, row: int) -> str:
    """Return the hash of one file; one that cannot be read counts as a bad image when it is decoded."""
    assert index.find_file is not None  # noqa: S101 - the caller checked
    try:
        with open_file(index.find_file(row)) as file:
            return file_digest(file, "sha256").hexdigest()
    except OSError:
        return "unreadable"
