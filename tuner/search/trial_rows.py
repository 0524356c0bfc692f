"""The rows of Optuna's trial tables, written many to a transaction. Pinned to optuna >=5,<6 by a contract test.

All that knows Optuna's tables is here. What a row holds follows ``optuna.storages.RDBStorage``: times in naive UTC,
params in their internal representation, and values that are not finite as a type without a number.
"""

from collections.abc import Mapping
from datetime import UTC, datetime
from typing import Any

import sqlalchemy
from optuna.distributions import BaseDistribution, distribution_to_json
from optuna.storages._rdb import models
from optuna.trial import FrozenTrial
from sqlalchemy.dialects import sqlite

from tuner.errors import StorageError

_TRIALS = models.TrialModel.__table__
_STUDIES = models.StudyModel.__table__
_PARAMS = models.TrialParamModel.__table__
_VALUES = models.TrialValueModel.__table__
_INTERMEDIATE_VALUES = models.TrialIntermediateValueModel.__table__
_USER_ATTRS = models.TrialUserAttributeModel.__table__
_SYSTEM_ATTRS = models.TrialSystemAttributeModel.__table__
_KEYS = {
    _PARAMS: "param_name",
    _VALUES: "objective",
    _INTERMEDIATE_VALUES: "step",
    _USER_ATTRS: "key",
    _SYSTEM_ATTRS: "key",
}
"""The column that tells the rows of one trial apart."""


_DELETED = "storage: a study that runs must stay in its database, but another program deleted it or its trials"


def _upsert(table: sqlalchemy.Table, key: str) -> sqlite.Insert:
    statement = sqlite.insert(table)
    names = [column.name for column in table.columns if not column.primary_key]
    changed = {name: statement.excluded[name] for name in names if name not in {"trial_id", key}}
    return statement.on_conflict_do_update(index_elements=["trial_id", key], set_=changed)


_UPSERTS = {table: _upsert(table, key) for table, key in _KEYS.items()}
_UPDATE = sqlalchemy.update(_TRIALS).where(_TRIALS.c.trial_id == sqlalchemy.bindparam("known_id"))


class TrialRows:
    """The rows of one study that the database does not hold yet, the latest of each; trials go by their numbers."""

    def __init__(self, study_id: int, trial_ids: Mapping[int, int]) -> None:
        self._study_id = study_id
        self._trial_ids = dict(trial_ids)
        self._trials: dict[int, dict[str, Any]] = {}
        self._parts: dict[sqlalchemy.Table, dict[tuple[int, Any], dict[str, Any]]] = {table: {} for table in _KEYS}

    def set_trial(self, trial: FrozenTrial) -> None:
        """Keep a trial's own row: state and times."""
        self._trials[trial.number] = {
            "state": trial.state,
            "datetime_start": _to_utc(trial.datetime_start),
            "datetime_complete": _to_utc(trial.datetime_complete),
        }

    def set_param(self, number: int, name: str, internal_value: float, distribution: BaseDistribution) -> None:
        """Keep a param, in Optuna's internal representation."""
        described = distribution_to_json(distribution)
        self._parts[_PARAMS][number, name] = {"param_value": internal_value, "distribution_json": described}

    def set_value(self, number: int, objective: int, value: float) -> None:
        """Keep what a trial reached in one objective."""
        stored, kind = models.TrialValueModel.value_to_stored_repr(value)
        self._parts[_VALUES][number, objective] = {"value": stored, "value_type": kind}

    def set_intermediate_value(self, number: int, step: int, value: float) -> None:
        """Keep a reported value."""
        stored, kind = models.TrialIntermediateValueModel.intermediate_value_to_stored_repr(value)
        row = {"intermediate_value": stored, "intermediate_value_type": kind}
        self._parts[_INTERMEDIATE_VALUES][number, step] = row

    def set_user_attr(self, number: int, key: str, value_json: str) -> None:
        """Keep a user attribute, as JSON text."""
        self._parts[_USER_ATTRS][number, key] = {"value_json": value_json}

    def set_system_attr(self, number: int, key: str, value_json: str) -> None:
        """Keep a system attribute, as JSON text."""
        self._parts[_SYSTEM_ATTRS][number, key] = {"value_json": value_json}

    def write(self, engine: sqlalchemy.Engine) -> None:
        """Write all kept rows in one transaction. If that fails, nothing is written and all is kept.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: If the database cannot be written.
            StorageError: If another program deleted the study, or added trials to it.
        """
        if not self._trials and not any(self._parts.values()):
            return
        with engine.begin() as connection:
            # At once, so that what is checked first still holds when the rows are written.
            connection.exec_driver_sql("BEGIN IMMEDIATE")
            self._check_study(connection)
            trial_ids = self._trial_ids | self._write_trials(connection)
            for table, rows in self._parts.items():
                if rows:
                    connection.execute(_UPSERTS[table], _complete(rows, _KEYS[table], trial_ids))
        self._trial_ids = trial_ids
        self._trials.clear()
        for rows in self._parts.values():
            rows.clear()

    def _write_trials(self, connection: sqlalchemy.Connection) -> dict[int, int]:
        """Update the rows of known trials and insert those of new ones; return the new ones' ids by number."""
        known = [
            {"known_id": self._trial_ids[number], **row}
            for number, row in self._trials.items()
            if number in self._trial_ids
        ]
        if known and connection.execute(_UPDATE, known).rowcount != len(known):
            raise StorageError(_DELETED)
        # In the order of their numbers, which Optuna takes to be the order of the ids.
        new = [
            {"study_id": self._study_id, "number": number, **row}
            for number, row in sorted(self._trials.items())
            if number not in self._trial_ids
        ]
        if not new:
            return {}
        connection.execute(sqlalchemy.insert(_TRIALS), new)
        return self._read_new_ids(connection, n_new=len(new))

    def _check_study(self, connection: sqlalchemy.Connection) -> None:
        query = sqlalchemy.select(_STUDIES.c.study_id).where(_STUDIES.c.study_id == self._study_id)
        if connection.execute(query).first() is None:
            raise StorageError(_DELETED)

    def _read_new_ids(self, connection: sqlalchemy.Connection, *, n_new: int) -> dict[int, int]:
        last_known = max(self._trial_ids.values(), default=0)
        query = sqlalchemy.select(_TRIALS.c.number, _TRIALS.c.trial_id).where(
            _TRIALS.c.study_id == self._study_id, _TRIALS.c.trial_id > last_known
        )
        found = connection.execute(query).all()
        if len(found) != n_new:
            raise StorageError(
                "storage: only the run itself may add trials to a study that runs, "
                f"got {len(found) - n_new} of another program; end that program, then run the study again"
            )
        return {row.number: row.trial_id for row in found}


def _complete(
    rows: Mapping[tuple[int, Any], dict[str, Any]], key_column: str, trial_ids: Mapping[int, int]
) -> list[dict[str, Any]]:
    return [{"trial_id": trial_ids[number], key_column: key, **row} for (number, key), row in rows.items()]


def _to_utc(time: datetime | None) -> datetime | None:
    """Return a time as Optuna stores it, from the naive local time that its trials have."""
    return None if time is None else time.astimezone(UTC).replace(tzinfo=None)
