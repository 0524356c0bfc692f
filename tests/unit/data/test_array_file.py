"""Tests of tuner.data.array_file."""

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from tuner.data.array_file import create_array, map_array
from tuner.data.locks import is_mapped


def write_array(path: Path, shape: tuple[int, ...] = (4, 3)) -> Path:
    """Write an array that counts up."""
    array = create_array(path, np.float32, shape)
    array[:] = np.arange(array.size).reshape(shape)
    array.flush()
    return path


def open_array(path: Path, dtype: type = np.float32, shape: tuple[int, ...] = (4, 3)) -> NDArray[Any]:
    """Map an array and close its file."""
    with path.open("rb") as file:
        return map_array(file, dtype, shape)


def test_map_array_reads_what_create_array_wrote(tmp_path: Path) -> None:
    """The values come back, numpy reads the same file, and a write reaches neither."""
    path = write_array(tmp_path / "array.npy")
    array = open_array(path)
    assert array.ravel().tolist() == list(range(12))
    array[:] = 0
    assert open_array(path).ravel().tolist() == np.load(path).ravel().tolist() == list(range(12))


def test_create_array_takes_its_room_at_once(tmp_path: Path) -> None:
    """There are no holes, in which a full disk would kill the process that writes."""
    path = tmp_path / "array.npy"
    create_array(path, np.uint8, (1000, 1000))
    assert path.stat().st_blocks * 512 >= 1_000_000


def test_map_array_refuses_what_is_not_the_array(tmp_path: Path) -> None:
    """Another shape, type or format, and a file that was cut short, are all noticed."""
    path = write_array(tmp_path / "array.npy")
    with pytest.raises(ValueError, match=r"^array: must be \(3, 4\) of .*, got"):
        open_array(path, shape=(3, 4))
    with pytest.raises(ValueError, match=r"^array: must be \(4, 3\) of .*uint8.*, got"):
        open_array(path, dtype=np.uint8)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(ValueError, match="mmap length is greater than file size"):
        open_array(path)
    path.write_bytes(b"x" * 500)
    with pytest.raises(ValueError, match="magic"):
        open_array(path)


def test_map_array_marks_the_file_until_the_last_view_is_gone(tmp_path: Path) -> None:
    """A file counts as in use as long as anything of it is mapped, not as long as it is open."""
    path = write_array(tmp_path / "array.npy")
    assert not is_mapped(path)
    view: NDArray[Any] | None = open_array(path)[2:]
    assert is_mapped(path)
    del view
    assert not is_mapped(path)


def test_map_array_takes_data_larger_than_the_memory(tmp_path: Path) -> None:
    """Linux refuses a writable map of twice the memory, unless it is asked to reserve nothing."""
    shape = (2 * os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE"))
    path = tmp_path / "array.npy"
    np.lib.format.open_memmap(path, mode="w+", dtype=np.uint8, shape=shape)  # all of it a hole
    array = open_array(path, np.uint8, shape)
    assert array[-1, -1] == 0
    array[-1, -1] = 1
    assert array.nbytes == 2 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
