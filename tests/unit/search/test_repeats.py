"""Trials that are trained on several folds or with several seeds."""

from pathlib import Path
from typing import Any

from tuner.search.repeats import list_repeats
from tuner.search.studies import open_study
from tuner.search.trial_attrs import VALUES_ATTR
from tuner.search.trial_book import TrialBook

from .builders import COMPLETE, make_epoch, make_facts, make_spec, make_storage

FOLDS: dict[str, Any] = {"data": {"folds": 3}, "search": {"pruner": "median", "n_trials": 20}}


def open_book(folder: Path) -> TrialBook:
    """Open a study of three folds."""
    return TrialBook(open_study(make_storage(folder), make_spec(**FOLDS), make_facts(max_folds=9)))


def test_usual_trial_is_trained_once(tmp_path: Path) -> None:
    """It says nothing of repeats, and may use features."""
    book = TrialBook(open_study(make_storage(tmp_path), make_spec(), make_facts()))
    asked = book.ask()
    assert asked is not None
    assert book.list_repeats(asked[0]) == ()


def test_repeats_are_all_folds_with_each_seed(tmp_path: Path) -> None:
    """The first seed is the trial's own; all trials have the same folds."""
    spec = make_spec(data={"folds": 3}, search={"seeds_per_trial": 2})
    book = TrialBook(open_study(make_storage(tmp_path), spec, make_facts(max_folds=9)))
    asked = [book.ask() for _ in range(2)]
    lists = [list_repeats(spec, trial[1]) for trial in asked if trial is not None]
    for (_, params), repeats in zip(filter(None, asked), lists, strict=True):
        assert [(repeat.fold, repeat.seed == params.seed) for repeat in repeats] == [
            *((fold, True) for fold in range(3)),
            *((fold, False) for fold in range(3)),
        ]
        assert len({repeat.cut_seed for repeat in repeats}) == 1
    assert lists[0][0].cut_seed == lists[1][0].cut_seed
    assert lists[0][3].seed != lists[1][3].seed


def test_value_is_the_mean_of_the_folds_and_all_are_stored(tmp_path: Path) -> None:
    """The last epoch of each fold counts, and only when all folds are there is the trial a candidate for the best."""
    book = open_book(tmp_path)
    asked = book.ask()
    assert asked is not None
    number = asked[0]
    for fold, value in enumerate((0.2, 0.4, 0.9)):
        for epoch in (1, 2, 3):
            result = make_epoch(epoch, value if epoch == 3 else 0.99)
            book.report(number, type(result)(**vars(result) | {"repeat": fold}))
        assert book.list_final_values([number]) == ({number: 0.5} if fold == 2 else {})
    assert book.tell(number, COMPLETE) == 0.5
    book.flush()
    (trial,) = book._study.trials
    assert trial.value == 0.5
    assert trial.user_attrs[VALUES_ATTR] == [0.2, 0.4, 0.9]


def test_pruner_sees_the_first_fold_alone(tmp_path: Path) -> None:
    """A fold that is harder than the first one of others prunes nothing: folds are never compared."""
    book = open_book(tmp_path)
    for _ in range(6):
        asked = book.ask()
        assert asked is not None
        for fold in range(3):
            for epoch in (1, 2, 3):
                result = make_epoch(epoch, 0.9)
                book.report(asked[0], type(result)(**vars(result) | {"repeat": fold}))
        book.tell(asked[0], COMPLETE)
    asked = book.ask()
    assert asked is not None
    number = asked[0]
    assert not any(book.report(number, make_epoch(epoch, 0.95)) for epoch in (1, 2, 3))
    for epoch in (1, 2, 3):
        result = make_epoch(epoch, 0.01)
        assert not book.report(number, type(result)(**vars(result) | {"repeat": 1}))
    assert list(book._study.trials[number].intermediate_values) == [1, 2, 3]
    asked = book.ask()
    assert asked is not None
    assert any(book.report(asked[0], make_epoch(epoch, 0.01)) for epoch in (1, 2))
