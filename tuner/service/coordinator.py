"""Run a study. The coordinator is the one process that writes the storage; it never loads torch, data or models."""

import math
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager

from optuna.storages import RDBStorage

from tuner.errors import EXIT_SIGTERM, StorageBusyError, StorageError, StudyError
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
from tuner.search.trial_book import TrialBook
from tuner.service.pool import WORKER_MODULE, Pool
from tuner.service.progress import ActivityChanged, Display, Noted, SilentDisplay
from tuner.service.result import StudyStatus, is_finished, read_status
from tuner.service.run_files import RunFiles
from tuner.service.scouting import collect_facts, scout_study
from tuner.service.search_loop import SearchLoop
from tuner.service.signals import StopSignals
from tuner.spec.sections import StudySpec


def run_study(
    spec: StudySpec,
    *,
    storage: str | None = None,
    n_workers: int | None = None,
    display: Display | None = None,
    worker_module: str = WORKER_MODULE,
) -> StudyStatus:
    """Run a study to its number of trials, resuming what the storage holds of it.

    Args:
        spec: The checked study file.
        storage: SQLite URL; default: the spec's, ``TUNER_STORAGE``, or ``sqlite:///studies.db``.
        n_workers: Workers to start; default: one per CUDA device (times ``per_device``), or one per CPU core.
        display: What the user sees; default: nothing.
        worker_module: As for ``Pool``.

    Returns:
        The study's status. Its ``stopped_by`` says whether a signal or the timeout ended the run early.

    Raises:
        StudyError: If the stored study differs from the spec, or is already running.
        DataError, ModelError, DeviceError, StorageError, SpecError: If something cannot be used.
        SearchError: If five trials fail in a row, or the study ends without a completed trial.
        KeyboardInterrupt, SystemExit: If Ctrl-C or SIGTERM came before there was a study, or Ctrl-C came twice.
    """
    url = resolve_url(storage, spec.study.storage)
    deadline = math.inf if spec.search.timeout is None else time.monotonic() + spec.search.timeout
    with display or SilentDisplay() as shown, _open_alone(url, spec.study.name, shown) as opened:
        patience = _be_patient(url, shown)
        if (finished := patience.keep_trying(lambda: _find_finished(opened, spec, patience))) is not None:
            _tidy_up(finished, url)
            return read_status(finished, url)
        with (
            _hide_cuda(spec) as environment,
            StopSignals() as signals,
            Pool(environment, stall_limit=spec.workers.stall_limit, worker_module=worker_module) as pool,
        ):
            shown.show(ActivityChanged(worker=0, text="looking at the data and the backbones"))
            scouted = scout_study(pool, spec, n_workers=n_workers, must_stop=lambda: signals.received is not None)
            if scouted is None:
                raise KeyboardInterrupt if signals.received == "sigint" else SystemExit(EXIT_SIGTERM)
            shown.show(ActivityChanged(worker=0, text=""))
            for note in scouted.description.notes:
                shown.show(Noted(text=note))
            patience = _be_patient(url, shown, signals)
            facts = collect_facts(scouted.description)
            stored = patience.keep_trying(lambda: open_study(opened, spec, facts, patience))
            loop = SearchLoop(stored, url, scouted, pool=pool, display=shown, signals=signals, deadline=deadline)
            status = loop.run()
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
    """Return the stored study if it is the spec's and has all its trials: there is nothing to run."""
    try:
        stored = load_stored(storage, spec.study.name)
    except StudyError:
        return None
    if find_changes(stored.spec, spec):
        return None
    stored = StoredStudy(study=stored.study, spec=spec, facts=stored.facts)
    if not is_finished(stored) or not find_best(stored.study):
        return None
    with _hide_cuda(spec):
        return open_study(storage, spec, stored.facts, patience)


def _tidy_up(stored: StoredStudy, url: str) -> None:
    """Do what the end of a run does, for one that was killed when there was nothing left to run."""
    book = TrialBook(stored)
    book.adopt()
    RunFiles(url, stored.name, stored.spec.study.objective, book).sweep()


@contextmanager
def _hide_cuda(spec: StudySpec) -> Iterator[dict[str, str]]:
    """Keep the coordinator off the devices while the gp sampler computes with torch; yield what workers inherit."""
    environment = dict(os.environ)
    if spec.search.sampler == "gp":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield environment
    finally:
        if "CUDA_VISIBLE_DEVICES" in environment:
            os.environ["CUDA_VISIBLE_DEVICES"] = environment["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ.pop("CUDA_VISIBLE_DEVICES", None)
