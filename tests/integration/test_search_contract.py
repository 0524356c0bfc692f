"""Every sampler with real Optuna on real SQLite: exact counts, resumes without repetition, results anyone can read.

Learning curves are made up, so that nothing but the search itself is slow.
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from tuner.search.pruners import PRUNERS
from tuner.search.samplers import SAMPLERS
from tuner.search.storage import open_storage
from tuner.search.studies import open_study
from tuner.search.study_facts import StudyFacts
from tuner.search.trial_attrs import EPOCHS_ATTR, PARAMS_ATTR
from tuner.search.trial_book import TrialBook
from tuner.spec.sections import StudySpec
from tuner.spec.study import parse_spec
from tuner.trial import EpochResult, Reason, TrialOutcome, TrialParams, TrialState

EPOCHS = 6
N_TRIALS = 16
GROUP_COUNTS = {"test_resnet": 6, "test_vit": 4}
SPACE: dict[str, Any] = {
    "backbone": {"choices": ["test_resnet", "test_vit"]},
    "lr": {"low": 1e-5, "high": 1e-1, "log": True},
    "batch_size": {"choices": [16, 32, 64]},
    "unfrozen_layers": {"low": 1, "high": "all"},
    "augmentation_strength": {"low": 0.0, "high": 1.0, "step": 0.5},
}
FINITE_SPACE = {name: table for name, table in SPACE.items() if name not in {"lr", "batch_size"}}
FACTS = StudyFacts(
    data_hash="d",
    classes=("a", "b"),
    splits="s",
    split_counts={"train": 80, "val": 20, "test": 0},
    group_counts=GROUP_COUNTS,
    weights={},
    preprocessing={},
    versions={},
)
COMPLETE = TrialOutcome(state=TrialState.COMPLETE)
PRUNED = TrialOutcome(state=TrialState.PRUNED, reason=Reason.PRUNER)
LOST = TrialOutcome(state=TrialState.FAIL, reason=Reason.WORKER_LOST, message="killed by signal 9")
DIVERGED = TrialOutcome(state=TrialState.PRUNED, reason=Reason.DIVERGED, message="loss is nan")

PAIRS = [
    ("tpe", "median"),
    ("tpe", "hyperband"),
    ("tpe", "asha"),
    ("random", "median"),
    ("random", "percentile"),
    ("qmc", "asha"),
    ("qmc", "none"),
    ("gp", "none"),
    ("gp", "median"),
    ("grid", "percentile"),
    ("grid", "hyperband"),
]


def make_spec(sampler: str, pruner: str, **search: Any) -> StudySpec:
    """Return a spec of two backbones; for grid without the continuous learning rate."""
    tables = {
        "study": {"name": "made up", "seed": 3},
        "data": {"source": "digits"},
        "space": FINITE_SPACE if sampler == "grid" else SPACE,
        "training": {"epochs": EPOCHS},
        "search": {"sampler": sampler, "pruner": pruner, "n_trials": N_TRIALS, **search},
    }
    return parse_spec(tables, Path("/studies"))


def make_url(folder: Path) -> str:
    """Return the URL of a database in a folder."""
    return f"sqlite:///{folder / 'studies.db'}"


@contextmanager
def open_book(folder: Path, spec: StudySpec) -> Iterator[TrialBook]:
    """Open the study as a new process would, and drop everything but the file at the end."""
    storage = open_storage(make_url(folder), create=True)
    try:
        yield TrialBook(open_study(storage, spec, FACTS))
    finally:
        storage.remove_session()
        storage.engine.dispose()


@contextmanager
def open_plainly(folder: Path) -> Iterator[optuna.Study]:
    """Open the study as any Optuna program does."""
    storage = RDBStorage(make_url(folder))
    try:
        yield optuna.load_study(storage=storage, study_name="made up")
    finally:
        storage.remove_session()
        storage.engine.dispose()


def read_plainly(folder: Path) -> list[FrozenTrial]:
    """Return the trials as any Optuna program sees them."""
    with open_plainly(folder) as study:
        return study.trials


def make_epoch(params: TrialParams, epoch: int) -> EpochResult:
    """Return a point of a curve that rises to a height set by the recipe; curves of different recipes cross."""
    height = 0.9 - 0.1 * abs(math.log10(params.lr) + 2) - 0.02 * params.unfrozen_layers
    value = height * (1 - math.exp(-epoch * (0.3 + params.augmentation_strength)))
    return EpochResult(
        epoch=epoch,
        train_loss=1 - value,
        val_loss=1 - value,
        val_accuracy=value,
        val_balanced_accuracy=value,
        val_macro_precision=value,
        val_macro_recall=value,
        val_macro_f1=value,
        seconds=0.1,
        images_per_second=800.0,
    )


def finish(book: TrialBook, number: int, params: TrialParams) -> None:
    """Run a trial to its end, or to where it is pruned."""
    for epoch in range(1, EPOCHS + 1):
        if book.report(number, make_epoch(params, epoch)):
            book.tell(number, PRUNED)
            return
        book.flush()
    book.tell(number, COMPLETE)


def drive(
    book: TrialBook, n_trials: int, *, n_workers: int = 3, outcomes: dict[int, TrialOutcome] | None = None
) -> None:
    """Keep workers busy until enough trials count, as the service does; then leave what runs as a kill would.

    Args:
        book: Prepared.
        n_trials: How many finished trials to reach.
        n_workers: Trials that run side by side, reporting in turn.
        outcomes: How some trials end, by number, instead of running their epochs.
    """
    running: list[tuple[int, TrialParams]] = []
    while book.count_finished() < n_trials:
        while len(running) < min(n_workers, n_trials - book.count_finished()):
            asked = book.ask()
            if asked is None:
                break
            running.append(asked)
        assert running
        number, params = running.pop(0)
        if outcomes and number in outcomes:
            book.tell(number, outcomes[number])
        else:
            finish(book, number, params)
        book.flush()


def list_points(trials: list[FrozenTrial]) -> list[tuple[Any, ...]]:
    """Return the points of the trials that count."""
    return [
        tuple(trial.params.values()) for trial in trials if trial.state in {OptunaState.COMPLETE, OptunaState.PRUNED}
    ]


def is_in_range(point: dict[str, Any]) -> bool:
    """Whether every value of a point is one that the study file allows."""
    return (
        point["backbone"] in GROUP_COUNTS
        and 1 <= point["unfrozen_layers"] <= 4
        and point["augmentation_strength"] in {0.0, 0.5, 1.0}
        and 1e-5 <= point.get("lr", 1e-3) <= 1e-1
        and point.get("batch_size", 16) in {16, 32, 64}
    )


def test_pairs_cover_every_sampler_and_pruner() -> None:
    """A new sampler or pruner is in this contract."""
    assert {sampler for sampler, _ in PAIRS} == set(SAMPLERS)
    assert {pruner for _, pruner in PAIRS} == set(PRUNERS)


@pytest.mark.parametrize(("sampler", "pruner"), PAIRS)
def test_search_reaches_the_exact_count_over_kills(tmp_path: Path, sampler: str, pruner: str) -> None:
    """Killed twice with trials running, lost a worker, met a diverging point: the count is exact, no point repeats."""
    spec = make_spec(sampler, pruner)
    outcomes = {2: LOST, 4: DIVERGED}
    for n_wanted in (6, 11, N_TRIALS):
        with open_book(tmp_path, spec) as book:
            book.prepare()
            drive(book, n_wanted, outcomes=outcomes)
            if n_wanted < N_TRIALS:
                assert book.ask() is not None
                assert book.ask() is not None
                book.flush()
    trials = read_plainly(tmp_path)
    points = list_points(trials)
    assert len(points) == N_TRIALS
    assert len(set(points)) == N_TRIALS
    assert all(is_in_range(trial.params) for trial in trials)
    assert not [trial.number for trial in trials if trial.state == OptunaState.RUNNING]
    # one of a lost worker, and two of each kill, were tried again as another trial
    assert len([trial for trial in trials if "retry_of" in trial.user_attrs]) == 5
    assert len(trials) == N_TRIALS + 5


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc"])
def test_search_repeats_no_point_when_started_again_and_again(tmp_path: Path, sampler: str) -> None:
    """A run per trial gives as many points as one long run: a sampler's seed moves on with the study."""
    for n_wanted in range(1, 11):
        with open_book(tmp_path, make_spec(sampler, "none")) as book:
            book.prepare()
            drive(book, n_wanted, n_workers=1)
    points = list_points(read_plainly(tmp_path))
    rates = [lr for _, lr, *_ in points]
    assert len(points) == len(set(points)) == len(set(rates)) == 10


