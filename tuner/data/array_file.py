"""One array in a ``.npy`` file: written through a map that cannot run out of disk, read copy on write."""

import mmap
import os
import zlib
from math import prod
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

from tuner.data.locks import mark_mapped

_MAP_NORESERVE = 0x4000
"""Linux's constant; the ``mmap`` module of Python 3.11 lacks it."""
_CHUNK_BYTES = 1 << 20


def create_array(path: Path, dtype: DTypeLike, shape: tuple[int, ...]) -> np.memmap[Any, Any]:
    """Create a file for an array, with all its room on the disk; return it mapped for writing.

    Raises:
        OSError: If it cannot be written, or the disk has too little room.
    """
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=shape)
    with path.open("r+b") as file:  # on a full disk a write to a mapped hole would kill the process
        os.posix_fallocate(file.fileno(), 0, array.offset + array.nbytes)
    return array


def map_array(file: IO[bytes], dtype: DTypeLike, shape: tuple[int, ...]) -> NDArray[Any]:
    """Map the array of an open file, copy on write: a write by mistake stays in memory.

    The file counts as in use (``locks.is_mapped``) until the array and its views are gone.

    Raises:
        OSError: If the file cannot be mapped.
        ValueError: If it holds something else, or less.
    """
    mark_mapped(file)
    file.seek(0)
    version = np.lib.format.read_magic(file)
    if version != (1, 0):
        raise ValueError(f"version: must be 1.0, got {version}")
    found = np.lib.format.read_array_header_1_0(file)
    if found != (shape, False, np.dtype(dtype)):
        raise ValueError(f"array: must be {shape} of {dtype}, got {found}")
    offset = file.tell()
    length = offset + prod(shape) * np.dtype(dtype).itemsize
    # np.memmap cannot ask for NORESERVE, without which Linux refuses a writable map that is larger than the memory.
    flags, access = mmap.MAP_PRIVATE | _MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
    mapped = mmap.mmap(file.fileno(), length, flags=flags, prot=access)
    return np.ndarray(shape, dtype, buffer=mapped, offset=offset)


def compute_checksum(file: IO[bytes], start: int = 0) -> int:
    """Return the CRC-32 of all bytes, read and not mapped: a disk that fails is then an error, not a signal.

    Args:
        file: An open data file.
        start: Of what belongs to the file and lies elsewhere.

    Raises:
        OSError: If the file cannot be read.
    """
    file.seek(0)
    checksum = start
    while chunk := file.read(_CHUNK_BYTES):
        checksum = zlib.crc32(chunk, checksum)
    return checksum
