"""Confirmation in a real book: what is trained again, that it counts for nothing else, and what it says."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from optuna.trial import TrialState as OptunaState

from tuner.search.confirmation import (
    Confirmation,
    Wanted,
    choose_candidates,
    count_folds,
    describe_confirmation,
    list_missing,
    make_repeat,
    summarise,
)
from tuner.search.ledger import read_ledger
from tuner.search.studies import StoredStudy, count_states, find_best, open_study
from tuner.search.trial_attrs import PARAMS_ATTR, is_confirmation
from tuner.search.trial_book import TrialBook
from tuner.trial import Reason, TrialOutcome, TrialParams, TrialState

from .builders import COMPLETE, make_epoch, make_facts, make_spec, make_storage, run_trial

LOST = TrialOutcome(state=TrialState.FAIL, reason=Reason.WORKER_LOST, message="killed by signal 9")
INTERRUPTED = TrialOutcome(state=TrialState.FAIL, reason=Reason.INTERRUPTED, message="the run was stopped")
DIVERGED = TrialOutcome(state=TrialState.PRUNED, reason=Reason.DIVERGED, message="training loss is nan")
VALUES = (0.5, 0.9, 0.7, 0.8)
N_SEEDS = 2


def open_searched(folder: Path, *, max_folds: int = 20, **sections: Any) -> tuple[StoredStudy, TrialBook]:
    """Open a study whose search is over."""
    stored = open_study(make_storage(folder), make_spec(**sections), make_facts(max_folds=max_folds))
    book = TrialBook(stored)
    book.prepare()
    for value in VALUES:
        run_trial(book, (value, value, value))
    return stored, book


def confirm(book: TrialBook, trial: int, seed: int, value: float, outcome: TrialOutcome = COMPLETE) -> int:
    """Train a recipe again, with a made-up end."""
    number, _ = book.ask_confirmation(Wanted(trial=trial, seed=seed), n_folds=10)
    for epoch in (1, 2, 3):
        assert not book.report(number, make_epoch(epoch, value))
    book.tell(number, outcome, device_seconds=2.0)
    book.flush()
    return number


def test_candidates_are_the_best_recipes_each_once(tmp_path: Path) -> None:
    """A recipe that was tried twice is one candidate."""
    stored, book = open_searched(tmp_path)
    stored.study.enqueue_trial(stored.study.trials[1].params)
    run_trial(book, (0.85, 0.85, 0.85))
    assert choose_candidates(stored.study, 3) == (1, 3, 2)
    assert choose_candidates(stored.study, 99) == (1, 3, 2, 0)


def test_confirming_trial_has_the_recipe_and_a_fresh_seed(tmp_path: Path) -> None:
    """All but the seed and the views is the confirmed trial's; every candidate has the same seeds and cuts."""
    stored, book = open_searched(tmp_path, training={"views": 4})
    number, params = book.ask_confirmation(Wanted(trial=1, seed=0), n_folds=10)
    confirmed = TrialParams.from_json(stored.study.trials[1].user_attrs[PARAMS_ATTR])
    changed = {key for key, value in params.to_json().items() if confirmed.to_json()[key] != value}
    assert changed == {"seed", "views"}
    assert params.views == "fresh"
    _, other = book.ask_confirmation(Wanted(trial=3, seed=0), n_folds=10)
    assert other.seed == params.seed
    assert stored.study.trials[number].params == stored.study.trials[1].params
    assert [repeat.seed for repeat in book.list_repeats(number)] == [params.seed]


