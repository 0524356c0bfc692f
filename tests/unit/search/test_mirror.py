"""Tests of tuner.search.mirror; that it writes what Optuna writes is in tests/integration."""

import shutil
import sqlite3
from contextlib import closing
from pathlib import Path

import optuna
import pytest
from optuna.distributions import BaseDistribution, FloatDistribution, IntDistribution
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import create_trial

from tuner.errors import StorageError
from tuner.search.mirror import MirrorStorage

from .builders import make_storage, read_plainly

LR: dict[str, BaseDistribution] = {"lr": FloatDistribution(0.0, 1.0)}


def open_mirrored(folder: Path) -> tuple[MirrorStorage, optuna.Study]:
    """Open the mirror of a study, made if it is not there, and the study over it."""
    storage = make_storage(folder)
    if not optuna.get_all_study_names(storage):
        optuna.create_study(storage=storage, study_name="small")
    mirror = MirrorStorage(storage, "small")
    return mirror, optuna.load_study(storage=mirror, study_name="small")


def test_mirror_needs_a_stored_study(tmp_path: Path) -> None:
    """It opens studies, it makes and deletes none."""
    mirror, study = open_mirrored(tmp_path)
    with pytest.raises(KeyError, match="Record does not exist"):
        MirrorStorage(make_storage(tmp_path), "other")
    with pytest.raises(NotImplementedError, match="a mirror makes no studies"):
        optuna.create_study(storage=mirror, study_name="other")
    with pytest.raises(NotImplementedError, match="a mirror deletes no studies"):
        optuna.delete_study(storage=mirror, study_name="small")
    with pytest.raises(KeyError, match="no study 7 in this mirror"):
        mirror.get_all_trials(7)
    assert study.trials == []


def test_mirror_refuses_a_study_with_gaps(tmp_path: Path) -> None:
    """Numbers stand for ids here, so a file that another tool took trials out of is not guessed at."""
    mirror, _ = open_mirrored(tmp_path)
    for _ in range(2):
        mirror.create_new_trial(mirror.get_study_id_from_name("small"))
    mirror.flush()
    storage = make_storage(tmp_path)
    with storage.engine.begin() as connection:
        connection.exec_driver_sql("DELETE FROM trials WHERE number = 0")
    with pytest.raises(StorageError, match="trials must be numbered from 0 without gaps, got others in study 'small'"):
        MirrorStorage(storage, "small")


def test_mirror_passes_study_attributes_through(tmp_path: Path) -> None:
    """They are in the file at once, and what another process writes is seen at once."""
    mirror, study = open_mirrored(tmp_path)
    study.set_user_attr("spec", [1])
    theirs = read_plainly(tmp_path)
    assert theirs.user_attrs == {"spec": [1]}
    theirs.set_user_attr("note", "theirs")
    assert study.user_attrs == {"spec": [1], "note": "theirs"}
    assert [summary.study_name for summary in mirror.get_all_studies()] == ["small"]


def test_mirror_keeps_attributes_as_json_gives_them_back(tmp_path: Path) -> None:
    """A value that changes after it was set changes nothing, and a tuple is the list that the file will hold."""
    mirror, study = open_mirrored(tmp_path)
    trial = study.ask(LR)
    cells = [(1, 2)]
    trial.set_user_attr("cells", cells)
    study.add_trial(create_trial(value=0.5, user_attrs={"cells": cells}, system_attrs={"cells": cells}))
    cells.append((3, 4))
    asked, added = study.trials
    assert asked.user_attrs == added.user_attrs == added.system_attrs == {"cells": [[1, 2]]}
    mirror.flush()
    assert [stored.user_attrs for stored in read_plainly(tmp_path).trials] == [{"cells": [[1, 2]]}] * 2


