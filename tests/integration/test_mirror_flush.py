"""Flushes of a mirror: one transaction, or none at all."""

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
import sqlalchemy
from optuna.samplers import RandomSampler

from tuner.errors import StorageError
from tuner.search.mirror import MirrorStorage
from tuner.search.storage import use_storage

from .mirrors import DISTRIBUTIONS, NAME, describe, load, make_url, open_mirror, open_plainly, read_plainly, read_rows


def ask_and_end(study: optuna.Study, n_trials: int, *, note: str = "") -> None:
    """Run trials that complete at once."""
    for _ in range(n_trials):
        trial = study.ask(DISTRIBUTIONS)
        trial.report(0.5, 1)
        trial.set_user_attr("note", note)
        study.tell(trial, 0.5)


@contextmanager
def lock(folder: Path) -> Iterator[None]:
    """Keep everyone else from writing."""
    with closing(sqlite3.connect(folder / "studies.db", isolation_level=None)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        yield
        connection.execute("ROLLBACK")


def test_flush_that_meets_a_lock_keeps_everything(tmp_path: Path) -> None:
    """What could not be written is written by the next flush, with what came in between, and nothing twice."""
    with open_mirror(tmp_path) as mirror:
        study = load(mirror, sampler=RandomSampler(seed=0))
        ask_and_end(study, 2)
        running = study.ask(DISTRIBUTIONS)
        mirror.flush()
        ask_and_end(study, 3)
        running.report(0.25, 1)
        with lock(tmp_path):
            for _ in range(2):
                with pytest.raises(sqlalchemy.exc.OperationalError, match="database is locked"):
                    mirror.flush()
        assert len(read_plainly(tmp_path)) == 3
        running.report(0.5, 2)
        mirror.flush()
        mirror.flush()
        assert read_plainly(tmp_path) == describe(study.trials)
        assert len(read_rows(tmp_path)["trials"]) == 6


def test_flush_that_fails_halfway_writes_nothing(tmp_path: Path) -> None:
    """A disk that fills up after the first rows takes those back, too."""
    with open_mirror(tmp_path) as mirror:
        study = load(mirror, sampler=RandomSampler(seed=0))
        ask_and_end(study, 2)
        mirror.flush()
        before = read_rows(tmp_path)
        ask_and_end(study, 1, note="x" * 1_000_000)
        with limit_size(mirror), pytest.raises(sqlalchemy.exc.OperationalError, match="is full"):
            mirror.flush()
        assert read_rows(tmp_path) == before
        mirror.flush()
        assert read_plainly(tmp_path) == describe(study.trials)


@contextmanager
def limit_size(mirror: MirrorStorage) -> Iterator[None]:
    """Let the database of a mirror grow no further."""
    engine = mirror._storage.engine

    def limit(raw: Any, _: object) -> None:
        raw.execute("PRAGMA max_page_count=1")  # SQLite takes it for the present size

    sqlalchemy.event.listen(engine, "connect", limit)
    engine.dispose()
    try:
        yield
    finally:
        sqlalchemy.event.remove(engine, "connect", limit)
        engine.dispose()


def test_flush_that_fails_is_an_error_of_the_storage(tmp_path: Path) -> None:
    """The user reads what is the matter with the file, without a traceback."""
    with open_mirror(tmp_path):
        pass
    match = r"storage: must not be locked by another program, got .*studies\.db: database is locked; end what holds it"
    with pytest.raises(StorageError, match=match), use_storage(make_url(tmp_path)) as storage:  # noqa: PT012
        sqlalchemy.event.listen(storage.engine, "connect", lambda raw, _: raw.execute("PRAGMA busy_timeout=20"))
        storage.engine.dispose()
        mirror = MirrorStorage(storage, NAME)
        load(mirror).ask(DISTRIBUTIONS)
        with lock(tmp_path):
            mirror.flush()


def test_flush_refuses_trials_of_another_program(tmp_path: Path) -> None:
    """A number is never given twice: what another program added ends the run, and the next one knows of it."""
    with open_mirror(tmp_path) as mirror:
        study = load(mirror)
        ask_and_end(study, 1)
        mirror.flush()
        with open_plainly(tmp_path) as theirs:
            theirs.enqueue_trial({"int": 3})
        ask_and_end(study, 2)
        with pytest.raises(StorageError, match=r"only the run itself may add trials .*, got 1 of another program; end"):
            mirror.flush()
    with open_mirror(tmp_path) as mirror:
        assert [trial.state.name for trial in load(mirror).trials] == ["COMPLETE", "WAITING"]


def test_flush_is_one_transaction_or_none(tmp_path: Path) -> None:
    """However much there is to write; with nothing to write the file is left alone, even locked."""
    with open_mirror(tmp_path) as mirror:
        study = load(mirror)
        commits: list[object] = []
        sqlalchemy.event.listen(mirror._storage.engine, "commit", commits.append)
        ask_and_end(study, 20)
        assert commits == []
        mirror.flush()
        assert len(commits) == 1
        with lock(tmp_path):
            mirror.flush()
        assert len(commits) == 1


@pytest.mark.parametrize("what", ["studies", "trials"])
def test_flush_says_that_the_study_was_deleted_and_writes_nothing(tmp_path: Path, what: str) -> None:
    """Rows of a study that is gone would be inherited by the next one, whose ids SQLite gives again."""
    with open_mirror(tmp_path) as mirror:
        study = load(mirror, sampler=RandomSampler(seed=0))
        running = study.ask(DISTRIBUTIONS)
        mirror.flush()
        with closing(sqlite3.connect(tmp_path / "studies.db")) as connection, connection:
            connection.execute(f"DELETE FROM {what}")  # noqa: S608 - a name of ours
        running.report(0.5, 1)
        study.tell(running, 0.5)
        with pytest.raises(StorageError, match="another program deleted it"):
            mirror.flush()
        with closing(sqlite3.connect(tmp_path / "studies.db")) as connection:
            assert connection.execute("SELECT count(*) FROM trial_values").fetchone() == (0,)
