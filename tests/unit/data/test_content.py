"""The identity of the images is what is in them."""

import os
from pathlib import Path

import numpy as np
import pytest

from tuner.data.content import hash_content
from tuner.data.sources import read_index
from tuner.spec.sections import DataSection

ROWS = np.arange(3)


def write_files(folder: Path, last: bytes = b"4") -> DataSection:
    """Write four files of one byte each in two classes; names sort as written."""
    for name, content in (("a/0.bmp", b"1"), ("a/1.bmp", b"2"), ("b/0.bmp", b"3"), ("b/1.bmp", last)):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return DataSection(source="image_folder", path=str(folder))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_hash_content_is_of_bytes_not_of_times_or_places(tmp_path: Path) -> None:
    """A copy is the same data set; other pixels of the same size are not."""
    first = hash_content(read_index(write_files(tmp_path / "x")), ROWS)
    copied = write_files(tmp_path / "y")
    os.utime(tmp_path / "y/a/0.bmp", (1, 1))
    assert hash_content(read_index(copied), ROWS) == first
    (tmp_path / "y/a/0.bmp").write_bytes(b"9")
    assert hash_content(read_index(copied), ROWS) != first


def test_hash_content_opens_only_the_rows_it_is_given(tmp_path: Path) -> None:
    """What is in the test split does not count, for nobody reads it."""
    first = hash_content(read_index(write_files(tmp_path / "x")), ROWS)
    assert hash_content(read_index(write_files(tmp_path / "x", last=b"other")), ROWS) == first


def test_hash_content_reads_files_once(tmp_path: Path, cache: Path) -> None:
    """The second worker looks at names, sizes and times alone; a torn note is made again."""
    index = read_index(write_files(tmp_path / "x"))
    first = hash_content(index, ROWS)
    (note,) = (cache / "content").iterdir()
    note.write_text("f" * 64)
    os.utime(note, (0, 0))
    assert hash_content(index, ROWS) == "f" * 64
    assert note.stat().st_mtime > 0
    note.write_text("torn")
    assert hash_content(index, ROWS) == first


def test_hash_content_counts_what_cannot_be_read(tmp_path: Path) -> None:
    """A vanished file is another data set, not a crash."""
    index = read_index(write_files(tmp_path / "x"))
    first = hash_content(index, ROWS)
    (tmp_path / "x/a/0.bmp").unlink()
    assert hash_content(index, ROWS) != first


def test_hash_content_of_arrays_is_that_of_their_stamps() -> None:
    """The digits have no files; their stamps are hashes already."""
    index = read_index(DataSection(source="digits"))
    assert hash_content(index, ROWS) != hash_content(index, ROWS[:2])
