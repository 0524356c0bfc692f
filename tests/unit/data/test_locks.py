"""Tests of tuner.data.locks."""

import threading
from pathlib import Path

import pytest

from tuner.data.locks import claimed, find_lock, locked


def test_claimed_yields_false_while_another_writes(tmp_path: Path) -> None:
    """A claim never waits, and succeeds once the writer is done."""
    path = tmp_path / "entry.npy"
    with locked(path), claimed(path) as is_free:
        assert not is_free
    with claimed(path) as is_free:
        assert is_free


def test_locked_is_released_by_an_error(tmp_path: Path) -> None:
    """A writer that fails leaves no lock behind."""
    path = tmp_path / "entry.npy"
    with pytest.raises(ValueError, match="broken"), locked(path):
        raise ValueError("broken")
    with claimed(path) as is_free:
        assert is_free


def test_locked_excludes_others_after_the_lock_file_was_removed(tmp_path: Path) -> None:
    """Who waited for a lock that was evicted takes the new one: two never write at once."""
    path = tmp_path / "entry.npy"
    n_inside: list[int] = []
    inside = threading.Semaphore(0)

    def write() -> None:
        with locked(path):
            n_inside.append(1)
            inside.release()
            with claimed(path) as is_free:
                n_inside.append(100 if is_free else 0)

    with locked(path):
        waiting = threading.Thread(target=write)
        waiting.start()
        assert not inside.acquire(timeout=0.2)
        find_lock(path).unlink()
    waiting.join()
    assert sum(n_inside) == 1
