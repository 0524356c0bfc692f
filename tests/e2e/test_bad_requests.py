"""Wrong storages, studies, trials and arguments: each mistake with its exact message and exit code."""

import os
import sqlite3
from pathlib import Path

import pytest
from optuna.storages import RDBStorage

from tests.e2e.mistakes import Prepare, expect, fail, write, write_study
from tuner.search.storage import hold_lock, open_storage, study_lock_path
from tuner.search.studies import open_study
from tuner.search.study_facts import StudyFacts
from tuner.service.study_data import read_study_data
from tuner.spec.study import load_spec

URL = "sqlite:///studies.db"
IS_ROOT = os.geteuid() == 0


def close(storage: RDBStorage) -> None:
    """Close a storage; Python 3.13 warns of databases that are left to the garbage collector."""
    storage.remove_session()
    storage.engine.dispose()


# --- storages ---


def make_foreign_database(folder: Path) -> None:
    """Write a database of another program."""
    connection = sqlite3.connect(folder / "studies.db")
    connection.execute("CREATE TABLE photos (name TEXT)")
    connection.close()


NOT_OURS = "choose another with --storage"
STORAGES: list[tuple[str, Prepare, str]] = [
    (
        "sqlite:///no/studies.db",
        bool,
        "storage: must lie in a folder that exists, got FOLDER/no/studies.db",
    ),
    (
        URL,
        make_foreign_database,
        f"storage: must be a database of Optuna, got FOLDER/studies.db with the tables photos; {NOT_OURS}",
    ),
    (
        URL,
        write("studies.db", "a shopping list\n" * 100),
        "storage: must be an SQLite database that can be used, got FOLDER/studies.db: file is not a database",
    ),
    (
        URL,
        lambda folder: (folder / "studies.db").mkdir(),
        "storage: must be an SQLite database that can be used, got FOLDER/studies.db: unable to open database file",
    ),
    (
        "sqlite:///:memory:",
        bool,
        "storage: must be an SQLite URL such as sqlite:///studies.db, got 'sqlite:///:memory:', which keeps nothing",
    ),
    (
        "studies.db",
        bool,
        "storage: must be an SQLite URL such as sqlite:///studies.db, got 'studies.db'",
    ),
    (
        "postgresql://user:secret@host/db",
        bool,
        "storage: must be an SQLite URL such as sqlite:///studies.db, got 'postgresql://***'",
    ),
    (
        "postgresql://user:secret@host:port/db",
        bool,
        "storage: must be an SQLite URL such as sqlite:///studies.db, got 'postgresql://***'",
    ),
    (
        "postgres//user:secret@host/db",
        bool,
        "storage: must be an SQLite URL such as sqlite:///studies.db, got '***'",
    ),
    (
        "sqlite:////proc/studies.db",
        bool,
        "storage: must lie in a writable folder, got /proc/studies.db.bad.lock: No such file or directory",
    ),
]


@pytest.mark.parametrize(("url", "prepare", "problem"), STORAGES)
def test_run_refuses_wrong_storages(
    folder: Path, capsys: pytest.CaptureFixture[str], url: str, prepare: Prepare, problem: str
) -> None:
    """A database that cannot be used is refused before a worker starts; no password is printed."""
    prepare(folder)
    study_file = write_study(folder, ('name = "bad"', f'name = "bad"\nstorage = "{url}"'))
    assert fail(capsys, "run", study_file, "--quiet") == (8, expect(folder, problem))