def test_confirming_trial_draws_the_head_that_it_starts_from_afresh(tmp_path: Path) -> None:
    """Its recipe is the search's, its seed is not: a lucky head would flatter the recipe on every seed."""
    search = {"screen": 1, "sampler": "tpe"}
    stored = open_study(
        make_storage(tmp_path), make_spec(search=search, training={"head_start": "screen"}), make_facts(max_folds=20)
    )
    book = TrialBook(stored)
    book.prepare()
    heads = [run_trial(book, (0.5, 0.5, 0.5)) for _ in range(2)]
    deeper = run_trial(book, (0.9, 0.9, 0.9))
    assert heads == [0, 1]
    params = TrialParams.from_json(stored.study.trials[deeper].user_attrs[PARAMS_ATTR])
    assert params.head_start is not None
    fresh = [book.ask_confirmation(Wanted(trial=deeper, seed=seed), n_folds=10)[1] for seed in (0, 1)]
    for each in fresh:
        assert each.head_start is not None
        assert each.head_start.seed == each.seed != params.head_start.seed
        assert replace(each.head_start, seed=params.head_start.seed) == params.head_start
    assert fresh[0].seed != fresh[1].seed


def test_confirming_trials_count_for_nothing_else(tmp_path: Path) -> None:
    """Neither for n_trials nor as the best, however good they are; the bill has them apart."""
    stored, book = open_searched(tmp_path)
    n_counted = book.count_finished()
    number = confirm(book, 1, 0, 0.99)
    assert is_confirmation(stored.study.trials[number])
    assert stored.study.trials[number].value == 0.99
    assert book.count_finished() == n_counted
    assert count_states(stored.study)["COMPLETE"] == len(VALUES)
    best = find_best(stored.study)
    assert best is not None
    assert (best.number, book.best) == (1, (1, 0.9))
    assert TrialBook(stored).best == (1, 0.9)
    assert read_ledger(stored.study).confirm == 2.0


def test_missing_trainings_are_those_of_the_best_first(tmp_path: Path) -> None:
    """What runs, ended, or diverged is not missing; what was lost is, three times, and interruptions do not count."""
    stored, book = open_searched(tmp_path)
    wanted = [Wanted(trial=trial, seed=seed) for trial in (1, 3) for seed in range(N_SEEDS)]
    assert list_missing(stored.study, (1, 3), N_SEEDS) == wanted
    confirm(book, 1, 0, 0.9)
    confirm(book, 1, 1, 0.0, DIVERGED)
    book.ask_confirmation(wanted[2], n_folds=10)
    assert list_missing(stored.study, (1, 3), N_SEEDS) == wanted[3:]
    for outcome, n_left in ((LOST, 1), *((INTERRUPTED, 1),) * 5, (LOST, 1), (LOST, 0)):
        confirm(book, 3, 1, 0.0, outcome)
        assert len(list_missing(stored.study, (1, 3), N_SEEDS)) == n_left


def test_killed_confirmation_is_not_queued_as_a_trial_of_the_search(tmp_path: Path) -> None:
    """The next run ends what it finds running, and the next confirmation sees it missing."""
    stored, book = open_searched(tmp_path)
    book.ask_confirmation(Wanted(trial=1, seed=0), n_folds=10)
    book.flush()
    again = open_study(make_storage(tmp_path), stored.spec, stored.facts)
    assert TrialBook(again).prepare() == 1
    states = [trial.state for trial in again.study.trials]
    assert OptunaState.WAITING not in states
    assert Wanted(trial=1, seed=0) in list_missing(again.study, (1,), 1)


def test_summary_ranks_by_the_mean_and_puts_failures_last(tmp_path: Path) -> None:
    """A candidate that lacks a training is left out; one whose training diverged is no recipe for production."""
    stored, book = open_searched(tmp_path)
    assert summarise(stored, (1, 3, 2, 0), N_SEEDS) is None
    for trial, values in {1: (0.80, 0.84), 3: (0.86, 0.88), 2: (0.99, None), 0: (0.5,)}.items():
        for seed, value in enumerate(values):
            confirm(book, trial, seed, value or 0.0, COMPLETE if value else DIVERGED)
    found = summarise(stored, (1, 3, 2, 0), N_SEEDS)
    assert found is not None
    assert [each.trial for each in found.candidates] == [3, 1, 2]
    assert found.winner.mean == pytest.approx(0.87)
    assert found.winner.deviation == pytest.approx(0.0141421, abs=1e-6)
    assert found.gain == pytest.approx(0.07)
    assert found.candidates[2].n_failed == 1
    assert found.prediction.low < found.prediction.accuracy < found.prediction.high
    assert Confirmation.from_json(found.to_json()) == found
    text = "\n".join(describe_confirmation(found))
    assert "confirmed: trial 3, val_accuracy 0.8700 ± 0.0141 (2 fresh seeds on 10 fresh folds)" in text
    assert "the search said 0.8000, +0.0700" in text
    assert "3. trial 2: 0.9900 ± 0.0000, in the search 0.7000, 1 seeds failed" in text


