"""Tests of tuner.search.storage."""

import errno
import os
import re
import sqlite3
import subprocess
import sys
import time
from pathlib import Path

import optuna
import pytest
import sqlalchemy
from optuna.storages import RDBStorage

from tuner.errors import StorageBusyError, StorageError
from tuner.search.storage import (
    check_owner,
    find_database,
    hold_lock,
    open_storage,
    resolve_url,
    schema_lock_path,
    study_lock_path,
    study_slug,
    use_storage,
)

from .builders import keep, make_storage, make_url

_HOLD = """
import subprocess, sys
from pathlib import Path
from tuner.search.storage import hold_lock
with hold_lock(Path(sys.argv[1])) as is_free:
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"], close_fds=False)
    print(is_free, child.pid, flush=True)
    sys.stdin.read()
"""


def ask(url: str, statement: str) -> object:
    """Return the first cell of a statement's answer, through an engine of ``open_storage``."""
    with keep(open_storage(url)).engine.connect() as connection:
        return connection.execute(sqlalchemy.text(statement)).scalar()


@pytest.mark.parametrize(
    ("given", "from_spec", "environment", "expected"),
    [
        ("sqlite:///a.db", "sqlite:///b.db", "sqlite:///c.db", "sqlite:///a.db"),
        (None, "sqlite:///b.db", "sqlite:///c.db", "sqlite:///b.db"),
        (None, None, "sqlite:///c.db", "sqlite:///c.db"),
        (None, None, "", "sqlite:///studies.db"),
    ],
)
def test_resolve_url_prefers_the_nearest_word(
    given: str | None, from_spec: str | None, environment: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Command line, then study file, then environment, then the default."""
    monkeypatch.setenv("TUNER_STORAGE", environment)
    assert resolve_url(given, from_spec) == expected


def test_find_database_is_relative_to_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Three slashes are relative, four absolute."""
    monkeypatch.chdir(tmp_path)
    assert find_database("sqlite:///a/b.db") == tmp_path / "a/b.db"
    assert find_database("sqlite:////a/b.db") == Path("/a/b.db")


@pytest.mark.parametrize(
    ("url", "got"),
    [
        ("studies.db", "got 'studies.db'"),
        ("sqlite://", "which keeps nothing"),
        ("sqlite:///:memory:", "which keeps nothing"),
        ("mysql://localhost/x", "got 'mysql://***'"),
        ("sqlite:///a\0b", r"in UTF-8 and without NUL, got 'sqlite:///a\x00b'"),
        ("sqlite:///a%00b", "without NUL, got 'sqlite:///a%00b'"),
        ("sqlite:///a\udcff", r"in UTF-8 and without NUL, got 'sqlite:///a\udcff'"),
    ],
)
def test_find_database_refuses_what_is_no_file(url: str, got: str) -> None:
    """Only a file on this machine can be locked and resumed."""
    with pytest.raises(StorageError, match=r"storage: must be an SQLite URL such as sqlite:///studies\.db") as caught:
        find_database(url)
    assert got in str(caught.value)


@pytest.mark.parametrize("url", ["postgresql://user:secret@host/db", "postgresql+psycopg2://user:secret@host:5432/db"])
def test_find_database_hides_passwords(url: str) -> None:
    """A password in a URL is not printed."""
    with pytest.raises(StorageError, match="storage: must be an SQLite URL") as caught:
        find_database(url)
    assert "secret" not in str(caught.value)


def test_open_storage_sets_wal_and_normal_sync(tmp_path: Path) -> None:
    """Readers do not block the writer, a commit does not wait for the disk, and a busy database is waited for."""
    url = make_url(tmp_path)
    make_storage(tmp_path)
    assert ask(url, "PRAGMA journal_mode") == "wal"
    assert ask(url, "PRAGMA synchronous") == 1
    assert ask(url, "PRAGMA busy_timeout") == 60000


def test_open_storage_opens_what_it_made(tmp_path: Path) -> None:
    """A study stays, however often the storage is opened, with and without leave to create."""
    optuna.create_study(storage=make_storage(tmp_path), study_name="a")
    assert optuna.get_all_study_names(storage=make_storage(tmp_path)) == ["a"]
    assert optuna.get_all_study_names(storage=keep(open_storage(make_url(tmp_path)))) == ["a"]


def test_open_storage_takes_a_database_that_optuna_made(tmp_path: Path) -> None:
    """Another Optuna program's database can hold our studies too."""
    optuna.create_study(storage=keep(RDBStorage(make_url(tmp_path))), study_name="theirs")
    assert optuna.get_all_study_names(storage=make_storage(tmp_path)) == ["theirs"]
    assert ask(make_url(tmp_path), "PRAGMA journal_mode") == "wal"


def test_open_storage_makes_nothing_to_read(tmp_path: Path) -> None:
    """Reading a database that is not there says who makes one, and leaves no file."""
    problem = f"storage: no database at {tmp_path / 'studies.db'}; 'tuner run STUDY_FILE' makes one, --storage names"
    with pytest.raises(StorageError, match=re.escape(problem)):
        open_storage(make_url(tmp_path))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("create", [True, False])
def test_open_storage_refuses_a_database_of_another_program(tmp_path: Path, *, create: bool) -> None:
    """Tables of another program are left alone."""
    connection = sqlite3.connect(tmp_path / "studies.db")
    connection.execute("CREATE TABLE photos (name TEXT)")
    connection.commit()
    connection.close()
    before = (tmp_path / "studies.db").read_bytes()
    with pytest.raises(StorageError, match=r"storage: must be a database of Optuna, got .* with the tables photos;"):
        open_storage(make_url(tmp_path), create=create)
    assert (tmp_path / "studies.db").read_bytes() == before


@pytest.mark.parametrize("create", [True, False])
def test_open_storage_refuses_a_file_that_is_no_database(tmp_path: Path, *, create: bool) -> None:
    """A text file is not written over."""
    (tmp_path / "studies.db").write_text("a shopping list, long enough to be no empty database\n" * 20)
    with pytest.raises(StorageError, match=r"storage: must be an SQLite database .*: file is not a database"):
        open_storage(make_url(tmp_path), create=create)
    assert (tmp_path / "studies.db").read_text().startswith("a shopping list")


def test_open_storage_refuses_a_missing_folder(tmp_path: Path) -> None:
    """A database is not made in a folder that nobody made."""
    with pytest.raises(StorageError, match="storage: must lie in a folder that exists, got"):
        open_storage(f"sqlite:///{tmp_path}/missing/studies.db", create=True)


def test_open_storage_refuses_a_path_below_a_file(tmp_path: Path) -> None:
    """A file is no folder."""
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="storage: must lie in a folder that exists, got"):
        open_storage(f"sqlite:///{tmp_path}/file/studies.db", create=True)


