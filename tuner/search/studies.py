"""Studies in the storage: made, resumed or refused, listed, and read without their study file."""

import re
import warnings
from dataclasses import dataclass
from typing import Any, Literal

import optuna
from optuna.exceptions import DuplicatedStudyError, ExperimentalWarning
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from tuner.errors import StudyError
from tuner.search.backbone_sampler import make_screened_sampler
from tuner.search.distributions import count_grid, make_distributions
from tuner.search.mirror import MirrorStorage
from tuner.search.patience import Patience
from tuner.search.pruners import make_study_pruner
from tuner.search.samplers import make_sampler
from tuner.search.screening import is_of_search
from tuner.search.search_view import SearchSampler
from tuner.search.study_facts import StudyFacts, explain_damage, find_changed_facts
from tuner.search.trial_attrs import PARAMS_ATTR, is_confirmation
from tuner.search.urls import is_file_url
from tuner.spec.sections import StudySpec
from tuner.spec.suggestions import did_you_mean
from tuner.trial import TrialParams

SPEC_ATTR = "tuner:spec"
FACTS_ATTR = "tuner:facts"
_FREE_KEYS = re.compile(
    r"study\.storage|search\.(?!seeds_per_trial).*|workers\..*|enqueue|warm_start(\..*)?|"
    r"(pretraining\.)?data\.path|backbones\..*\.weights"
)
"""Keys that may differ when a study is reopened: data and weights are compared by content instead."""

optuna.logging.set_verbosity(optuna.logging.WARNING)


@dataclass(frozen=True, kw_only=True)
class StoredStudy:
    """An Optuna study of ours with the spec and the facts that it was made with."""

    study: optuna.Study
    spec: StudySpec
    facts: StudyFacts
    mirror: MirrorStorage | None = None
    """The storage that ``study`` is over, to be flushed by who changes trials; None if the study is only read."""

    @property
    def name(self) -> str:
        """The study's name."""
        return self.study.study_name


def direction_of(spec: StudySpec) -> Literal["minimize", "maximize"]:
    """Return Optuna's direction for the objective."""
    return "minimize" if spec.study.objective == "val_loss" else "maximize"


def open_study(
    storage: RDBStorage, spec: StudySpec, facts: StudyFacts, patience: Patience | None = None
) -> StoredStudy:
    """Make the study of a spec, or resume it if it is stored and the same. After a failure it can be called again.

    What the study writes later waits with the ``patience`` for a database that cannot be written; None: not at all.

    Raises:
        StudyError: If a stored study of this name differs in what its results depend on.
    """
    try:
        study = optuna.create_study(storage=storage, study_name=spec.study.name, direction=direction_of(spec))
    except DuplicatedStudyError:
        return _resume(storage, spec, facts, patience)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        study.set_metric_names([spec.study.objective])
    study.set_user_attr(FACTS_ATTR, facts.to_json())
    # Written last: a study without it was cut off while it was made, and is made again.
    study.set_user_attr(SPEC_ATTR, _write_spec(spec))
    return _equip(storage, spec, facts, patience)


def _resume(storage: RDBStorage, spec: StudySpec, facts: StudyFacts, patience: Patience | None) -> StoredStudy:
    study = optuna.load_study(storage=storage, study_name=spec.study.name)
    if _was_cut_off(study):
        optuna.delete_study(storage=storage, study_name=spec.study.name)
        return open_study(storage, spec, facts, patience)
    stored = _read_same(study, spec, facts)
    study.set_user_attr(SPEC_ATTR, _write_spec(spec))
    return _equip(storage, spec, stored.facts, patience)


def _write_spec(spec: StudySpec) -> str:
    """Return a spec as it is stored: its storage's URL may be another one than this, and hold a password."""
    is_kept = spec.study.storage is not None and is_file_url(spec.study.storage)
    section = spec.study if is_kept else spec.study.model_copy(update={"storage": None})
    return spec.model_copy(update={"study": section}).model_dump_json()


def _was_cut_off(study: optuna.Study) -> bool:
    """Whether a kill came while a study of ours was made: it has neither a spec, nor anything of anyone else's."""
    return set(study.user_attrs) <= {FACTS_ATTR} and not study.get_trials(deepcopy=False)


def _read_same(study: optuna.Study, spec: StudySpec, facts: StudyFacts) -> StoredStudy:
    """Read a stored study, and refuse it if it is not the study file's."""
    if SPEC_ATTR not in study.user_attrs:
        raise StudyError(f"study.name: must be free, got {study.study_name!r} of another program; choose another name")
    stored = read_attrs(study)
    changes = find_changes(stored.spec, spec) + find_changed_facts(stored.facts, facts)
    if changes:
        lines = "\n  ".join(changes)
        raise StudyError(
            f"study {spec.study.name!r}: the stored study must be the study file's, but these differ "
            f"(restore them, choose another study.name, or 'tuner delete' the old study):\n  {lines}"
        )
    return stored


def check_stored(storage: RDBStorage, spec: StudySpec, facts: StudyFacts) -> int | None:
    """Say what a run would resume, without changing anything.

    Returns:
        Trials that count already; None if the study is not stored yet.

    Raises:
        StudyError: If a stored study of this name differs in what its results depend on.
    """
    if spec.study.name not in list_names(storage):
        return None
    study = optuna.load_study(storage=storage, study_name=spec.study.name)
    if _was_cut_off(study):
        return None
    _read_same(study, spec, facts)
    counts = count_states(study)
    return counts["COMPLETE"] + counts["PRUNED"]