@pytest.mark.skipif(IS_ROOT, reason="root may write to every file")
def test_run_refuses_a_database_that_may_not_be_written(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A read-only database cannot hold a study."""
    close(open_storage(URL, create=True))
    (folder / "studies.db").chmod(0o400)
    problem = "storage: must be writable, got FOLDER/studies.db; choose another file with --storage"
    assert fail(capsys, "run", write_study(folder)) == (8, expect(folder, problem))


# --- studies ---


def store_study(folder: Path) -> None:
    """Store the good study as a run would that was stopped before its first trial."""
    spec = load_spec(write_study(folder))
    data = read_study_data(spec)
    facts = StudyFacts(
        data_hash=data.hash,
        classes=data.index.classes,
        splits="",
        split_counts={"train": 10, "val": 2, "test": 0},
        group_counts={"test_resnet": 6},
        weights={"test_resnet": "random"},
        preprocessing={},
        versions={},
    )
    storage = open_storage(URL, create=True)
    open_study(storage, spec, facts)
    close(storage)


def test_run_refuses_a_study_that_is_running(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two coordinators of one study would count twice."""
    study_file = write_study(folder)
    with hold_lock(study_lock_path(URL, "bad")):
        result = fail(capsys, "run", study_file)
    assert result == (4, "error: study 'bad': must not be running already; another 'tuner run' holds it\n")


def test_run_refuses_a_study_that_has_changed(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What trials depend on must be as it was; each difference has a line with both values."""
    store_study(folder)
    study_file = write_study(folder, ("epochs = 1", "epochs = 2"), ("batch_size = 4", "batch_size = 5"))
    code, said = fail(capsys, "run", study_file, "--quiet")
    assert code == 4
    first, *changes = said.splitlines()
    assert first.startswith("error: study 'bad': the stored study must be the study file's, but these differ (restore ")
    assert changes == [
        "  training.batch_size: 4 in the study, 5 in the study file",
        "  training.epochs: 1 in the study, 2 in the study file",
    ]


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (("status", "bda"), 4, "study 'bda': must be in the storage; did you mean 'bad'?"),
        (("trials", "x"), 4, "study 'x': must be in the storage; the storage holds bad"),
        (("best", "x"), 4, "study 'x': must be in the storage; the storage holds bad"),
        (("show", "x", "0"), 4, "study 'x': must be in the storage; the storage holds bad"),
        (("delete", "x"), 4, "study 'x': must be in the storage; the storage holds bad"),
        (("show", "bad", "7"), 4, "trial 7: must be a trial of study 'bad', which has 0 trials"),
        (("best", "bad"), 7, "study 'bad': at least one trial must have completed, got none; 'tuner run' goes on"),
        (
            ("status", "bad", "--storage", "sqlite:///other.db"),
            8,
            "storage: no database at FOLDER/other.db; 'tuner run STUDY_FILE' makes one, --storage names another",
        ),
    ],
)
def test_commands_refuse_unknown_studies_and_trials(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, problem: str
) -> None:
    """A name that is not in the storage is met with those that are."""
    store_study(folder)
    assert fail(capsys, *arguments) == (code, expect(folder, problem))


# --- other commands ---


@pytest.mark.parametrize(
    ("arguments", "code", "problem"),
    [
        (
            ("list",),
            8,
            "storage: no database at FOLDER/studies.db; 'tuner run STUDY_FILE' makes one, --storage names another",
        ),
        (
            ("predict", "images", "images/cat/0.png"),
            7,
            "images: must be a model folder with a model.json, got none; 'tuner train' writes one",
        ),
        (("init", "imagse"), 5, "data.path: must be an existing folder, got 'FOLDER/imagse'"),
        (("init", "images", "--out", "study.toml"), 3, "study.toml: must not exist yet; --out names another file"),
        (
            ("init", "images", "--out", "no/new.toml"),
            3,
            "no/new.toml: must be a file that can be written, got: No such file or directory",
        ),
    ],
)
def test_commands_refuse_wrong_paths(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], code: int, problem: str
) -> None:
    """A path that does not fit the command is named."""
    write_study(folder)
    assert fail(capsys, *arguments) == (code, expect(folder, problem))


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (
            ("run", "study.toml", "--timeout", "soon"),
            'Invalid value for --timeout: must be a duration such as "2h", "90m" or "1h30m", got \'soon\'',
        ),
        (("run", "study.toml", "--trials", "0"), "Invalid value for '--trials': 0 is not in the range x>=1."),
        (("run", "study.toml", "--trails", "3"), "No such option '--trails'. Did you mean '--trials'?"),
        (("checkk", "study.toml"), "No such command 'checkk'. Did you mean 'check'?"),
        (("show", "bad", "first"), "Invalid value for 'NUMBER': 'first' is not a valid integer range."),
    ],
)
def test_commands_refuse_wrong_arguments(
    folder: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], problem: str
) -> None:
    """What click refuses comes with the usage and exit code 2."""
    write_study(folder)
    code, said = fail(capsys, *arguments)
    assert code == 2
    assert said.startswith("Usage: tuner")
    assert said.splitlines()[-1] == f"Error: {problem}"
