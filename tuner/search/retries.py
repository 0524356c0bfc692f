"""Trials that are tried again: how often, and what the next attempt knows of the first."""

from typing import Any, Protocol

from optuna.trial import FrozenTrial, TrialState

from tuner.search.screening import DEEPER_ATTR
from tuner.search.trial_attrs import ATTEMPT_ATTR, MAX_RETRIES, SCREEN_ATTR

_FIRST_ATTR = "first_attempt"


class Numbered(Protocol):
    """A trial, running or not."""

    @property
    def number(self) -> int:
        """Its number in the study."""

    @property
    def user_attrs(self) -> dict[str, Any]:
        """What is stored with it."""


def find_origin(trial: Numbered) -> int:
    """Return the number of a trial's first attempt, from which all attempts have their seed and their checkpoint."""
    return int(trial.user_attrs.get(_FIRST_ATTR, trial.number))


def is_begun(trial: FrozenTrial) -> bool:
    """Whether a trial that is not over has been started, in this attempt or in an earlier one."""
    return trial.state == TrialState.RUNNING or _FIRST_ATTR in trial.user_attrs


def count_attempts(trial: Numbered) -> int:
    """Return how often a trial's point was lost with its worker, its cohort or its files before."""
    return int(trial.user_attrs.get(ATTEMPT_ATTR, 0))


def describe_retry(trial: FrozenTrial, *, is_suspect: bool) -> dict[str, Any] | None:
    """Return the user attributes of the next attempt at a lost trial; None if there is none.

    Args:
        trial: The lost one.
        is_suspect: Whether the point itself may be at fault. Such a one is tried again twice at most.
    """
    n_attempts = count_attempts(trial)
    if not trial.params or (is_suspect and n_attempts >= MAX_RETRIES):
        return None
    purpose = {key: value for key, value in trial.user_attrs.items() if key in {SCREEN_ATTR, DEEPER_ATTR}}
    history = {_FIRST_ATTR: find_origin(trial), "retry_of": trial.number, ATTEMPT_ATTR: n_attempts + is_suspect}
    return purpose | history
