"""Whoever may write to the cache folder plants links there: nothing that a link leads to is touched."""

import os
from pathlib import Path

import pytest

from tuner.data.cache import clear_cache, list_entries
from tuner.data.locks import claimed, find_lock, locked
from tuner.paths import replacing

NAME = "a" * 64


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return the folder of decoded images in a cache of the test's own."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "pixels"
    folder.mkdir(parents=True)
    return folder


def test_clear_cache_follows_no_link_and_leaves_what_is_not_its_own(tmp_path: Path, folder: Path) -> None:
    """A name like an entry's may be a link or a folder; a file of another name is somebody's."""
    (tmp_path / "mine.npy").write_bytes(b"mine")
    (folder / f"{NAME}.npy").symlink_to(tmp_path / "mine.npy")
    (folder / f"{'b' * 64}.npy").mkdir()
    (folder / f"{'c' * 64}.npy").write_bytes(b"cache")
    (folder / "notes.npy").write_bytes(b"mine")
    assert [entry.path.name[0] for entry in list_entries()] == ["c"]
    assert clear_cache() == 5
    assert (tmp_path / "mine.npy").read_bytes() == b"mine"
    assert sorted(path.name[0] for path in folder.iterdir() if path.suffix == ".npy") == ["a", "b", "n"]


@pytest.mark.parametrize("exists", [True, False])
def test_clear_cache_follows_no_linked_lock(tmp_path: Path, folder: Path, exists: bool) -> None:
    """A file behind a planted lock is not emptied, and none is made; the entry goes all the same."""
    if exists:
        (tmp_path / "mine").write_bytes(b"mine")
    (folder / f"{NAME}.npy").write_bytes(b"cache")
    (folder / f"{NAME}.lock").symlink_to(tmp_path / "mine")
    assert clear_cache() == 5
    assert list(folder.iterdir()) == []
    assert (tmp_path / "mine").exists() == exists
    assert not exists or (tmp_path / "mine").read_bytes() == b"mine"


def test_locked_follows_no_link_and_still_excludes(tmp_path: Path, folder: Path) -> None:
    """A writer whose lock was replaced by a link takes a lock of its own."""
    path = folder / f"{NAME}.npy"
    (tmp_path / "mine").write_bytes(b"mine")
    find_lock(path).symlink_to(tmp_path / "mine")
    with locked(path), claimed(path) as is_free:
        assert not is_free
        assert not find_lock(path).is_symlink()
    assert (tmp_path / "mine").read_bytes() == b"mine"


def test_locked_empties_no_file(folder: Path) -> None:
    """Nor does a hard link under the name of a lock lose what is in it."""
    path = folder / f"{NAME}.npy"
    find_lock(path).write_bytes(b"mine")
    with locked(path):
        pass
    assert find_lock(path).read_bytes() == b"mine"


@pytest.mark.parametrize("exists", [True, False])
def test_replacing_follows_no_linked_temporary(tmp_path: Path, folder: Path, exists: bool) -> None:
    """The name of a temporary file can be guessed; a link there is replaced by a file of our own."""
    if exists:
        (tmp_path / "mine").write_bytes(b"mine")
    path = folder / f"{NAME}.npy"
    path.with_name(f".{path.name}.{os.getpid()}.tmp").symlink_to(tmp_path / "mine")
    with replacing(path) as temporary:
        temporary.write_bytes(b"cache")
    assert path.read_bytes() == b"cache"
    assert not path.is_symlink()
    assert (tmp_path / "mine").exists() == exists
    assert not exists or (tmp_path / "mine").read_bytes() == b"mine"
