"""Tests of tuner.search.pruners."""

from typing import get_args

import optuna
import pytest
from optuna.pruners import (
    BasePruner,
    HyperbandPruner,
    MedianPruner,
    NopPruner,
    PercentilePruner,
    SuccessiveHalvingPruner,
)

from tuner.search.pruners import PRUNERS, make_pruner, make_study_pruner
from tuner.search.trial_attrs import SCREEN_ATTR
from tuner.spec.sections import SearchSection

EPOCHS = 10


def find_pruned_epoch(name: str, *, good: float, bad: float, n_before: int = 9) -> int | None:
    """Return the epoch after which a bad curve is pruned that follows good ones; None if never."""
    study = optuna.create_study(direction="maximize", pruner=make_pruner(name, epochs=EPOCHS), study_name="s")
    for _ in range(n_before):
        trial = study.ask()
        for epoch in range(1, EPOCHS + 1):
            trial.report(good, epoch)
            trial.should_prune()
        study.tell(trial, good)
    trial = study.ask()
    for epoch in range(1, EPOCHS + 1):
        trial.report(bad, epoch)
        if trial.should_prune():
            return epoch
    return None


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("median", MedianPruner),
        ("percentile", PercentilePruner),
        ("asha", SuccessiveHalvingPruner),
        ("hyperband", HyperbandPruner),
        ("none", NopPruner),
    ],
)
@pytest.mark.parametrize("epochs", [1, 2, 3, 8, 100])
def test_make_pruner_makes_each_kind(name: str, kind: type[BasePruner], epochs: int) -> None:
    """Every name of the study file has its pruner, for any number of epochs, without a warning."""
    assert isinstance(make_pruner(name, epochs=epochs), kind)


def test_pruners_are_those_of_the_study_file() -> None:
    """The registry and the spec name the same pruners."""
    assert sorted(PRUNERS) == sorted(get_args(SearchSection.model_fields["pruner"].annotation))


@pytest.mark.parametrize(("name", "first_epoch"), [("median", 3), ("percentile", 3), ("asha", 2), ("hyperband", 2)])
def test_pruner_stops_a_bad_curve_after_warm_up(name: str, first_epoch: int) -> None:
    """A curve far below the others is pruned, but never before the pruner's first epoch."""
    epoch = find_pruned_epoch(name, good=0.9, bad=0.1)
    assert epoch is not None
    assert epoch >= first_epoch


@pytest.mark.parametrize("name", ["median", "percentile", "asha", "hyperband", "none"])
def test_pruner_spares_the_best_curve(name: str) -> None:
    """A curve above all others runs to its end."""
    assert find_pruned_epoch(name, good=0.5, bad=0.9) is None


def test_none_never_prunes() -> None:
    """Without a pruner the worst curve runs to its end."""
    assert find_pruned_epoch("none", good=0.9, bad=0.0) is None


@pytest.mark.parametrize("name", ["median", "percentile"])
def test_pruner_waits_for_trials_to_compare_with(name: str) -> None:
    """Four completed trials are too few for median and percentile."""
    assert find_pruned_epoch(name, good=0.9, bad=0.1, n_before=4) is None
    assert find_pruned_epoch(name, good=0.9, bad=0.1, n_before=5) is not None


# --- beside a screen ---


def make_screened_study(pruner: BasePruner) -> optuna.Study:
    """Return a study of eight heads of the screen, flat and high, and of one deeper trial that rises."""
    study = optuna.create_study(direction="maximize", pruner=pruner)
    for number in range(8):
        study.enqueue_trial({}, user_attrs={SCREEN_ATTR: {"backbone": "a", "number": number}})
        trial = study.ask()
        for epoch in range(1, 11):
            trial.report(0.9, epoch)
        study.tell(trial, 0.9)
    return study


@pytest.mark.parametrize("name", ["median", "percentile"])
def test_screened_pruner_spares_a_deeper_trial_that_begins_below_the_heads(name: str) -> None:
    """Without it the first deeper trial would be pruned at once, and no deeper trial could ever complete."""
    pruned = []
    for make in (make_pruner, make_study_pruner):
        trial = make_screened_study(make(name, epochs=10)).ask()
        for epoch in range(1, 6):
            trial.report(0.1 * epoch, epoch)
        pruned.append(trial.should_prune())
    assert pruned == [True, False]


def test_screened_pruner_still_compares_deeper_trials() -> None:
    """It is blind to the screen alone."""
    study = make_screened_study(make_study_pruner("median", epochs=10))
    for value in (0.7, 0.72, 0.74, 0.76, 0.78):
        trial = study.ask()
        for epoch in range(1, 11):
            trial.report(value, epoch)
        study.tell(trial, value)
    bad = study.ask()
    for epoch in range(1, 6):
        bad.report(0.2, epoch)
    assert bad.should_prune()


@pytest.mark.parametrize("name", ["asha", "hyperband", "none"])
def test_screened_pruner_leaves_pruners_of_rungs_as_they_are(name: str) -> None:
    """A trial that is never asked about takes no rung."""
    assert type(make_study_pruner(name, epochs=10)) is type(make_pruner(name, epochs=10))