def _equip(storage: RDBStorage, spec: StudySpec, facts: StudyFacts, patience: Patience | None) -> StoredStudy:
    """Load a study to run it: over a mirror, with its sampler and pruner."""
    mirror = MirrorStorage(storage, spec.study.name, patience)
    n_stored = mirror.get_n_trials(mirror.get_study_id_from_name(spec.study.name))
    is_screened = spec.search.screen > 0
    sample_with = make_screened_sampler if is_screened else make_sampler
    sampler = sample_with(spec.search.sampler, study_seed=spec.study.seed, n_stored=n_stored)
    study = optuna.load_study(
        storage=mirror,
        study_name=spec.study.name,
        sampler=SearchSampler(sampler),
        pruner=make_study_pruner(spec.search.pruner, epochs=spec.training.epochs),
    )
    return StoredStudy(study=study, spec=spec, facts=facts, mirror=mirror)


def find_changes(stored: StudySpec, new: StudySpec) -> list[str]:
    """Return one line for each key whose change makes old and new trials incomparable."""
    before, after = (_flatten(spec.model_dump(mode="json")) for spec in (stored, new))
    return [
        f"{key}: {_show(before.get(key))} in the study, {_show(after.get(key))} in the study file"
        for key in sorted(before | after)
        if before.get(key) != after.get(key) and not _FREE_KEYS.fullmatch(key)
    ]


def _show(value: Any) -> str:
    return "absent" if value is None else repr(value)


def _flatten(value: Any, where: str = "") -> dict[str, Any]:
    """Return the leaves of nested tables by dotted key."""
    if not isinstance(value, dict):
        return {where: value}
    leaves: dict[str, Any] = {}
    for key, inner in value.items():
        leaves |= _flatten(inner, f"{where}.{key}" if where else key)
    return leaves


def load_stored(storage: RDBStorage, name: str) -> StoredStudy:
    """Load a study to read it.

    Raises:
        StudyError: If there is none of this name, or it is another program's.
    """
    names = list_names(storage)
    if name not in names:
        known = f"; the storage holds {', '.join(sorted(names)[:5])}" if names else "; the storage holds no study"
        raise StudyError(f"study {name!r}: must be in the storage{did_you_mean(name, names) or known}")
    study = optuna.load_study(storage=storage, study_name=name)
    if not is_ours(study):
        raise StudyError(f"study {name!r}: must be a study made by 'tuner run'")
    return read_attrs(study)


def list_names(storage: RDBStorage) -> list[str]:
    """Return the names of all studies.

    Raises:
        StudyError: If what is stored with one is nothing that even Optuna can read.
    """
    with explain_damage("storage"):
        return optuna.get_all_study_names(storage=storage)


def is_ours(study: optuna.Study) -> bool:
    """Whether a study was made by this program.

    Raises:
        StudyError: If what is stored with it cannot be read.
    """
    with explain_damage(f"study {study.study_name!r}"):
        return SPEC_ATTR in study.user_attrs


def read_attrs(study: optuna.Study) -> StoredStudy:
    """Return a study of ours with what is stored with it.

    Raises:
        StudyError: If another version of the program made it, or it cannot be read.
    """
    with explain_damage(f"study {study.study_name!r}"):
        attrs = study.user_attrs
        facts = StudyFacts.from_json(attrs[FACTS_ATTR])  # first: it says so if another version made the study
        return StoredStudy(study=study, spec=StudySpec.model_validate_json(attrs[SPEC_ATTR]), facts=facts)


def read_params(trial: FrozenTrial) -> dict[str, Any]:
    """Return the resolved recipe that is stored with a trial.

    Raises:
        StudyError: If it cannot be read.
    """
    with explain_damage(f"trial {trial.number}"):
        return TrialParams.from_json(trial.user_attrs[PARAMS_ATTR]).to_json()


def count_wanted(stored: StoredStudy) -> int:
    """Return how many trials the study is to have: ``n_trials``, or the points of a smaller grid."""
    n_trials = stored.spec.search.n_trials
    if stored.spec.search.sampler != "grid":
        return n_trials
    return min(n_trials, count_grid(make_distributions(stored.spec, stored.facts.group_counts)))


def count_states(study: optuna.Study) -> dict[str, int]:
    """Return how many trials are in each of Optuna's states, of those that the search proposed."""
    counts = {state.name: 0 for state in OptunaState}
    for trial in study.get_trials(deepcopy=False):
        counts[trial.state.name] += is_of_search(trial)
    return counts


def find_best(study: optuna.Study) -> FrozenTrial | None:
    """Return the best completed trial, the earliest of equals, or None if none completed."""
    return next(iter(rank_trials(study)), None)


def rank_trials(study: optuna.Study) -> list[FrozenTrial]:
    """Return the completed trials, the best first and the earlier of equals; those that confirm others left out."""
    complete = study.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,))
    sign = -1 if study.direction == optuna.study.StudyDirection.MINIMIZE else 1
    own = (trial for trial in complete if not is_confirmation(trial))
    return sorted(own, key=lambda trial: (-sign * (trial.value or 0.0), trial.number))


def delete_stored(storage: RDBStorage, name: str) -> None:
    """Delete a study and its trials from the storage.

    Raises:
        StudyError: If there is none of this name.
    """
    load_stored(storage, name)
    optuna.delete_study(storage=storage, study_name=name)
