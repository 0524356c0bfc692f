"""What waits to be tried: first points, the screen and what follows it, grid points, and what was lost."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import BaseDistribution
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from tuner.search.distributions import Point, find_untried, list_grid, project_default_recipe
from tuner.search.retries import describe_retry
from tuner.search.screening import DEEPER_ATTR, choose_deeper, find_missing, is_screen, list_screen_points
from tuner.search.trial_attrs import SCREEN_ATTR, is_confirmation
from tuner.search.warm_start import WARM_ATTR, WarmRecipe, project_recipe
from tuner.spec.sections import StudySpec


class TrialQueue:
    """Optuna's queue of a running study, and what is known of it without looking. One trial book holds it."""

    def __init__(
        self,
        study: optuna.Study,
        spec: StudySpec,
        distributions: Mapping[str, BaseDistribution],
        group_counts: Mapping[str, int],
    ) -> None:
        self._study, self._spec = study, spec
        self._distributions, self._group_counts = distributions, group_counts
        self._is_grid = spec.search.sampler == "grid"
        self._grid = list_grid(distributions, seed=spec.study.seed) if self._is_grid else []
        self._n_screen = sum(is_screen(trial) for trial in self._list_waiting())
        self.is_exhausted = False
        """Whether there is no point left to ask for."""

    def fill(self, warm_recipes: Iterable[WarmRecipe]) -> None:
        """Queue what a new study begins with, and what the screen of an old one lacks."""
        is_new = not self._study.get_trials(deepcopy=False)
        for warm in warm_recipes if is_new else ():
            point = project_recipe(warm.recipe, self._spec, self._distributions, self._group_counts)
            self.push(point, {WARM_ATTR: {"study": warm.study, "trial": warm.trial}})
        if self._spec.search.screen > 0:
            points = list_screen_points(self._spec, self._distributions)
            for missing in find_missing(points, self._study.get_trials(deepcopy=False)):
                self.push(missing.point, missing.attrs)
        for point in self._list_first_points(is_new=is_new):
            self._study.enqueue_trial(point, skip_if_exists=True)

    def _list_first_points(self, *, is_new: bool) -> Sequence[Point]:
        if self._is_grid:
            return []
        if self._spec.enqueue:
            return self._spec.enqueue
        if self._spec.search.screen:
            return []  # the screen proposes better ones
        return [project_default_recipe(self._spec, self._distributions)] if is_new else []

    def push(self, point: Point, attrs: Mapping[str, Any]) -> None:
        """Queue a point, with the user attributes that tell later what it was for."""
        self._study.enqueue_trial(point, user_attrs=dict(attrs))
        self._n_screen += SCREEN_ATTR in attrs
        self.is_exhausted = False

    def push_again(self, trial: FrozenTrial, *, is_suspect: bool = False) -> None:
        """Queue a lost trial's point as a new trial, if it may be tried again."""
        if is_confirmation(trial):
            return  # the next confirmation sees that it is missing
        if (attrs := describe_retry(trial, is_suspect=is_suspect)) is not None:
            self.push(trial.params, attrs)

    def push_deeper(self) -> None:
        """Queue what a finished screen proposes, unless that was done."""
        trials = self._study.get_trials(deepcopy=False)
        if any(DEEPER_ATTR in trial.user_attrs for trial in trials):
            return
        for deeper in choose_deeper(trials, self._study.direction, self._spec, self._distributions):
            self.push(deeper.point, deeper.attrs)

    def push_grid_point(self) -> bool:
        """Queue a grid's next untried point, unless one waits; return whether there is something to ask for."""
        if not self._is_grid or self.next_is_queued:
            return True
        point = find_untried(self._grid, [trial.params for trial in self._study.get_trials(deepcopy=False)])
        if point is None:
            self.is_exhausted = True
            return False
        self._study.enqueue_trial(point)
        return True

    def note_asked(self, *, was_screen: bool) -> None:
        """Note that a trial left the queue."""
        self._n_screen -= was_screen

    # --- what waits ---

    @property
    def max_trials(self) -> int:
        """How many trials the space allows: the points of a grid."""
        return len(self._grid) if self._is_grid else sys.maxsize

    @property
    def has_screen(self) -> bool:
        """Whether a trial of the screen waits."""
        return self._n_screen > 0

    @property
    def next_is_screen(self) -> bool:
        """Whether the next trial is one of the screen."""
        return self.has_screen and is_screen(min(self._list_waiting(), key=lambda trial: trial.number))

    @property
    def next_is_queued(self) -> bool:
        """Whether the next trial waits in the queue, and need not be proposed."""
        return bool(self._list_waiting())

    def _list_waiting(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(OptunaState.WAITING,))
