"""Tests of tuner.search.trial_attrs; what a trial's end stores is in test_trial_book."""

import optuna
from optuna.trial import TrialState, create_trial

from tuner.search.trial_attrs import SCREEN_ATTR, count_reasons


def test_count_reasons_groups_the_screen_by_itself() -> None:
    """Why heads failed is told, and the search's own trials still add up to their counts."""
    study = optuna.create_study()
    screen = {SCREEN_ATTR: {"backbone": "a", "number": 0}}
    for state, attrs in (
        (TrialState.FAIL, {"reason": "error"}),
        (TrialState.FAIL, {"reason": "error", **screen}),
        (TrialState.FAIL, {"reason": "error", **screen}),
        (TrialState.PRUNED, {"reason": "diverged", **screen}),
        (TrialState.FAIL, {}),
        (TrialState.WAITING, screen),
    ):
        study.add_trial(create_trial(state=state, user_attrs=attrs))
    assert count_reasons(study) == {
        ("FAIL", "error"): 1,
        ("FAIL", "interrupted"): 1,
        ("screen FAIL", "error"): 2,
        ("screen PRUNED", "diverged"): 1,
    }