def test_open_storage_refuses_what_it_may_not_write() -> None:
    """Nobody may write to /proc, root included."""
    with pytest.raises(
        StorageError, match=r"storage: must be (writable|an SQLite database that can be used), got /proc/"
    ):
        open_storage("sqlite:////proc/studies.db", create=True)


def test_hold_lock_has_one_holder(tmp_path: Path) -> None:
    """A second holder is refused until the first lets go."""
    with hold_lock(tmp_path / "a.lock") as first:
        assert first
        with hold_lock(tmp_path / "a.lock") as second:
            assert not second
        with hold_lock(tmp_path / "b.lock") as other:
            assert other
    with hold_lock(tmp_path / "a.lock") as third:
        assert third


def test_hold_lock_ends_with_its_process_though_a_child_lives(tmp_path: Path) -> None:
    """After SIGKILL the lock is free at once: the holder's children have not inherited it."""
    path = tmp_path / "a.lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", _HOLD, str(path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout is not None
    assert holder.stdin is not None
    is_free, child = holder.stdout.readline().split()
    assert is_free == "True"
    try:
        with hold_lock(path) as taken:
            assert not taken
        holder.kill()
        holder.wait()
        with hold_lock(path) as freed:
            assert freed
    finally:
        subprocess.run(["kill", child], check=True)
        holder.stdin.close()
        holder.stdout.close()


def test_hold_lock_waits(tmp_path: Path) -> None:
    """With ``wait`` the second holder gets the lock when the first ends."""
    script = "import sys, time\nfrom pathlib import Path\nfrom tuner.search.storage import hold_lock\n"
    script += "with hold_lock(Path(sys.argv[1])):\n    print(flush=True)\n    time.sleep(0.5)\n"
    with subprocess.Popen([sys.executable, "-c", script, str(tmp_path / "a.lock")], stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        started = time.monotonic()
        with hold_lock(tmp_path / "a.lock", wait=True) as taken:
            assert taken
        assert time.monotonic() - started > 0.2


def test_hold_lock_says_where_it_cannot_be_made(tmp_path: Path) -> None:
    """A folder that is missing or may not be written is the storage's problem."""
    problem = r"storage: must lie in a writable folder, got .*: No such file or directory"
    with pytest.raises(StorageError, match=problem), hold_lock(tmp_path / "missing/a.lock"):
        pass


def test_study_slug_keeps_readable_names() -> None:
    """Names that are good file names stay as they are."""
    assert study_slug("pets-2_b") == "pets-2_b"
    assert re.fullmatch(r"猫-[0-9a-f]{8}", study_slug("猫"))


def test_study_slug_tells_names_apart() -> None:
    """Names that differ only in what a file name cannot hold, or far behind, get different slugs."""
    names = ["a b", "a/b", "a.b", "a_b", "..", ".", "/", "a" * 60, "a" * 61, "a" * 62, "A b"]
    slugs = [study_slug(name) for name in names]
    assert len(set(slugs)) == len(names)
    assert all(re.fullmatch(r"[\w-]{1,70}", slug) for slug in slugs)


def test_lock_paths_lie_beside_the_database(tmp_path: Path) -> None:
    """Each study has a lock of its own, and the schema has one that no study's can be."""
    url = make_url(tmp_path)
    assert schema_lock_path(url) == tmp_path / "studies.db.lock"
    assert study_lock_path(url, "a b").parent == tmp_path
    assert study_lock_path(url, "a b") != study_lock_path(url, "a_b") != schema_lock_path(url)


def test_open_storage_takes_paths_with_the_characters_of_urls(tmp_path: Path) -> None:
    """The database lies where its path says, whatever is in it."""
    folder = tmp_path / "odd ?#% dir"
    folder.mkdir()
    storage = keep(open_storage(f"sqlite:///{folder}/studies.db".replace("?", "%3F"), create=True))
    optuna.create_study(storage=storage, study_name="here")
    assert [path.name for path in tmp_path.iterdir()] == [folder.name]
    with sqlite3.connect(folder / "studies.db") as connection:
        assert connection.execute("SELECT study_name FROM studies").fetchall() == [("here",)]
    connection.close()


def test_lock_paths_are_the_same_through_a_link(tmp_path: Path) -> None:
    """Two runs that name one database differently exclude each other all the same."""
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "studies.db").symlink_to(tmp_path / "studies.db")
    linked, direct = make_url(tmp_path / "folder"), make_url(tmp_path)
    assert study_lock_path(linked, "a") == study_lock_path(direct, "a")
    assert schema_lock_path(linked) == schema_lock_path(direct)


@pytest.mark.parametrize("create", [True, False])
def test_open_storage_says_in_one_line_that_a_path_is_too_long(tmp_path: Path, *, create: bool) -> None:
    """What the file system says of a path is the storage's problem, whoever asks."""
    match = r"storage: must lie where it can be read and written, got .*: File name too long; see to its folder"
    with pytest.raises(StorageError, match=match):
        open_storage(f"sqlite:///{tmp_path}/{'a' * 300}.db", create=create)
    with pytest.raises(StorageError, match=match):
        check_owner(tmp_path / ("a" * 300))


def test_open_storage_says_in_one_line_that_a_file_cannot_be_moved_into_place(tmp_path: Path) -> None:
    """A folder where the new file is made is in the way."""
    (tmp_path / ".studies.db.new").mkdir()
    with pytest.raises(StorageError, match=r"storage: must lie where it can be read and written, got .*/studies\.db:"):
        open_storage(make_url(tmp_path), create=True)


def test_hold_lock_says_in_one_line_that_a_disk_keeps_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Some network disks have none; waiting may help."""

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("fcntl.flock", refuse)
    with (
        pytest.raises(StorageBusyError, match=r"storage: must lie where it can .*/a\.lock: No locks available; see to"),
        hold_lock(tmp_path / "a.lock"),
    ):
        pass


def test_use_storage_lets_other_files_failures_through(tmp_path: Path) -> None:
    """A pipe that breaks while a database is open is no fault of the database."""
    with pytest.raises(BrokenPipeError), use_storage(make_url(tmp_path), create=True):
        raise BrokenPipeError


def test_lock_paths_bear_links_in_a_circle(tmp_path: Path) -> None:
    """They are refused where the database is opened."""
    (tmp_path / "studies.db").symlink_to(tmp_path / "studies.db")
    assert study_lock_path(make_url(tmp_path), "a").name == "studies.db.a.lock"
