"""Real faults under a real database: full and read-only disks, torn WALs, files that are swapped, other Optunas."""

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.samplers import RandomSampler

from tuner.errors import StorageError
from tuner.search.backup import back_up
from tuner.search.mirror import MirrorStorage
from tuner.search.patience import Patience
from tuner.search.storage import hold_lock, open_storage, study_lock_path, use_storage

from .mirrors import DISTRIBUTIONS, NAME, describe, load, make_url, open_mirror, open_plainly, read_plainly

_RUN = """
import os, signal, sys
from pathlib import Path
import optuna
from tests.integration.mirrors import DISTRIBUTIONS, load, open_mirror
with open_mirror(Path(sys.argv[1])) as mirror:
    study = load(mirror, sampler=optuna.samplers.RandomSampler(seed=0))
    for _ in range(12):
        trial = study.ask(DISTRIBUTIONS)
        mirror.flush()
        trial.report(0.5, 1)
        study.tell(trial, 0.5)
        mirror.flush()
    os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of two megabytes."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", folder], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("only root may mount a disk")
    yield folder
    subprocess.run(["umount", "--lazy", folder], check=True)


def ask_and_end(study: optuna.Study, n_trials: int, *, note: str = "") -> None:
    """Run trials that complete at once."""
    for _ in range(n_trials):
        trial = study.ask(DISTRIBUTIONS)
        trial.set_user_attr("note", note)
        study.tell(trial, 0.5)


def check_integrity(folder: Path) -> str:
    """Return what SQLite thinks of a database."""
    with closing(sqlite3.connect(folder / "studies.db")) as connection:
        return str(connection.execute("PRAGMA integrity_check").fetchone()[0])


def execute(folder: Path, *statements: str) -> None:
    """Change a database behind our back."""
    with closing(sqlite3.connect(folder / "studies.db")) as connection, connection:
        for statement in statements:
            connection.execute(statement)


def test_flush_waits_for_room_on_a_full_disk_and_loses_nothing(small_disk: Path) -> None:
    """The disk fills inside a commit; once the user has made room the same rows are written, each once."""
    notes: list[str] = []
    ballast = small_disk / "ballast"

    def make_room(_: float) -> None:
        if notes:  # the user reads it, and acts
            assert check_integrity(small_disk) == "ok"
            ballast.unlink(missing_ok=True)

    clock = iter(range(1000))
    patience = Patience(small_disk / "studies.db", note=notes.append, clock=lambda: float(next(clock)), sleep=make_room)
    with open_mirror(small_disk):
        pass
    with use_storage(make_url(small_disk)) as storage:
        mirror = MirrorStorage(storage, NAME, patience)
        study = load(mirror, sampler=RandomSampler(seed=0))
        ask_and_end(study, 3)
        mirror.flush()
        fill(ballast)
        ask_and_end(study, 1, note="x" * 300_000)
        mirror.flush()
        mirror.flush()
        expected = describe(study.trials)
    assert notes[0].startswith("storage: must have room on its disk, got ")
    assert notes[0].endswith(
        "database or disk is full; make room, then run the same command again; trying again for 60 s"
    )
    assert notes[1:] == ["the database can be used again"]
    assert read_plainly(small_disk) == expected
    assert check_integrity(small_disk) == "ok"


def fill(ballast: Path) -> None:
    """Take what a disk has left."""
    with ballast.open("wb", buffering=0) as file:
        try:
            while file.write(bytes(4096)):
                pass
        except OSError:
            return


def test_open_storage_says_at_once_that_a_disk_is_read_only_or_full(small_disk: Path) -> None:
    """Before anything expensive, for a database that is there and for a new one, of which nothing is left."""
    with open_mirror(small_disk) as mirror:
        ask_and_end(load(mirror), 2)
        mirror.flush()
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    with pytest.raises(StorageError, match=r"storage: must be writable, got .*studies\.db; choose another file"):
        open_storage(make_url(small_disk), create=True)
    lock = hold_lock(study_lock_path(make_url(small_disk), NAME))
    with pytest.raises(StorageError, match=r"storage: must lie in a writable folder, got .*Read-only"), lock:
        pass
    subprocess.run(["mount", "-o", "remount,rw", small_disk], check=True)
    fill(small_disk / "ballast")
    match = r"storage: must (have room|lie) on .*disk.*\.db: d.*; (make|see)"
    for url in (make_url(small_disk), f"sqlite:///{small_disk / 'new.db'}"):
        with pytest.raises(StorageError, match=match):
            open_storage(url, create=True)
    assert not [path for path in small_disk.iterdir() if "new" in path.name]


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the database, and all of its WAL, of a run of 12 trials that was killed."""
    folder = tmp_path_factory.mktemp("killed")
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", _RUN, folder], cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == -9, done.stderr
    assert (folder / "studies.db-wal").stat().st_size > 24 * 4120
    return folder


@pytest.mark.parametrize("how", ["cut", "garbled", "zeroed"])
@pytest.mark.parametrize("share", [0.999, 0.9, 0.6, 0.3])
def test_torn_wal_costs_the_last_commits_and_no_more(killed: Path, tmp_path: Path, how: str, share: float) -> None:
    """SQLite goes back to the last whole commit: no trial is half there, and the run goes on to the exact count."""
    for name in ("studies.db", "studies.db-wal"):
        shutil.copy(killed / name, tmp_path)
    tear(tmp_path / "studies.db-wal", how=how, share=share)
    assert check_integrity(tmp_path) == "ok"
    with open_mirror(tmp_path) as mirror:
        study = load(mirror, sampler=RandomSampler(seed=1))
        left = study.get_trials()
        assert len(left) < 13 - (share < 0.9)
        for trial in left:
            assert len(trial.params) == len(DISTRIBUTIONS)
            assert (
                (trial.state.name == "COMPLETE") == (trial.values == [0.5]) == (trial.intermediate_values == {1: 0.5})
            )
        for trial in left:
            if trial.state.name == "RUNNING":
                study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
        ask_and_end(study, 12 - sum(trial.state.name == "COMPLETE" for trial in left))
        mirror.flush()
    with open_plainly(tmp_path) as plain:
        states = [trial.state.name for trial in plain.trials]
    assert states.count("COMPLETE") == 12
    assert "RUNNING" not in states
    assert check_integrity(tmp_path) == "ok"