def test_summary_waits_for_what_still_runs(tmp_path: Path) -> None:
    """A training that has not ended is no failure of its recipe."""
    stored, book = open_searched(tmp_path)
    confirm(book, 1, 0, 0.9)
    book.ask_confirmation(Wanted(trial=1, seed=1), n_folds=10)
    assert summarise(stored, (1,), N_SEEDS) is None


def test_each_seed_is_compared_with_itself(tmp_path: Path) -> None:
    """A recipe of which another seed failed has no part in the prediction; the card names the seeds that completed."""
    stored, book = open_searched(tmp_path)
    for trial, values in {1: (None, 0.91, 0.92), 3: (0.5, None, 0.6)}.items():
        for seed, value in enumerate(values):
            confirm(book, trial, seed, value or 0.0, COMPLETE if value else DIVERGED)
    found = summarise(stored, (1, 3), 3)
    assert found is not None
    assert (found.winner.trial, found.winner.seeds) == (1, (1, 2))
    assert found.prediction.accuracy == pytest.approx(0.915)


def test_samplers_and_pruners_see_no_confirmation(tmp_path: Path) -> None:
    """The same points are proposed with and without them, and none of them starts the pruner."""
    proposed = []
    for name, confirms in (("without", False), ("with", True)):
        folder = tmp_path / name
        folder.mkdir()
        sections: dict[str, Any] = {"search": {"sampler": "tpe", "pruner": "median", "n_trials": 40}}
        _, book = open_searched(folder, **sections)
        for value in (0.6, 0.4, 0.3, 0.55, 0.2, 0.45, 0.35):
            run_trial(book, (value, value, value))
        for seed in range(8 if confirms else 0):
            confirm(book, 1, seed, 0.99)
        asked = [book.ask() for _ in range(3)]
        proposed.append([replace(trial[1], seed=0) for trial in asked if trial is not None])
    assert proposed[0] == proposed[1]


def test_summary_follows_the_direction(tmp_path: Path) -> None:
    """A loss is minimised."""
    stored, book = open_searched(tmp_path, study={"objective": "val_loss"})
    for trial, value in ((1, 0.7), (3, 0.9)):
        confirm(book, trial, 0, value)
    found = summarise(stored, (1, 3), 1)
    assert found is not None
    assert [each.trial for each in found.candidates] == [3, 1]
    assert found.prediction.accuracy == 0.9


@pytest.mark.parametrize(("max_folds", "n_folds"), [(0, 0), (1, 0), (2, 2), (7, 7), (500, 10)])
def test_fresh_cuts_need_images_of_a_class(max_folds: int, n_folds: int) -> None:
    """Ten folds where they can be cut; none where the data gives val."""
    assert count_folds(make_facts(max_folds=max_folds)) == n_folds


def test_fresh_seeds_validate_on_folds_of_their_own() -> None:
    """Ten seeds see every fold of one cut; the eleventh begins another cut. Without folds the seed alone is fresh."""
    repeats = [make_repeat(0, which, 10) for which in range(11)]
    assert [repeat.fold for repeat in repeats] == [*range(10), 0]
    assert len({repeat.seed for repeat in repeats}) == 11
    assert repeats[10].cut_seed != repeats[0].cut_seed == repeats[9].cut_seed
    assert make_repeat(0, 0, 0).split == (0, 0, 0)
