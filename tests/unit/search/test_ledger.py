"""The bill: every second of a device is in it once."""

from dataclasses import asdict, replace
from pathlib import Path

import pytest

from tuner.search.ledger import RETRAINS_ATTR, RUNS_ATTR, RunCost, describe_ledger, read_ledger
from tuner.search.trial_book import TrialBook
from tuner.trial import Reason, TrialOutcome, TrialState

from .builders import COMPLETE, PRUNED, make_epoch, open_small

INTERRUPTED = TrialOutcome(state=TrialState.FAIL, reason=Reason.INTERRUPTED, message="the run was stopped")
OUT_OF_MEMORY = TrialOutcome(state=TrialState.PRUNED, reason=Reason.OUT_OF_MEMORY, message="CUDA out of memory")


def test_ledger_adds_up_what_trials_and_runs_took(tmp_path: Path) -> None:
    """By how trials ended; validation by its share of the epochs; what nobody used is idle; retraining is apart."""
    stored = open_small(tmp_path)
    book = TrialBook(stored)
    for outcome, seconds in ((COMPLETE, 10.0), (PRUNED, 4.0), (OUT_OF_MEMORY, 2.0), (INTERRUPTED, 1.0)):
        asked = book.ask()
        assert asked is not None
        for epoch in (1, 2, 3):
            book.report(asked[0], replace(make_epoch(epoch, 0.5), seconds=1.0, val_seconds=0.25))
        book.tell(asked[0], outcome, device_seconds=seconds)
    book.flush()
    runs = [
        RunCost(started="", wall_seconds=10.0, n_devices=2, build_seconds=3.0),
        RunCost(started="", wall_seconds=5.0, n_devices=1, build_seconds=0.0),
    ]
    stored.study.set_user_attr(RUNS_ATTR, [asdict(run) for run in runs])
    stored.study.set_user_attr(RETRAINS_ATTR, [7.0, 1.0])
    ledger = read_ledger(stored.study)
    assert [ledger.train, ledger.evaluate] == pytest.approx([7.5, 2.5])
    assert (ledger.build, ledger.pruned, ledger.failed, ledger.retrain) == (3.0, 4.0, 3.0, 8.0)
    assert ledger.held == pytest.approx(25.0)
    assert ledger.idle == pytest.approx(5.0)
    assert ledger.wall == 15.0
    assert describe_ledger(ledger) == (
        "device time: 25 s (build 3 s, train 8 s, evaluate 2 s, pruned 4 s, failed 3 s, idle 5 s) in 15 s; retrain 8 s"
    )


def test_ledger_of_an_older_study_is_empty(tmp_path: Path) -> None:
    """Nothing was written down then."""
    assert read_ledger(open_small(tmp_path).study).held == 0
