"""The storage of a study that runs: its trials in memory, written to SQLite many to a transaction.

Optuna's own storage makes a transaction of every param, report and attribute (1 to 7 ms each) and reads all unfinished
trials again at every turn; trials of a cohort, which train in milliseconds, would wait for little else.
"""

import copy
import json
from collections.abc import Callable, Container, Sequence
from pathlib import Path
from typing import Any, NoReturn

import sqlalchemy
from optuna.distributions import BaseDistribution, check_distribution_compatibility
from optuna.storages import BaseStorage, InMemoryStorage, RDBStorage
from optuna.study import StudyDirection
from optuna.study._frozen import FrozenStudy
from optuna.trial import FrozenTrial, TrialState

from tuner.errors import StorageError
from tuner.search.patience import Patience
from tuner.search.storage_errors import explain_failures
from tuner.search.trial_rows import TrialRows


class MirrorStorage(BaseStorage):
    """One study of a database, for the one process that may write it.

    Trials are read from the database once. Whatever happens to them is in the database after the next ``flush``; until
    then a kill loses it. Their ids are their numbers. What belongs to the study itself is read and written at once.
    Attributes are kept as JSON gives them back, so that every reader sees what this process sees.
    """

    def __init__(self, storage: RDBStorage, study_name: str, patience: Patience | None = None) -> None:
        self._storage = storage
        self._patience = patience
        self._path = Path(storage.engine.url.database or "")
        self._file = _identify(self._path)
        self._wal_path = Path(f"{self._path.resolve()}-wal")
        self._study_id = storage.get_study_id_from_name(study_name)
        self._memory = InMemoryStorage()
        self._memory_id = self._memory.create_new_study(storage.get_study_directions(self._study_id), study_name)
        trials = storage.get_all_trials(self._study_id, deepcopy=False)
        if [trial.number for trial in trials] != list(range(len(trials))):
            raise StorageError(
                f"storage: trials must be numbered from 0 without gaps, got others in study {study_name!r}"
            )
        self._rows = TrialRows(self._study_id, {trial.number: trial._trial_id for trial in trials})  # noqa: SLF001
        self._distributions: dict[str, BaseDistribution] = {}
        for trial in trials:
            self._distributions = trial.distributions | self._distributions
            self._memory.create_new_trial(self._memory_id, trial)
        self._wal = _identify(self._wal_path)  # it is there since the first read
        sqlalchemy.event.listen(storage.engine, "close", self._forget_wal)

    def flush(self) -> None:
        """Write what happened to trials since the last flush, in one transaction; if that fails, the next one has it.

        Raises:
            sqlalchemy.exc.SQLAlchemyError: If the database cannot be written, and there is no patience.
            StorageError: If it cannot be written for longer than the patience; if another program deleted the study,
                added trials to it, or put another file in the place of the database or its WAL.
        """
        self._keep_trying(self._write)

    def _write(self) -> None:
        self._check_files()
        self._rows.write(self._storage.engine)
        if self._wal is None:
            self._wal = _identify(self._wal_path)

    def _forget_wal(self, *_: object) -> None:
        """Take the next WAL for ours: SQLite itself removes one with the last connection, and only then."""
        self._wal = None

    def _keep_trying(self, action: Callable[[], None]) -> None:
        if self._patience is None:
            action()
        else:
            self._patience.keep_trying(action)

    def _check_files(self) -> None:
        """Refuse to write files that are no longer those at the paths of database and WAL: nobody would find them."""
        if _identify(self._path) != self._file:
            lost, advice = self._path, "put it back"
        elif self._wal is not None and _identify(self._wal_path) != self._wal:
            lost, advice = self._wal_path, "end what else uses it"
        else:
            return
        with self._storage.engine.connect() as connection:
            # What is left in our WAL would flow into the file that took the place of ours, or be lost with a kill.
            connection.exec_driver_sql("PRAGMA wal_checkpoint(TRUNCATE)")
        raise StorageError(
            f"storage: the database of a run must stay in its place, got {lost} removed or replaced; "
            f"{advice}, then run the same command again"
        )

    # --- the study: passed through ---

    def create_new_study(self, directions: Sequence[StudyDirection], study_name: str | None = None) -> NoReturn:
        """Refuse: a mirror has its study."""
        raise NotImplementedError("a mirror makes no studies; make them in the storage that it wraps")

    def delete_study(self, study_id: int) -> NoReturn:
        """Refuse: a mirror has its study."""
        raise NotImplementedError("a mirror deletes no studies; delete them in the storage that it wraps")

    def set_study_user_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write at once."""
        self._keep_trying(lambda: self._storage.set_study_user_attr(study_id, key, value))

    def set_study_system_attr(self, study_id: int, key: str, value: Any) -> None:
        """Write at once."""
        self._keep_trying(lambda: self._storage.set_study_system_attr(study_id, key, value))

    def get_study_id_from_name(self, study_name: str) -> int:
        """Return the id in the database."""
        return self._storage.get_study_id_from_name(study_name)

    def get_study_name_from_id(self, study_id: int) -> str:
        """Return the name in the database."""
        return self._storage.get_study_name_from_id(study_id)

    def get_study_directions(self, study_id: int) -> list[StudyDirection]:
        """Return the directions in the database."""
        return self._storage.get_study_directions(study_id)

    def get_study_user_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the attributes in the database."""
        return self._storage.get_study_user_attrs(study_id)

    def get_study_system_attrs(self, study_id: int) -> dict[str, Any]:
        """Return the attributes in the database."""
        return self._storage.get_study_system_attrs(study_id)

    def get_all_studies(self) -> list[FrozenStudy]:
        """Return all studies of the database."""
        return self._storage.get_all_studies()

    # --- its trials: in memory ---

    def create_new_trial(self, study_id: int, template_trial: FrozenTrial | None = None) -> int:
        """Make a running trial, or one like a template."""
        self._check_study(study_id)
        if template_trial is None:
            number = self._memory.create_new_trial(self._memory_id)
            self._rows.set_trial(self._memory.get_trial(number))
            return number
        for name, distribution in template_trial.distributions.items():
            self._check_distribution(name, distribution)
        user_attrs, system_attrs = (
            {key: json.dumps(value) for key, value in attrs.items()}
            for attrs in (template_trial.user_attrs, template_trial.system_attrs)
        )
        template = copy.copy(template_trial)
        template.user_attrs = {key: json.loads(text) for key, text in user_attrs.items()}
        template.system_attrs = {key: json.loads(text) for key, text in system_attrs.items()}
        number = self._memory.create_new_trial(self._memory_id, template)
        for key, text in user_attrs.items():
            self._rows.set_user_attr(number, key, text)
        for key, text in system_attrs.items():
            self._rows.set_system_attr(number, key, text)
        self._keep_rows(self._memory.get_trial(number))
        return number

    def _keep_rows(self, trial: FrozenTrial) -> None:
        """Keep all rows of a new trial but its attributes."""
        self._rows.set_trial(trial)
        for name, value in trial.params.items():
            distribution = trial.distributions[name]
            self._distributions.setdefault(name, distribution)
            self._rows.set_param(trial.number, name, distribution.to_internal_repr(value), distribution)
        for objective, value in enumerate(trial.values or ()):
            self._rows.set_value(trial.number, objective, value)
        for step, value in trial.intermediate_values.items():
            self._rows.set_intermediate_value(trial.number, step, value)

    def set_trial_param(
        self, trial_id: int, param_name: str, param_value_internal: float, distribution: BaseDistribution
    ) -> None:
        """Set a param, of a distribution that fits the study's others of its name."""
        self._check_distribution(param_name, distribution)
        self._memory.set_trial_param(trial_id, param_name, param_value_internal, distribution)
        self._distributions.setdefault(param_name, distribution)
        self._rows.set_param(trial_id, param_name, param_value_internal, distribution)

    def set_trial_state_values(self, trial_id: int, state: TrialState, values: Sequence[float] | None = None) -> bool:
        """Set state and values; return whether a trial that is to run was waiting."""
        if not self._memory.set_trial_state_values(trial_id, state, values):
            return False
        self._rows.set_trial(self._memory.get_trial(trial_id))
        for objective, value in enumerate(values or ()):
            self._rows.set_value(trial_id, objective, value)
        return True

    def set_trial_intermediate_value(self, trial_id: int, step: int, intermediate_value: float) -> None:
        """Set a reported value."""
        self._memory.set_trial_intermediate_value(trial_id, step, intermediate_value)
        self._rows.set_intermediate_value(trial_id, step, intermediate_value)

    def set_trial_user_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a user attribute, which must be JSON."""
        text = json.dumps(value)
        self._memory.set_trial_user_attr(trial_id, key, json.loads(text))
        self._rows.set_user_attr(trial_id, key, text)

    def set_trial_system_attr(self, trial_id: int, key: str, value: Any) -> None:
        """Set a system attribute, which must be JSON."""
        text = json.dumps(value)
        self._memory.set_trial_system_attr(trial_id, key, json.loads(text))
        self._rows.set_system_attr(trial_id, key, text)

    def get_trial(self, trial_id: int) -> FrozenTrial:
        """Return a trial."""
        return self._memory.get_trial(trial_id)

    def get_all_trials(
        self, study_id: int, deepcopy: bool = True, states: Container[TrialState] | None = None
    ) -> list[FrozenTrial]:
        """Return the study's trials by number, those in some states or all."""
        self._check_study(study_id)
        return self._memory.get_all_trials(self._memory_id, deepcopy, states)

    def _check_study(self, study_id: int) -> None:
        if study_id != self._study_id:
            raise KeyError(f"no study {study_id} in this mirror, which holds study {self._study_id}")

    def _check_distribution(self, name: str, distribution: BaseDistribution) -> None:
        if name in self._distributions:
            check_distribution_compatibility(self._distributions[name], distribution)


def _identify(path: Path) -> tuple[int, int] | None:
    """Return what tells a file from another one at its path; None if there is none.

    Raises:
        StorageError: If the file system does not say.
    """
    with explain_failures(path):
        try:
            status = path.stat()
        except (FileNotFoundError, NotADirectoryError):
            return None
    return status.st_dev, status.st_ino
