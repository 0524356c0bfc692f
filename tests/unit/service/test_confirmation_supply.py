"""What workers get while a study is confirmed."""

import math
import time
from pathlib import Path

import pytest

from tests.unit.search.builders import COMPLETE, make_epoch, make_facts, make_spec, make_storage, run_trial
from tuner.search.studies import open_study
from tuner.search.trial_book import TrialBook
from tuner.service.confirmation_supply import ConfirmationSupply


def open_supply(folder: Path, *, deadline: float = math.inf) -> tuple[ConfirmationSupply, TrialBook]:
    """Return the supply of a study with two candidates, and its book."""
    stored = open_study(make_storage(folder), make_spec(), make_facts(max_folds=20))
    book = TrialBook(stored)
    book.prepare()
    for value in (0.5, 0.9):
        run_trial(book, (value, value, value))
    return ConfirmationSupply(stored, book, (1, 0), n_seeds=2, deadline=deadline), book


def test_supply_gives_each_training_once_on_images(tmp_path: Path) -> None:
    """All seeds of the best first, each alone, with the cut that it trains on; then it is dry."""
    supply, book = open_supply(tmp_path)
    assert (supply.n_wanted, supply.n_missing, supply.n_done) == (4, 4, 0)
    batches = []
    while (batch := supply.take(())) is not None:
        batches.append(batch)
    assert [batch.uses_features for batch in batches] == [False] * 4
    assert [batch.repeats[0].fold for batch in batches] == [0, 1, 0, 1]
    assert {batch.repeats[0].n_folds for batch in batches} == {10}
    assert (supply.n_missing, supply.n_done, supply.is_dry) == (0, 0, True)
    number, _ = batches[0].members[0]
    for epoch in (1, 2, 3):
        book.report(number, make_epoch(epoch, 0.7))
    book.tell(number, COMPLETE)
    assert supply.n_done == 1
    with pytest.raises(TypeError, match=r"^a confirmation trains on images, got 1 trials back$"):
        supply.take_back(batches[0].members, is_lasting=True)


def test_supply_starts_nothing_after_its_time(tmp_path: Path) -> None:
    """What is missing then stays missing."""
    supply, _ = open_supply(tmp_path, deadline=time.monotonic() - 1)
    assert supply.take(()) is None
    assert (supply.is_late, supply.is_dry, supply.n_missing) == (True, True, 4)
