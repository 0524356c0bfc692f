"""Mirrors of small studies, and what is left in their files."""

import re
import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import optuna
import sqlalchemy
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from tuner.search.mirror import MirrorStorage
from tuner.search.storage import open_storage

NAME = "contract"
EPOCHS = 9
DISTRIBUTIONS: dict[str, BaseDistribution] = {
    "uniform": FloatDistribution(-1.0, 2.0),
    "log": FloatDistribution(1e-5, 1e-1, log=True),
    "stepped": FloatDistribution(0.0, 1.0, step=0.25),
    "int": IntDistribution(1, 9),
    "int log": IntDistribution(1, 512, log=True),
    "int stepped": IntDistribution(8, 64, step=8),
    "choice": CategoricalDistribution(["a", None, True, 3, 2.5]),
}


def make_url(folder: Path) -> str:
    """Return the URL of a database in a folder."""
    return f"sqlite:///{folder / 'studies.db'}"


@contextmanager
def open_mirror(folder: Path, name: str = NAME) -> Iterator[MirrorStorage]:
    """Open the mirror of a study, made if it is not there, as a new process would; it gives up on locks at once."""
    storage = open_storage(make_url(folder), create=True)
    sqlalchemy.event.listen(storage.engine, "connect", lambda raw, _: raw.execute("PRAGMA busy_timeout=20"))
    storage.engine.dispose()
    try:
        if name not in optuna.get_all_study_names(storage):
            optuna.create_study(storage=storage, study_name=name, direction="maximize")
        yield MirrorStorage(storage, name)
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def open_plainly(folder: Path, **load: Any) -> Iterator[optuna.Study]:
    """Open a study as any Optuna program does."""
    storage = RDBStorage(make_url(folder))
    try:
        yield optuna.load_study(storage=storage, **{"study_name": NAME, **load})
    finally:
        storage.remove_session()
        storage.engine.dispose()


def load(mirror: MirrorStorage, **extra: Any) -> optuna.Study:
    """Load a study over its mirror."""
    return optuna.load_study(storage=mirror, **{"study_name": NAME, **extra})


def describe(trials: list[FrozenTrial], *, times: bool = True) -> list[dict[str, Any]]:
    """Return all that trials hold but their ids, such that NaN equals NaN."""
    described = [{**vars(trial), "_values": repr(trial.values)} for trial in trials]
    for values in described:
        del values["_trial_id"]
        values["intermediate_values"] = {step: repr(value) for step, value in values["intermediate_values"].items()}
        if not times:
            for name in ("_datetime_start", "datetime_complete"):
                values[name] = values[name] is not None
    return described


def read_plainly(folder: Path, *, times: bool = True) -> list[dict[str, Any]]:
    """Return the trials as any Optuna program sees them."""
    with open_plainly(folder) as study:
        return describe(study.trials, times=times)


def read_rows(folder: Path) -> dict[str, list[dict[str, Any]]]:
    """Return every table's rows in their order, with SQLite's types, numbers for ids and only the shape of times."""
    with closing(sqlite3.connect(folder / "studies.db")) as connection:
        connection.row_factory = sqlite3.Row
        numbers = dict(connection.execute("SELECT trial_id, number FROM trials").fetchall())
        tables = [row[0] for row in connection.execute("SELECT name FROM sqlite_master WHERE type = 'table'")]
        return {
            table: [
                {name: strip(table, name, row[name], numbers) for name in row.keys()}  # noqa: SIM118
                for row in connection.execute(f"SELECT * FROM {table} ORDER BY rowid")  # noqa: S608
            ]
            for table in tables
            if table not in {"alembic_version", "version_info"}
        }


def strip(table: str, column: str, value: Any, numbers: dict[int, int]) -> Any:
    """Return a cell without what may differ."""
    if column == "trial_id":
        return numbers[value]
    if column.startswith("datetime_") and value is not None:
        return re.sub(r"\d", "0", value)
    is_own_id = column in {f"{table.removesuffix('s')}_id", "param_id"}
    return None if is_own_id else (type(value).__name__, value)
