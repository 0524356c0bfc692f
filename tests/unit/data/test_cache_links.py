"""Clearing the cache removes the cache's own files and nothing that a link leads to."""

from pathlib import Path

import pytest

from tuner.data.cache import clear_cache, list_entries


def test_clear_cache_follows_no_link_and_leaves_what_is_not_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A name like an entry's may be a link or a folder; a file of another name is somebody's."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    folder = tmp_path / "cache" / "pixels"
    folder.mkdir(parents=True)
    (tmp_path / "mine.npy").write_bytes(b"mine")
    (folder / f"{'a' * 64}.npy").symlink_to(tmp_path / "mine.npy")
    (folder / f"{'b' * 64}.npy").mkdir()
    (folder / f"{'c' * 64}.npy").write_bytes(b"cache")
    (folder / "notes.npy").write_bytes(b"mine")
    assert [entry.path.name[0] for entry in list_entries()] == ["c"]
    assert clear_cache() == 5
    assert (tmp_path / "mine.npy").read_bytes() == b"mine"
    assert sorted(path.name[0] for path in folder.iterdir() if path.suffix == ".npy") == ["a", "b", "n"]
