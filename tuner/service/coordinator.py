"""Run a study. The coordinator is the one process that writes the storage; it never loads torch, data or models."""

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext

from optuna.storages import RDBStorage

from tuner.errors import EXIT_SIGTERM, StorageBusyError, StorageError, StudyError
from tuner.search.confirmation import DEFAULT_SEEDS, DEFAULT_TOP
from tuner.search.patience import ATTEMPT_SECONDS, Patience
from tuner.search.storage import (
    find_database,
    hold_lock,
    resolve_url,
    schema_lock_path,
    study_lock_path,
    use_storage,
)
from tuner.search.studies import StoredStudy, find_best, find_changes, load_stored, open_study
from tuner.search.study_facts import explain_damage
from tuner.search.trial_book import TrialBook
from tuner.search.warm_start import WarmRecipe, read_warm_recipes
from tuner.service.pool import Pool, open_pool
from tuner.service.progress import ActivityChanged, Display, Noted, SilentDisplay
from tuner.service.result import StudyStatus, is_finished, read_status
from tuner.service.run_clock import RunClock, is_budget_spent
from tuner.service.run_files import RunFiles
from tuner.service.scouting import collect_facts, scout_study
from tuner.service.search_loop import SearchLoop
from tuner.service.signals import StopSignals
from tuner.service.study_run import StudyRun, is_confirmed
from tuner.spec.own_code import check_code
from tuner.spec.sections import StudySpec


def run_study(
    spec: StudySpec,
    *,
    storage: str | None = None,
    n_workers: int | None = None,
    display: Display | None = None,
    pool: Pool | None = None,
) -> StudyStatus:
    """Run a study to its number of trials, resuming what the storage holds of it, and confirm its best if it says so.

    Args:
        spec: The checked study file.
        storage: SQLite URL; default: the spec's, ``TUNER_STORAGE``, or ``sqlite:///studies.db``.
        n_workers: Workers to start; default: one per CUDA device (times ``per_device``), or one per CPU core.
        display: What the user sees; default: nothing.
        pool: Of ``open_pool``, closed at the end; opened early, it loads what workers need while its caller does more.

    Returns:
        The study's status. Its ``stopped_by`` says whether a signal, the timeout or the budget ended the run early.

    Raises:
        StudyError: If the stored study differs from the spec, or is already running.
        DataError, ModelError, DeviceError, StorageError, SpecError: If something cannot be used.
        SearchError: If five trials fail in a row, or the study ends without a completed trial.
        KeyboardInterrupt, SystemExit: If Ctrl-C or SIGTERM came before there was a study, or Ctrl-C came twice.
    """
    url = resolve_url(storage, spec.study.storage)
    started = time.monotonic()
    with pool or nullcontext(), display or SilentDisplay() as shown, _open_alone(url, spec.study.name, shown) as opened:
        patience = _be_patient(url, shown)
        if (finished := patience.keep_trying(lambda: _find_finished(opened, spec, patience))) is not None:
            _tidy_up(finished, url)
            return read_status(finished, url, stopped_by="done" if is_finished(finished) else "budget")
        warm_recipes = read_warm_recipes(opened, spec)
        return _work(
            opened,
            spec,
            url,
            lambda run: run.run(top=DEFAULT_TOP, n_seeds=DEFAULT_SEEDS),
            warm_recipes=warm_recipes,
            display=shown,
            n_workers=n_workers,
            pool=pool,
            started=started,
        )


def confirm_study(
    study: str,
    *,
    top: int = DEFAULT_TOP,
    n_seeds: int = DEFAULT_SEEDS,
    storage: str | None = None,
    n_workers: int | None = None,
    allow_code: bool = False,
    display: Display | None = None,
) -> StudyStatus:
    """Train the best few recipes of a study again on fresh seeds, and rank them by what they show there.

    Needs the study's images, not its study file. What an earlier call has trained counts.

    Args:
        study: The study's name.
        top: Recipes to train again, at least 1.
        n_seeds: Fresh seeds for each, at least 2.
        storage: SQLite URL; default: ``TUNER_STORAGE``, or ``sqlite:///studies.db``.
        n_workers: As for ``run_study``.
        allow_code: Whether backbones that are a user's functions may be imported: a stored study alone imports nothing.
        display: What the user sees; default: nothing.

    Raises:
        ValueError: If there is nothing to train.
        ModelError: If code is not allowed.
        StudyError: If there is no such study, it is running, no trial completed, or its images are others now.
        DataError, ModelError, DeviceError, StorageError: If something cannot be used.
        SearchError: If five trainings fail in a row.
    """
    if top < 1 or n_seeds < 2:
        raise ValueError(f"top must be at least 1 and n_seeds at least 2, got {top} and {n_seeds}")
    url = resolve_url(storage)
    started = time.monotonic()
    with use_storage(url) as opened:
        stored = load_stored(opened, study)  # before the lock: a study that is not there makes no file
    for name in stored.spec.backbone_names():
        check_code(name, allow_code=allow_code, where=f"study {study!r}", kind="study")
    with display or SilentDisplay() as shown, _open_alone(url, study, shown) as opened:
        stored = load_stored(opened, study)
        if find_best(stored.study) is None:
            raise StudyError(f"study {study!r}: at least one trial must have completed, got none; 'tuner run' goes on")
        return _work(
            opened,
            stored.spec,
            url,
            lambda run: run.confirm(top=top, n_seeds=n_seeds),
            display=shown,
            n_workers=n_workers,
            started=started,
        )


