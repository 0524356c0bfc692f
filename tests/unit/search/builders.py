"""Studies without images: specs, facts and learning curves that are made up."""

import tomllib
from pathlib import Path
from typing import Any

import optuna
from optuna.storages import RDBStorage

from tuner.search.storage import open_storage
from tuner.search.studies import StoredStudy, open_study
from tuner.search.study_facts import StudyFacts
from tuner.search.trial_book import TrialBook
from tuner.spec.sections import StudySpec
from tuner.spec.study import parse_spec
from tuner.trial import EpochResult, Reason, TrialOutcome, TrialState

SPACE: dict[str, Any] = {
    "backbone": {"choices": ["test_resnet", "test_vit"]},
    "lr": {"low": 1e-4, "high": 1e-1, "log": True},
    "unfrozen_layers": {"low": 1, "high": "all"},
}
GROUP_COUNTS = {"test_resnet": 6, "test_vit": 4}
_OPENED: list[RDBStorage] = []
COMPLETE = TrialOutcome(state=TrialState.COMPLETE)
PRUNED = TrialOutcome(state=TrialState.PRUNED, reason=Reason.PRUNER)


def make_spec(space: dict[str, Any] | None = None, **sections: Any) -> StudySpec:
    """Return a spec of three epochs; a section's keys are laid over the small study's."""
    tables: dict[str, Any] = {
        "study": {"name": "small"},
        "data": {"source": "digits"},
        "space": SPACE if space is None else space,
        "training": {"epochs": 3},
        "search": {"n_trials": 10, "sampler": "random", "pruner": "none"},
    }
    for name, keys in sections.items():
        tables[name] = {**tables.get(name, {}), **keys} if isinstance(keys, dict) else keys
    return parse_spec(tables, Path("/studies"))


def make_spec_from(text: str) -> StudySpec:
    """Return the spec of a study file's text."""
    return parse_spec(tomllib.loads(text), Path("/studies"))


def make_facts(**overrides: Any) -> StudyFacts:
    """Return what a worker would have found."""
    values: dict[str, Any] = {
        "data_hash": "d",
        "classes": ("a", "b"),
        "splits": "s",
        "split_counts": {"train": 80, "val": 20, "test": 0},
        "group_counts": GROUP_COUNTS,
        "weights": {"test_resnet": "w1", "test_vit": "w2"},
        "preprocessing": {},
        "versions": {"torch": "2"},
    }
    return StudyFacts(**values | overrides)


def make_url(folder: Path) -> str:
    """Return the URL of a database in a folder."""
    return f"sqlite:///{folder / 'studies.db'}"


def keep(storage: RDBStorage) -> RDBStorage:
    """Have a storage closed after the test."""
    _OPENED.append(storage)
    return storage


def close_storages() -> None:
    """Close what was opened: Python 3.13 warns of databases that are left to the garbage collector."""
    while _OPENED:
        storage = _OPENED.pop()
        storage.remove_session()
        storage.engine.dispose()


def make_storage(folder: Path) -> RDBStorage:
    """Open a database in a folder, made if it is not there."""
    return keep(open_storage(make_url(folder), create=True))


def open_small(folder: Path, spec: StudySpec | None = None) -> StoredStudy:
    """Open a study as a new process would: with a storage, a sampler and a pruner of its own."""
    return open_study(make_storage(folder), spec or make_spec(), make_facts())


def make_epoch(epoch: int, value: float, *, loss: float | None = None) -> EpochResult:
    """Return an epoch whose accuracies are all ``value``."""
    return EpochResult(
        epoch=epoch,
        train_loss=1.0,
        val_loss=1 - value if loss is None else loss,
        val_accuracy=value,
        val_balanced_accuracy=value,
        val_macro_precision=value,
        val_macro_recall=value,
        val_macro_f1=value,
        seconds=0.5,
        images_per_second=100.0,
    )


def run_trial(book: TrialBook, values: tuple[float, ...] = (0.1, 0.2, 0.3)) -> int:
    """Ask for a trial, report a curve, complete it and have it stored; return its number."""
    asked = book.ask()
    assert asked is not None
    number, _ = asked
    for epoch, value in enumerate(values, start=1):
        book.report(number, make_epoch(epoch, value))
    book.tell(number, COMPLETE)
    book.flush()
    return number


def read_plainly(folder: Path, name: str = "small") -> optuna.Study:
    """Load a study as another program would."""
    return optuna.load_study(storage=keep(RDBStorage(make_url(folder))), study_name=name)