def test_mirror_refuses_attributes_that_are_no_json(tmp_path: Path) -> None:
    """They are refused where they are set, and leave nothing behind that a flush would stumble over."""
    mirror, study = open_mirrored(tmp_path)
    trial = study.ask(LR)
    with pytest.raises(TypeError, match="not JSON serializable"):
        trial.set_user_attr("path", tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        mirror.set_trial_system_attr(trial.number, "path", tmp_path)
    with pytest.raises(TypeError, match="not JSON serializable"):
        study.enqueue_trial({"lr": 0.5}, user_attrs={"path": tmp_path})
    mirror.flush()
    (stored,) = read_plainly(tmp_path).trials
    assert (stored.user_attrs, stored.system_attrs) == ({}, {})


@pytest.mark.parametrize("is_reopened", [False, True])
def test_mirror_refuses_another_kind_of_distribution(tmp_path: Path, is_reopened: bool) -> None:
    """A param keeps its kind through the study, whether it was asked for or added, now or in an earlier run."""
    mirror, study = open_mirrored(tmp_path)
    study.add_trial(create_trial(value=0.5, params={"lr": 0.5}, distributions=LR))
    study.ask({"depth": IntDistribution(1, 3)})
    mirror.flush()
    if is_reopened:
        mirror, study = open_mirrored(tmp_path)
    with pytest.raises(ValueError, match="Cannot set different distribution kind"):
        study.ask({"lr": IntDistribution(0, 1)})
    with pytest.raises(ValueError, match="Cannot set different distribution kind"):
        study.add_trial(
            create_trial(value=0.5, params={"depth": 0.5}, distributions={"depth": FloatDistribution(0.0, 1.0)})
        )
    assert study.ask({"lr": FloatDistribution(0.0, 2.0)}).number == 3


def test_mirror_changes_no_finished_trial(tmp_path: Path) -> None:
    """As with Optuna's storage: neither memory nor file is touched."""
    mirror, study = open_mirrored(tmp_path)
    trial = study.ask(LR)
    study.tell(trial, 0.5)
    with pytest.raises(UpdateFinishedTrialError, match="has already finished"):
        trial.set_user_attr("late", 1)
    with pytest.raises(UpdateFinishedTrialError, match="has already finished"):
        trial.report(0.25, 1)
    mirror.flush()
    (stored,) = read_plainly(tmp_path).trials
    assert (stored.value, stored.user_attrs, stored.intermediate_values) == (0.5, {}, {})


@pytest.mark.parametrize("how", ["removed", "replaced"])
def test_mirror_notices_that_its_wal_was_taken_away(tmp_path: Path, how: str) -> None:
    """Commits into a file without a name would be gone with the process: what is stored is saved, and the run ends."""
    mirror, study = open_mirrored(tmp_path)
    study.tell(study.ask(LR), 0.5)
    mirror.flush()
    wal = tmp_path / "studies.db-wal"
    wal.unlink()
    if how == "replaced":
        wal.touch()
    study.tell(study.ask(LR), 0.5)
    for _ in range(2):
        with pytest.raises(
            StorageError, match=r"must stay in its place, got .*studies\.db-wal removed or replaced; end"
        ):
            mirror.flush()
    (tmp_path / "killed").mkdir()
    killed = Path(shutil.copy(tmp_path / "studies.db", tmp_path / "killed"))
    with closing(sqlite3.connect(killed)) as connection:
        assert connection.execute("SELECT state FROM trials").fetchall() == [("COMPLETE",)]


def test_mirror_takes_the_wal_of_a_new_connection(tmp_path: Path) -> None:
    """SQLite itself removes a WAL with the last connection; that is no fault."""
    mirror, study = open_mirrored(tmp_path)
    for _ in range(2):
        study.tell(study.ask(LR), 0.5)
        mirror.flush()
        mirror._storage.remove_session()
        mirror._storage.engine.dispose()
        assert not (tmp_path / "studies.db-wal").exists()
    assert len(read_plainly(tmp_path).trials) == 2


def test_mirror_says_in_one_line_that_its_file_is_out_of_reach(tmp_path: Path) -> None:
    """Where links lead in a circle, the file system says neither that the file is there nor that it is not."""
    (tmp_path / "disk").mkdir()
    mirror, study = open_mirrored(tmp_path / "disk")
    (tmp_path / "disk").rename(tmp_path / "elsewhere")
    (tmp_path / "disk").symlink_to(tmp_path / "disk")
    study.tell(study.ask(LR), 0.5)
    with pytest.raises(StorageError, match=r"storage: must lie where it can be read .*studies\.db: Too many levels"):
        mirror.flush()
