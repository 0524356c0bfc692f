"""How many trials a second does the coordinator's book-keeping carry, against Optuna's own loop on its default URL?

One trial at a time is stored as a long trial is: after it was asked for, after each epoch and at its end. A cohort's
trials go through the same steps together, one transaction a step. The random sampler costs next to nothing, so that a
cohort trial's share is book-keeping alone.
"""

import logging
import math
import random
import statistics
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import create_trial

from benchmarks.harness import Case
from tuner.search.storage import open_storage
from tuner.search.studies import StoredStudy, open_study
from tuner.search.study_facts import StudyFacts
from tuner.search.trial_book import TrialBook
from tuner.spec.study import parse_spec
from tuner.trial import EpochResult, TrialOutcome, TrialState

EPOCHS = 5
N_TRIALS = 64
N_SMOKE_TRIALS = 4
COHORT = 16
LONG_STUDY = 1000
COHORT_ARM = f"tuner, {COHORT} trials to a transaction"
LATE_ARM = f"{COHORT_ARM}, after {LONG_STUDY} trials"


def run_book(seed: int, smoke: bool, *, n_together: int = 1, n_before: int = 0) -> float:
    """Return trials per second of ask, five reports and tell through ``TrialBook`` (one row of attributes each).

    Args:
        seed: Of the study.
        smoke: Whether to be small.
        n_together: Trials that share a transaction for each step.
        n_before: Finished trials that the study holds already.
    """
    n_trials = N_SMOKE_TRIALS if smoke else N_TRIALS
    n_together = min(n_together, n_trials)
    with open_new_study(seed, n_trials) as stored:
        book = TrialBook(stored)
        add_history(stored, min(n_before, 10) if smoke else n_before)
        book.prepare()
        started = time.perf_counter()
        for _ in range(n_trials // n_together):
            run_together(book, n_together)
        return n_trials / (time.perf_counter() - started)


def run_together(book: TrialBook, n_trials: int) -> None:
    """Ask for trials, report their epochs in rounds, and tell them; each step is one transaction."""
    asked = [book.ask() for _ in range(n_trials)]
    running = [trial for trial in asked if trial is not None]
    assert len(running) == n_trials
    book.flush()
    for epoch in range(1, EPOCHS + 1):
        for number, params in running:
            book.report(number, make_result(epoch, learn(params.lr, epoch)))
        book.flush()
    for number, _ in running:
        book.tell(number, TrialOutcome(state=TrialState.COMPLETE))
    book.flush()


@contextmanager
def open_new_study(seed: int, n_trials: int) -> Iterator[StoredStudy]:
    """Open a study without images in a database of its own."""
    tables = {
        "study": {"name": "book", "seed": seed},
        "data": {"source": "digits"},
        "space": {"lr": {"low": 1e-5, "high": 1e-1, "log": True}, "dropout": {"low": 0.0, "high": 0.5}},
        "training": {"backbone": "tuner:small_cnn", "epochs": EPOCHS},
        "search": {"n_trials": n_trials, "sampler": "random"},
    }
    facts = StudyFacts(
        data_hash="",
        classes=(),
        splits="",
        split_counts={},
        group_counts={"tuner:small_cnn": 4},
        weights={},
        preprocessing={},
        versions={},
    )
    with tempfile.TemporaryDirectory() as folder:
        storage = open_storage(f"sqlite:///{folder}/book.db", create=True)
        try:
            yield open_study(storage, parse_spec(tables, Path(folder)), facts)
        finally:
            storage.remove_session()
            storage.engine.dispose()


def add_history(stored: StoredStudy, n_trials: int) -> None:
    """Give a study finished trials; the first flush stores them."""
    distributions: dict[str, optuna.distributions.BaseDistribution] = {
        "lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True),
        "dropout": optuna.distributions.FloatDistribution(0.0, 0.5),
    }
    for number in range(n_trials):
        lr = 10 ** -(1 + number % 40 / 10)
        curve = {epoch: learn(lr, epoch) for epoch in range(1, EPOCHS + 1)}
        stored.study.add_trial(
            create_trial(
                value=curve[EPOCHS],
                params={"lr": lr, "dropout": 0.1},
                distributions=distributions,
                intermediate_values=curve,
            )
        )


def run_optuna(seed: int, smoke: bool) -> float:
    """Return trials per second of ``study.optimize`` on the default SQLite URL, without any attributes."""
    n_trials = N_SMOKE_TRIALS if smoke else N_TRIALS
    logging.getLogger("optuna").setLevel(logging.WARNING)

    def objective(trial: optuna.Trial) -> float:
        lr = trial.suggest_float("lr", 1e-5, 1e-1, log=True)
        trial.suggest_float("dropout", 0.0, 0.5)
        for epoch in range(1, EPOCHS + 1):
            trial.report(learn(lr, epoch), epoch)
            trial.should_prune()
        return learn(lr, EPOCHS)

    with tempfile.TemporaryDirectory() as folder:
        study = optuna.create_study(
            storage=f"sqlite:///{folder}/plain.db",
            direction="maximize",
            sampler=optuna.samplers.RandomSampler(seed=seed),
        )
        started = time.perf_counter()
        study.optimize(objective, n_trials=n_trials)
        return n_trials / (time.perf_counter() - started)


def learn(lr: float, epoch: int) -> float:
    """Return a made-up accuracy."""
    return 1 - abs(math.log10(lr) + 3) / 10 - 1 / (epoch + 1) + random.Random(epoch).random() / 100


def make_result(epoch: int, accuracy: float) -> EpochResult:
    """Return an epoch with this accuracy."""
    return EpochResult(
        epoch=epoch,
        train_loss=1.0,
        val_loss=1.0,
        val_accuracy=accuracy,
        val_balanced_accuracy=accuracy,
        val_macro_precision=accuracy,
        val_macro_recall=accuracy,
        val_macro_f1=accuracy,
        seconds=1.0,
        images_per_second=100.0,
    )


def weigh_cohorts(numbers: Mapping[str, list[float]], _: bool) -> dict[str, Any]:
    """Return what a trial of a cohort costs in milliseconds of book-keeping."""
    return {
        f"ms of a trial, {arm}": 1000 / statistics.median(numbers[arm])
        for arm in (COHORT_ARM, LATE_ARM)
        if arm in numbers
    }


CASE = Case(
    name="trial_book",
    question="how many trials a second (ask, 5 reports, tell) does one process write to SQLite?",
    unit="trials/s",
    baseline="optuna default URL",
    regression="one at a time less than 0.75x of Optuna's default URL, which stores no curves, class reports or "
    "reasons; or more than 10 ms for a trial of a cohort",
    arms={
        "optuna default URL": run_optuna,
        "tuner, one trial at a time": run_book,
        COHORT_ARM: partial(run_book, n_together=COHORT),
        LATE_ARM: partial(run_book, n_together=COHORT, n_before=LONG_STUDY),
    },
    conclude=weigh_cohorts,
)
