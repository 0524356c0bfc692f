"""What earlier studies found is tried first."""

from pathlib import Path
from typing import Any

import pytest

from tuner.errors import StudyError
from tuner.search.confirmation import CONFIRMATION_ATTR, Wanted, summarise
from tuner.search.studies import open_study, read_params
from tuner.search.trial_book import TrialBook
from tuner.search.warm_start import WARM_ATTR, find_winner, read_warm_recipes

from .builders import COMPLETE, make_epoch, make_facts, make_spec, make_storage, run_trial

WARM: dict[str, Any] = {"study": {"name": "new"}, "warm_start": {"studies": ["small"]}}


def store_earlier(folder: Path) -> TrialBook:
    """Store a study with three trials."""
    book = TrialBook(open_study(make_storage(folder), make_spec(), make_facts()))
    book.prepare()
    for value in (0.5, 0.9, 0.7):
        run_trial(book, (value, value, value))
    return book


def test_new_study_tries_the_best_of_the_earlier_one_first(tmp_path: Path) -> None:
    """As near as its own space allows, and once: a study that has begun is left alone."""
    earlier = store_earlier(tmp_path)._study
    storage = make_storage(tmp_path)
    spec = make_spec({"lr": {"low": 1e-6, "high": 1e-5}}, training={"backbone": "test_resnet"}, **WARM)
    recipes = read_warm_recipes(storage, spec)
    assert [recipe.recipe for recipe in recipes] == [read_params(earlier.trials[1])]
    stored = open_study(storage, spec, make_facts())
    for _ in range(2):
        TrialBook(stored, recipes).prepare()
    assert read_warm_recipes(storage, spec) == []  # the earlier study may be gone by now
    first = stored.study.trials[0]
    assert first.system_attrs["fixed_params"] == {"lr": 1e-5}
    assert first.user_attrs[WARM_ATTR] == {"study": "small", "trial": 1}
    assert sum(WARM_ATTR in trial.user_attrs for trial in stored.study.trials) == 1


def test_unfrozen_layers_come_back_as_levels(tmp_path: Path) -> None:
    """A space that spreads levels over layer groups asks for the level whose layers are nearest."""
    earlier = store_earlier(tmp_path)._study
    storage = make_storage(tmp_path)
    spec = make_spec(**WARM)
    stored = open_study(storage, spec, make_facts())
    book = TrialBook(stored, read_warm_recipes(storage, spec))
    book.prepare()
    asked = book.ask()
    assert asked is not None
    wanted = read_params(earlier.trials[1])
    assert {name: getattr(asked[1], name) for name in ("backbone", "lr", "unfrozen_layers")} == {
        name: wanted[name] for name in ("backbone", "lr", "unfrozen_layers")
    }


def test_confirmed_winner_goes_before_the_best_of_the_search(tmp_path: Path) -> None:
    """What showed itself on fresh seeds is what others start from."""
    stored = open_study(make_storage(tmp_path), make_spec(), make_facts(max_folds=10))
    book = TrialBook(stored)
    book.prepare()
    for value in (0.5, 0.9, 0.7):
        run_trial(book, (value, value, value))
    for trial, value in ((1, 0.6), (2, 0.8)):
        number, _ = book.ask_confirmation(Wanted(trial=trial, seed=0), 10)
        book.report(number, make_epoch(1, value))
        book.tell(number, COMPLETE)
    found = summarise(stored, (1, 2), 1)
    assert found is not None
    best = find_winner(stored.study)
    assert best is not None
    assert best.number == 1
    stored.study.set_user_attr(CONFIRMATION_ATTR, found.to_json())
    best = find_winner(stored.study)
    assert best is not None
    assert best.number == 2


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["smal"], r"^study 'smal': must be in the storage; did you mean 'small'"),
        (["new"], r"^warm_start\.studies: must name earlier studies, got 'new', which is this one$"),
    ],
)
def test_warm_start_wants_earlier_studies(tmp_path: Path, names: list[str], message: str) -> None:
    """Before any work, in one line."""
    store_earlier(tmp_path)
    with pytest.raises(StudyError, match=message):
        read_warm_recipes(make_storage(tmp_path), make_spec(**WARM | {"warm_start": {"studies": names}}))


def test_warm_start_wants_completed_trials(tmp_path: Path) -> None:
    """A study without any has nothing to give."""
    open_study(make_storage(tmp_path), make_spec(), make_facts())
    with pytest.raises(StudyError, match=r"^warm_start\.studies: must have completed trials, got none in 'small'$"):
        read_warm_recipes(make_storage(tmp_path), make_spec(**WARM))