def _work(
    opened: RDBStorage,
    spec: StudySpec,
    url: str,
    lead: Callable[[StudyRun], StudyStatus],
    *,
    warm_recipes: Sequence[WarmRecipe] = (),
    display: Display,
    n_workers: int | None,
    pool: Pool | None = None,
    started: float,
) -> StudyStatus:
    """Start workers on a study, and lead them through a run."""
    with StopSignals() as signals, pool or open_pool(spec) as workers, _hide_cuda(spec):
        display.show(ActivityChanged(worker=0, text="looking at the data and the backbones"))
        scouted = scout_study(workers, spec, n_workers=n_workers, must_stop=lambda: signals.received is not None)
        if scouted is None:
            raise KeyboardInterrupt if signals.received == "sigint" else SystemExit(EXIT_SIGTERM)
        display.show(ActivityChanged(worker=0, text=""))
        for note in scouted.description.notes:
            display.show(Noted(text=note))
        patience = _be_patient(url, display, signals)
        facts = collect_facts(scouted.description)
        stored = patience.keep_trying(lambda: open_study(opened, spec, facts, patience))
        book = TrialBook(stored, warm_recipes)
        files = RunFiles(url, spec.study.name, spec.study.objective, book)
        clock = RunClock(stored, scouted.slots, started=started)
        loop = SearchLoop(stored, book, files, scouted, pool=workers, display=display, signals=signals, clock=clock)
        status = lead(StudyRun(stored, book, loop, clock, url=url, display=display))
    loop.tidy_up()
    return status


def _be_patient(url: str, display: Display, signals: StopSignals | None = None) -> Patience:
    """Return how a run waits for its database; without signals to look at, Ctrl-C interrupts by itself."""
    return Patience(
        find_database(url),
        note=lambda text: display.show(Noted(text=text)),
        must_stop=lambda: signals is not None and signals.received is not None,
    )


@contextmanager
def _open_alone(url: str, study_name: str, display: Display) -> Iterator[RDBStorage]:
    """Open the storage as the only run of a study."""
    database = find_database(url)
    if not database.parent.is_dir():
        raise StorageError(f"storage: must lie in a folder that exists, got {database}")
    with hold_lock(study_lock_path(url, study_name)) as is_free:
        if not is_free:
            raise StudyError(f"study {study_name!r}: must not be running already; another 'tuner run' holds it")
        patience = _be_patient(url, display)
        patience.keep_trying(lambda: _make_ready(url))
        with use_storage(url, patience=patience) as storage:
            yield storage


def _make_ready(url: str) -> None:
    """Make the database if it is not there, and check that it can be written."""
    with hold_lock(schema_lock_path(url)) as is_free:
        if not is_free:
            raise StorageBusyError(f"storage: must not be made by two at once, got {schema_lock_path(url)} locked")
        with use_storage(url, create=True, busy_seconds=ATTEMPT_SECONDS):
            pass


def _find_finished(storage: RDBStorage, spec: StudySpec, patience: Patience) -> StoredStudy | None:
    """Return the stored study if it is the spec's and has all its trials, or no budget: there is nothing to run."""
    try:
        stored = load_stored(storage, spec.study.name)
    except StudyError:
        return None
    if find_changes(stored.spec, spec):
        return None
    stored = StoredStudy(study=stored.study, spec=spec, facts=stored.facts)
    with explain_damage(f"study {stored.name!r}"):
        has_ended = is_finished(stored) and is_confirmed(stored) and find_best(stored.study) is not None
        if not has_ended and not is_budget_spent(stored):
            return None
    with _hide_cuda(spec):
        return open_study(storage, spec, stored.facts, patience)


def _tidy_up(stored: StoredStudy, url: str) -> None:
    """Do what the end of a run does, for one that was killed when there was nothing left to run."""
    book = TrialBook(stored)
    book.adopt()
    RunFiles(url, stored.name, stored.spec.study.objective, book).sweep()


@contextmanager
def _hide_cuda(spec: StudySpec) -> Iterator[None]:
    """Keep the coordinator off the devices while the gp sampler computes with torch."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if spec.search.sampler == "gp":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        if visible is None:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = visible