@pytest.mark.parametrize("sampler", ["random", "tpe", "qmc"])
def test_search_is_the_same_for_the_same_seed(tmp_path: Path, sampler: str) -> None:
    """With one worker two studies of the same file try the same points."""
    found = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        with open_book(tmp_path / name, make_spec(sampler, "median")) as book:
            book.prepare()
            drive(book, 12, n_workers=1)
        found.append(list_points(read_plainly(tmp_path / name)))
    assert found[0] == found[1]


def test_grid_ends_with_the_last_point(tmp_path: Path) -> None:
    """A grid that is smaller than n_trials is tried once as a whole, over a kill."""
    spec = make_spec("grid", "median", n_trials=1000)
    with open_book(tmp_path, spec) as book:
        book.prepare()
        assert book.queue.max_trials == 2 * 4 * 3
        drive(book, 12)
        assert book.ask() is not None
        book.flush()
    with open_book(tmp_path, spec) as book:
        assert book.prepare() == 1
        drive(book, 24)
        assert book.ask() is None
        assert book.queue.is_exhausted
    points = list_points(read_plainly(tmp_path))
    assert len(points) == len(set(points)) == 24


@pytest.mark.parametrize(("sampler", "pruner"), [("tpe", "median"), ("grid", "asha")])
def test_plain_optuna_reads_everything(tmp_path: Path, sampler: str, pruner: str) -> None:
    """Values, curves, params and attributes are there for every client of the storage."""
    with open_book(tmp_path, make_spec(sampler, pruner)) as book:
        book.prepare()
        drive(book, N_TRIALS)
    with open_plainly(tmp_path) as study:
        trials = study.trials
        assert study.direction.name == "MAXIMIZE"
        assert study.metric_names == ["val_accuracy"]
        assert study.best_value == max(trial.value or 0.0 for trial in trials if trial.state == OptunaState.COMPLETE)
    pruned = [trial for trial in trials if trial.state == OptunaState.PRUNED]
    assert pruned
    for trial in trials:
        params = TrialParams.from_json(trial.user_attrs[PARAMS_ATTR])
        curve = {epoch: make_epoch(params, epoch).val_accuracy for epoch in range(1, EPOCHS + 1)}
        assert trial.intermediate_values == {
            epoch: pytest.approx(value) for epoch, value in curve.items() if epoch <= len(trial.intermediate_values)
        }
        assert trial.value == pytest.approx(curve[len(trial.intermediate_values)])
        assert trial.user_attrs["unfrozen_layers_resolved"] == params.unfrozen_layers
        assert trial.user_attrs["seconds"] == pytest.approx(0.1 * len(trial.intermediate_values))
        assert len(trial.user_attrs[EPOCHS_ATTR]) == len(trial.intermediate_values)
    assert all(len(trial.intermediate_values) < EPOCHS for trial in pruned)
    assert all(trial.user_attrs["reason"] == "pruner" for trial in pruned)
