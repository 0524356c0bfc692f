"""Tests of tuner.search.backup."""

import os
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import optuna
import pytest

from tuner.errors import StorageError
from tuner.search.backup import back_up
from tuner.search.storage import open_storage
from tuner.search.trial_book import TrialBook

from .builders import keep, make_storage, make_url, open_small, run_trial

_WRITE = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=30)
connection.execute("CREATE TABLE IF NOT EXISTS pairs (one INTEGER, other INTEGER, filling BLOB)")
print(flush=True)
for number in range(10**9):
    connection.execute("BEGIN IMMEDIATE")
    connection.execute("INSERT INTO pairs VALUES (?, 0, randomblob(20000))", (number,))
    connection.execute("UPDATE pairs SET other = one WHERE one = ?", (number,))
    connection.execute("COMMIT")
"""


def list_names(folder: Path) -> set[str]:
    """Return the files of a folder."""
    return {path.name for path in folder.iterdir()}


def test_back_up_makes_one_file_that_opens_as_a_storage(tmp_path: Path) -> None:
    """All trials are in it, though the database's WAL still holds them; no other file is left."""
    book = TrialBook(open_small(tmp_path))
    run_trial(book)
    (tmp_path / "copies").mkdir()
    made = back_up(make_url(tmp_path), tmp_path / "copies" / "copy.db")
    assert list_names(tmp_path / "copies") == {"copy.db"}
    assert (made.n_studies, made.n_bytes) == (1, made.path.stat().st_size)
    copied = optuna.load_study(storage=keep(open_storage(f"sqlite:///{made.path}")), study_name="small")
    assert [trial.state.name for trial in copied.trials] == ["COMPLETE"]
    assert made.path.stat().st_mode == (tmp_path / "studies.db").stat().st_mode
    run_trial(book)  # the database itself goes on


def test_back_up_is_consistent_while_another_process_writes(tmp_path: Path) -> None:
    """Pairs that are written together are copied together, the writer is not stopped, and the copy comes to an end."""
    make_storage(tmp_path)
    writer = subprocess.Popen([sys.executable, "-c", _WRITE, tmp_path / "studies.db"], stdout=subprocess.PIPE)
    assert writer.stdout is not None
    try:
        writer.stdout.readline()
        counts = []
        for number in range(5):
            copy = back_up(make_url(tmp_path), tmp_path / f"{number}.db").path
            with closing(sqlite3.connect(copy)) as connection:
                assert connection.execute("SELECT count(*) FROM pairs WHERE one != other").fetchone() == (0,)
                counts.append(connection.execute("SELECT count(*) FROM pairs").fetchone()[0])
    finally:
        writer.kill()
        writer.wait()
        writer.stdout.close()
    assert counts == sorted(counts)
    assert counts[0] < counts[-1]


def test_back_up_replaces_a_file_only_by_force(tmp_path: Path) -> None:
    """An older backup is not lost by a mistake, nor by a failure."""
    make_storage(tmp_path)
    target = tmp_path / "copy.db"
    target.write_text("older")
    with pytest.raises(StorageError, match=r"backup: must not exist yet, got .*copy\.db; .*replace it with --force"):
        back_up(make_url(tmp_path), target)
    assert target.read_text() == "older"
    assert back_up(make_url(tmp_path), target, force=True).n_studies == 0
    assert target.read_bytes().startswith(b"SQLite format 3")


@pytest.mark.parametrize("suffix", ["-wal", "-journal"])
def test_back_up_refuses_a_name_whose_wal_is_there(tmp_path: Path, suffix: str) -> None:
    """SQLite would write an old WAL into the new copy."""
    make_storage(tmp_path)
    (tmp_path / f"copy.db{suffix}").write_text("")
    with pytest.raises(StorageError, match=rf"backup: must not be a database in use, got .* with copy\.db{suffix}"):
        back_up(make_url(tmp_path), tmp_path / "copy.db", force=True)


@pytest.mark.parametrize("kind", ["itself", "symlink", "hard link"])
def test_back_up_refuses_the_database_itself(tmp_path: Path, kind: str) -> None:
    """Whatever name it goes by."""
    make_storage(tmp_path).engine.dispose()
    database = tmp_path / "studies.db"
    target = database if kind == "itself" else tmp_path / "other.db"
    if kind == "symlink":
        target.symlink_to(database)
    elif kind == "hard link":
        os.link(database, target)
    with pytest.raises(StorageError, match="backup: must be another file than the database, got"):
        back_up(make_url(tmp_path), target, force=True)


@pytest.mark.parametrize(
    ("target", "problem"),
    [
        ("none/copy.db", "backup: must lie in a folder that exists, got"),
        (".", "backup: must be a file, got the folder"),
    ],
)
def test_back_up_refuses_places_that_cannot_hold_a_file(tmp_path: Path, target: str, problem: str) -> None:
    """A folder is not made, and not filled."""
    make_storage(tmp_path)
    with pytest.raises(StorageError, match=problem):
        back_up(make_url(tmp_path), tmp_path / target)


def test_back_up_refuses_what_is_no_database_of_optuna(tmp_path: Path) -> None:
    """A missing file is not made, and another program's is not copied."""
    with pytest.raises(StorageError, match="storage: no database at"):
        back_up(make_url(tmp_path), tmp_path / "copy.db")
    (tmp_path / "studies.db").write_text("a shopping list\n" * 100)
    with pytest.raises(StorageError, match="file is not a database"):
        back_up(make_url(tmp_path), tmp_path / "copy.db")
    assert list_names(tmp_path) == {"studies.db"}


def test_back_up_refuses_to_pass_on_damage(tmp_path: Path) -> None:
    """A page of zeros is noticed, and no copy is left."""
    make_storage(tmp_path).engine.dispose()
    with (tmp_path / "studies.db").open("r+b") as file:
        file.seek(4096 * 5)
        file.write(bytes(4096))
    with pytest.raises(StorageError, match="storage: must be undamaged, got"):
        back_up(make_url(tmp_path), tmp_path / "copy.db")
    assert "copy.db" not in list_names(tmp_path)
    assert not [name for name in list_names(tmp_path) if name.endswith(".tmp")]
