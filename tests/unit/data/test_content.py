"""The identity of the images is what is in them."""

import os
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from tuner.data.content import hash_content, list_digests
from tuner.data.index import ImageIndex, join_indexes
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
    """The second worker looks at names, sizes and times alone."""
    index = read_index(write_files(tmp_path / "x"))
    first = hash_content(index, ROWS)
    (note,) = (cache / "content").iterdir()
    os.utime(note, (0, 0))
    assert hash_content(forbid_reading(index), ROWS) == first
    assert note.stat().st_mtime > 0


def forbid_reading(index: ImageIndex) -> ImageIndex:
    """Return the index with files that must not be asked for."""

    def refuse(row: int) -> Path:
        raise AssertionError(f"asked for file {row}")

    return ImageIndex(**{**vars(index), "find_file": refuse})


@pytest.mark.parametrize("place", [0, 63, 65, -2])
def test_hash_content_is_computed_again_where_the_note_is_damaged(tmp_path: Path, cache: Path, place: int) -> None:
    """A flipped bit in what is remembered, or in its checksum, must not make another data set of it."""
    index = read_index(write_files(tmp_path / "x"))
    first = hash_content(index, ROWS)
    (note,) = (cache / "content").iterdir()
    whole = note.read_bytes()
    flipped = bytearray(whole)
    flipped[place] ^= 1
    for damaged in (bytes(flipped), whole[:64], b"torn", b"\xff" * 70, b""):
        note.write_bytes(damaged)
        assert hash_content(index, ROWS) == first
        assert note.read_bytes() == whole


def test_hash_content_does_not_wait_for_a_pipe(tmp_path: Path) -> None:
    """Nobody writes to it; it counts as what cannot be read."""
    index = read_index(write_files(tmp_path / "x"))
    (tmp_path / "x/a/0.bmp").unlink()
    missing = hash_content(index, ROWS)
    os.mkfifo(tmp_path / "x/a/0.bmp")
    assert hash_content(index, ROWS) == missing


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


def test_list_digests_are_equal_for_equal_bytes_alone(tmp_path: Path, cache: Path) -> None:
    """What cannot be read has none; what is remembered is the same."""
    section = write_files(tmp_path / "x", last=b"1")
    (tmp_path / "x/a/1.bmp").unlink()
    (tmp_path / "x/a/1.bmp").mkdir()
    index = read_index(section)
    rows = np.arange(len(index.names))
    digests = dict(zip(index.names, list_digests(index, rows), strict=True))
    assert digests["a/0.bmp"] == digests["b/1.bmp"] != digests["b/0.bmp"]
    assert list_digests(forbid_reading(index), rows) == tuple(digests.values())


def test_list_digests_of_what_cannot_be_read_is_empty(tmp_path: Path) -> None:
    """Two files that have vanished are not copies of each other."""
    index = read_index(write_files(tmp_path / "x"))
    (tmp_path / "x/a/0.bmp").unlink()
    (tmp_path / "x/b/0.bmp").unlink()
    assert [bool(digest) for digest in list_digests(index, ROWS)] == [False, True, False]


def test_list_digests_of_arrays_are_their_stamps() -> None:
    """Stamps of files are sizes, which say nothing of what is in them."""
    index = read_index(DataSection(source="digits"))
    assert list_digests(index, ROWS) == index.stamps[:3]
    assert list_digests(replace(index, read_version=str), ROWS) == ("", "", "")
    assert list_digests(join_indexes(index, index), ROWS) == index.stamps[:3]


def test_hash_content_stays_what_it_was(tmp_path: Path) -> None:
    """Studies are resumed by it."""
    index = read_index(write_files(tmp_path / "x"))
    assert (
        hash_content(index, ROWS)
        == sha256("".join(sha256(each).hexdigest() for each in (b"1", b"2", b"3")).encode()).hexdigest()
    )
