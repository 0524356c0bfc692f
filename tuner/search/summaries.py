"""One line for each study of a storage, whoever made it."""

from collections.abc import Mapping
from dataclasses import dataclass

import optuna
from optuna.storages import RDBStorage

from tuner.errors import StudyError
from tuner.search.studies import SPEC_ATTR, count_states, count_wanted, find_best, read_attrs


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
    return [
        _summarise(optuna.load_study(storage=storage, study_name=name))
        for name in sorted(optuna.get_all_study_names(storage=storage))
    ]


def _summarise(study: optuna.Study) -> StudySummary:
    try:
        ours = read_attrs(study) if SPEC_ATTR in study.user_attrs else None
    except StudyError:  # another version's: it must not hide the others
        ours = None
    best = find_best(study) if ours else None
    return StudySummary(
        name=study.study_name,
        objective=ours.spec.study.objective if ours else "?",
        counts=count_states(study),
        n_trials=count_wanted(ours) if ours else None,
        best_value=best.value if best else None,
    )
