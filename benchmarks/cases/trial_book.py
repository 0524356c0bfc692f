"""How many trials a second does the coordinator's book-keeping carry, against Optuna's own loop on its default URL?"""

import logging
import math
import random
import tempfile
import time
from pathlib import Path

import optuna

from benchmarks.harness import Case
from tuner.search.storage import open_storage
from tuner.search.studies import StudyFacts, open_study
from tuner.search.trial_book import TrialBook
from tuner.spec.study import parse_spec
from tuner.trial import EpochResult, TrialOutcome, TrialState

EPOCHS = 5


def run_book(seed: int, smoke: bool) -> float:
    """Return trials per second of ask, five reports and tell through ``TrialBook`` (one row of attributes each)."""
    n_trials = 5 if smoke else 60
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
        book = TrialBook(open_study(storage, parse_spec(tables, Path(folder)), facts))
        book.prepare()
        started = time.perf_counter()
        for _ in range(n_trials):
            asked = book.ask()
            assert asked is not None
            number, params = asked
            for epoch in range(1, EPOCHS + 1):
                book.report(number, make_result(epoch, learn(params.lr, epoch)))
            book.tell(number, TrialOutcome(state=TrialState.COMPLETE))
        seconds = time.perf_counter() - started
        storage.engine.dispose()
    return n_trials / seconds


def run_optuna(seed: int, smoke: bool) -> float:
    """Return trials per second of ``study.optimize`` on the default SQLite URL, without any attributes."""
    n_trials = 5 if smoke else 60
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


CASE = Case(
    name="trial_book",
    question="how many trials a second (ask, 5 reports, tell) does one process write to SQLite?",
    unit="trials/s",
    baseline="optuna default URL",
    regression="less than 0.75x of Optuna's default URL, which stores no curves, class reports or reasons",
    arms={"optuna default URL": run_optuna, "tuner TrialBook": run_book},
)
