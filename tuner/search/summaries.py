"""One line for each study of a storage, whoever made it."""

from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass

import optuna
from optuna.storages import RDBStorage
from optuna.trial import TrialState

from tuner.errors import StudyError
from tuner.search.studies import count_states, count_wanted, find_best, is_ours, list_names, read_attrs
from tuner.search.study_facts import explain_damage


@dataclass(frozen=True, kw_only=True)
class StudySummary:
    """One line of ``tuner list``."""

    name: str
    objective: str
    counts: Mapping[str, int]
    """Trials by state."""
    n_trials: int | None
    """Trials that the study is to have; None for another program's study."""
    best_value: float | None

    @property
    def n_finished(self) -> int:
        """Trials that count: COMPLETE and PRUNED."""
        return self.counts["COMPLETE"] + self.counts["PRUNED"]


def list_studies(storage: RDBStorage) -> list[StudySummary]:
    """Return a summary of every study in a storage, by name."""
    return [_summarise(optuna.load_study(storage=storage, study_name=name)) for name in sorted(list_names(storage))]


def _summarise(study: optuna.Study) -> StudySummary:
    known: tuple[str, int | None, float | None] = "?", None, None
    counts = {state.name: 0 for state in TrialState}
    with suppress(StudyError):  # another version's, or damaged: it must not hide the others
        counts = _count(study)
        known = _read_known(study)
    objective, n_trials, best_value = known
    return StudySummary(
        name=study.study_name,
        objective=objective,
        counts=counts,
        n_trials=n_trials,
        best_value=best_value,
    )


def _count(study: optuna.Study) -> dict[str, int]:
    with explain_damage(f"study {study.study_name!r}"):
        return count_states(study)


def _read_known(study: optuna.Study) -> tuple[str, int | None, float | None]:
    """Return the objective, the number of wanted trials and the best value, as far as a study has them."""
    if not is_ours(study):
        return "?", None, None
    ours = read_attrs(study)
    with explain_damage(f"study {study.study_name!r}"):
        best = find_best(study)
        return ours.spec.study.objective, count_wanted(ours), best.value if best else None