def tear(wal: Path, *, how: str, share: float) -> None:
    """Damage a WAL from some share of its length on."""
    content = wal.read_bytes()
    start = int(len(content) * share)
    rest = {"cut": b"", "garbled": os.urandom(len(content) - start), "zeroed": bytes(len(content) - start)}[how]
    wal.write_bytes(content[:start] + rest)


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_run_ends_when_its_database_is_no_longer_there(tmp_path: Path, how: str) -> None:
    """Nothing is written into a file that has no name, nor does our WAL flow into the file that took the name."""
    with open_mirror(tmp_path) as mirror:
        study = load(mirror, sampler=RandomSampler(seed=0))
        ask_and_end(study, 2)
        mirror.flush()
        backup = back_up(make_url(tmp_path), tmp_path / "backup.db").path
        ask_and_end(study, 40)
        mirror.flush()
        old = (tmp_path / "studies.db").rename(tmp_path / "moved.db")
        if how == "replaced":
            shutil.copy(backup, tmp_path / "studies.db")
        ask_and_end(study, 1)
        match = r"storage: the database of a run must stay in its place, got .*studies\.db removed or replaced; put it"
        for _ in range(2):
            with pytest.raises(StorageError, match=match):
                mirror.flush()
    if how == "replaced":
        assert len(read_plainly(tmp_path)) == 2
        assert check_integrity(tmp_path) == "ok"
    else:
        assert not (tmp_path / "studies.db").exists()
    with closing(sqlite3.connect(old)) as connection:
        assert connection.execute("SELECT count(*) FROM trials").fetchone() == (42,)


def test_database_of_optuna_4_goes_on(tmp_path: Path) -> None:
    """The schema is the same; its times, which are local, read as others and change nothing else."""
    theirs = optuna.create_study(storage=make_url(tmp_path), study_name=NAME, direction="maximize")
    theirs.tell(theirs.ask(DISTRIBUTIONS), 0.25)
    theirs._storage._backend.engine.dispose()  # type: ignore[attr-defined] # the storage below Optuna's cache
    execute(
        tmp_path,
        "UPDATE version_info SET library_version = '4.9.0'",
        "UPDATE trials SET datetime_start = '2026-01-01 10:00:00', datetime_complete = '2026-01-01 10:00:01'",
    )
    with open_mirror(tmp_path) as mirror:
        ask_and_end(load(mirror), 1)
        mirror.flush()
    assert [trial["_values"] for trial in read_plainly(tmp_path)] == ["[0.25]", "[0.5]"]
    assert check_integrity(tmp_path) == "ok"


@pytest.mark.parametrize("create", [True, False])
@pytest.mark.parametrize(
    ("revision", "advice"), [("v9.9.9.a", "pip install -U optuna"), ("v2.6.0.a", "optuna storage upgrade")]
)
def test_database_of_another_schema_is_refused_with_one_line(
    tmp_path: Path, revision: str, advice: str, *, create: bool
) -> None:
    """A newer or older schema is not written to."""
    open_storage(make_url(tmp_path), create=True).engine.dispose()
    execute(tmp_path, f"UPDATE alembic_version SET version_num = '{revision}'")  # noqa: S608 - a word of ours
    before = (tmp_path / "studies.db").read_bytes()
    with pytest.raises(StorageError, match=f"must be a database that Optuna 5 can use, got .*{advice}") as caught:
        open_storage(make_url(tmp_path), create=create)
    assert "\n" not in str(caught.value)
    assert (tmp_path / "studies.db").read_bytes() == before


def test_study_attributes_wait_for_a_lock_too(tmp_path: Path) -> None:
    """A sampler that keeps its place in the study does not end the run."""
    with open_mirror(tmp_path):
        pass
    locker = sqlite3.connect(tmp_path / "studies.db", isolation_level=None)
    with closing(locker), use_storage(make_url(tmp_path), busy_seconds=0.05) as storage:

        def unlock(_: float) -> None:
            locker.execute("ROLLBACK")

        patience = Patience(tmp_path, note=lambda _: None, sleep=unlock)
        mirror = MirrorStorage(storage, NAME, patience)
        study = load(mirror)
        locker.execute("BEGIN EXCLUSIVE")
        study.set_user_attr("one", 1)
        locker.execute("BEGIN EXCLUSIVE")
        mirror.set_study_system_attr(mirror.get_study_id_from_name(NAME), "two", 2)
    with open_plainly(tmp_path) as plain:
        assert plain.user_attrs == {"one": 1}
        assert plain._storage.get_study_system_attrs(plain._study_id)["two"] == 2


def test_half_made_database_of_a_killed_run_is_made_anew(tmp_path: Path) -> None:
    """The schema is made aside, so that a kill leaves nothing at the database's path."""
    (tmp_path / ".studies.db.new").write_text("half a schema")
    (tmp_path / ".studies.db.new-journal").write_text("its journal")
    open_storage(make_url(tmp_path), create=True).engine.dispose()
    assert {path.name for path in tmp_path.iterdir()} == {"studies.db"}
    assert check_integrity(tmp_path) == "ok"
