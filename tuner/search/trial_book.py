"""The trials of a running study: asked, reported, told and queued again. One process holds the book."""

import sys
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from tuner.search.distributions import (
    Point,
    find_untried,
    list_grid,
    make_distributions,
    project_default_recipe,
    resolve_params,
)
from tuner.search.retries import count_attempts, describe_retry, find_origin, is_begun
from tuner.search.samplers import derive_seed
from tuner.search.screening import (
    DEEPER_ATTR,
    choose_deeper,
    find_missing,
    is_counted,
    is_screen,
    list_screen_points,
)
from tuner.search.studies import StoredStudy, find_best
from tuner.search.trial_attrs import LAYERS_ATTR, PARAMS_ATTR, REASON_ATTR, SCREEN_ATTR, describe_end
from tuner.trial import EpochResult, Reason, TrialOutcome, TrialParams, TrialState, Usage

_CONSTRAINTS_KEY = "constraints"
"""Optuna's older key: the only form that both Optuna 5 and its dashboard 0.21 read."""


class TrialBook:
    """Keeps the count exact: a trial counts when it is COMPLETE or PRUNED, and each is told once.

    What happens to trials is stored by ``flush``. A kill loses what came after the last one: a trial is then in the
    file as running, and is adopted by the next run, or not at all, and its number is given again.

    Raises:
        ValueError: If the study was loaded to be read only.
    """

    def __init__(self, stored: StoredStudy) -> None:
        if stored.mirror is None:
            raise ValueError("a trial book needs a study that was opened to run, got one that is only read")
        self._mirror = stored.mirror
        self._study = stored.study
        self._spec = stored.spec
        self._group_counts = stored.facts.group_counts
        self._distributions = make_distributions(self._spec, self._group_counts)
        self._running: dict[int, Trial] = {}
        self._epochs: dict[int, list[EpochResult]] = {}
        self._is_exhausted = False
        self._is_grid = self._spec.search.sampler == "grid"
        self._grid = list_grid(self._distributions, seed=self._spec.study.seed) if self._is_grid else []
        trials = self._study.get_trials(deepcopy=False)
        self._n_finished = sum(map(is_counted, trials))
        best = find_best(self._study)
        self._best = None if best is None else (best.number, best.value or 0.0)
        self._n_queued_screen = sum(is_screen(trial) and trial.state == OptunaState.WAITING for trial in trials)
        self._running_screen: set[int] = set()

    def prepare(self) -> int:
        """Adopt what an earlier run left, and fill an empty study's queue.

        All of it is stored when this returns.

        Returns:
            How many trials were left running.
        """
        n_orphans = self.adopt()
        first_points = self._first_points()  # before the screen, since they ask whether the study is new
        self._queue_screen()
        for point in first_points:
            self._study.enqueue_trial(point, skip_if_exists=True)
        self._queue_deeper()
        self.flush()
        return n_orphans

    def adopt(self) -> int:
        """End the trials that an earlier run left running, and queue them again; stored when this returns.

        Returns:
            How many there were.
        """
        orphans = self._study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,))
        for orphan in orphans:
            self._adopt(orphan)
        self.flush()
        return len(orphans)

    def flush(self) -> None:
        """Write what happened since the last flush, in one transaction."""
        self._mirror.flush()

    def _adopt(self, orphan: FrozenTrial) -> None:
        """End a trial that no process runs as interrupted, and queue it again."""
        self._queue_again(orphan)
        attrs = {REASON_ATTR: Reason.INTERRUPTED.value, "message": "the run was killed", "feasible": True}
        for key, value in attrs.items():
            self._study._storage.set_trial_user_attr(orphan._trial_id, key, value)  # noqa: SLF001
        self._study.tell(orphan.number, state=OptunaState.FAIL)

    def _first_points(self) -> Sequence[Point]:
        if self._is_grid:
            return []
        if self._spec.enqueue:
            return self._spec.enqueue
        is_new = not self._study.get_trials(deepcopy=False)
        if self._spec.search.screen:
            return []  # the screen proposes better ones
        return [project_default_recipe(self._spec, self._distributions)] if is_new else []

    def count_finished(self) -> int:
        """Return how many trials count: COMPLETE and PRUNED ones of the whole study, the screen's left out."""
        return self._n_finished

    def count_running(self) -> int:
        """Return how many trials were asked and not told, the screen's left out."""
        return len(self._running) - len(self._running_screen)

    # --- the screen ---

    @property
    def next_is_screen(self) -> bool:
        """Whether the next trial is one of the screen."""
        if self._n_queued_screen == 0:
            return False
        return is_screen(min(self._list_waiting(), key=lambda trial: trial.number))

    @property
    def next_is_queued(self) -> bool:
        """Whether the next trial waits in the queue, and need not be proposed."""
        return bool(self._list_waiting())

    def _list_waiting(self) -> list[FrozenTrial]:
        return self._study.get_trials(deepcopy=False, states=(OptunaState.WAITING,))

    @property
    def is_screening(self) -> bool:
        """Whether a screen trial still waits or runs."""
        return self._n_queued_screen + len(self._running_screen) > 0

    def _queue_screen(self) -> None:
        if self._spec.search.screen == 0:
            return
        points = list_screen_points(self._spec, self._distributions)
        for missing in find_missing(points, self._study.get_trials(deepcopy=False)):
            self._enqueue(missing.point, missing.attrs)

    def _queue_deeper(self) -> None:
        """Queue what a screen proposes once it is finished."""
        trials = self._study.get_trials(deepcopy=False)
        if self.is_screening or any(DEEPER_ATTR in trial.user_attrs for trial in trials):
            return
        for deeper in choose_deeper(trials, self._study.direction, self._spec, self._distributions):
            self._enqueue(deeper.point, deeper.attrs)

    def _enqueue(self, point: Point, attrs: Mapping[str, Any]) -> None:
        self._study.enqueue_trial(point, user_attrs=dict(attrs))
        self._n_queued_screen += SCREEN_ATTR in attrs
        self._is_exhausted = False

    # --- one trial ---

    @property
    def max_trials(self) -> int:
        """Return how many trials the space allows: the points of a grid."""
        return len(self._grid) if self._is_grid else sys.maxsize

    @property
    def is_exhausted(self) -> bool:
        """Whether there is no point left to ask for."""
        return self._is_exhausted

    def ask(self) -> tuple[int, TrialParams] | None:
        """Start the next trial, a queued one first.

        Returns:
            Its number and its resolved params; None if a grid has no point left.
        """
        if self._is_grid and not self._queue_grid_point():
            self._is_exhausted = True
            return None
        trial = self._study.ask(self._distributions)
        params = self._resolve(find_origin(trial), trial.params)
        trial.set_user_attr(PARAMS_ATTR, params.to_json())
        trial.set_user_attr(LAYERS_ATTR, params.unfrozen_layers)
        self._running[trial.number] = trial
        self._epochs[trial.number] = []
        if SCREEN_ATTR in trial.user_attrs:
            self._n_queued_screen -= 1
            self._running_screen.add(trial.number)
        return trial.number, params

    def is_screen(self, number: int) -> bool:
        """Whether a running trial is one of the screen."""
        return number in self._running_screen

    def is_suspect(self, number: int) -> bool:
        """Whether a running trial's point was lost with its worker or its cohort before."""
        return count_attempts(self._running[number]) > 0

    def place(self, numbers: Iterable[int], device: str) -> None:
        """Record where trials run."""
        for number in numbers:
            self._running[number].set_user_attr("device", device)

    def _resolve(self, origin: int, point: Point) -> TrialParams:
        seed = derive_seed(self._spec.study.seed, "trial", origin, bits=63)
        return resolve_params(self._spec, point, self._group_counts, seed=seed)

    def _queue_grid_point(self) -> bool:
        """Queue the next untried point, unless one waits; return whether there is something to ask for."""
        trials = self._study.get_trials(deepcopy=False)
        if any(trial.state == OptunaState.WAITING for trial in trials):
            return True
        point = find_untried(self._grid, [trial.params for trial in trials])
        if point is not None:
            self._study.enqueue_trial(point)
        return point is not None

    def report(self, number: int, result: EpochResult) -> bool:
        """Record one epoch.

        Returns:
            Whether the trial should be pruned; one of the screen never is.
        """
        trial = self._running[number]
        self._epochs[number].append(result)
        trial.report(result.objective_value(self._spec.study.objective), step=result.epoch)
        may_prune = result.epoch < self._spec.training.epochs and number not in self._running_screen
        return may_prune and trial.should_prune()

    @property
    def best(self) -> tuple[int, float] | None:
        """Number and value of the best completed trial, as ``find_best`` picks it."""
        return self._best

    def find_new_best(self, values: Mapping[int, float]) -> int | None:
        """Return which of some trials would be the study's best, if they complete with these values; None: none."""
        number = max(values, key=lambda each: self._rank(each, values[each]))
        is_new = self._best is None or self._rank(number, values[number]) > self._rank(*self._best)
        return number if is_new else None

    def _rank(self, number: int, value: float) -> tuple[float, int]:
        """Return what is larger for a better trial, and for the earlier one of equals."""
        return (-value if self._study.direction == optuna.study.StudyDirection.MINIMIZE else value, -number)

    def tell(self, number: int, outcome: TrialOutcome, usage: Usage | None = None) -> float | None:
        """Finish a running trial, and queue its point again if it was lost.

        Args:
            number: The trial's.
            outcome: How it ended.
            usage: What it was trained with; None if that is not known.

        Returns:
            Its value, if it completed.
        """
        trial = self._running.pop(number)
        epochs = self._epochs.pop(number)
        for key, attr in describe_end(outcome, epochs, self._spec.study.objective, usage).items():
            trial.set_user_attr(key, attr)
        if outcome.reason and outcome.reason.infeasible:
            _mark_infeasible(self._study, trial)
        is_complete = outcome.state is TrialState.COMPLETE
        value = epochs[-1].objective_value(self._spec.study.objective) if is_complete else None
        if outcome.reason and (outcome.reason.may_pass or outcome.reason is Reason.INTERRUPTED):
            self._queue_again(self._find(number), is_suspect=outcome.reason is not Reason.INTERRUPTED)
        self._study.tell(trial, value, state=OptunaState[outcome.state.name])
        self._count(number, outcome.state, value)
        return value

    def _count(self, number: int, state: TrialState, value: float | None) -> None:
        if value is not None and self.find_new_best({number: value}) is not None:
            self._best = (number, value)
        if number not in self._running_screen:
            self._n_finished += state is not TrialState.FAIL
            return
        self._running_screen.remove(number)
        self._queue_deeper()

    def origin(self, number: int) -> int:
        """Return the number of a trial's first attempt; all attempts have their seed and their checkpoint from it."""
        return find_origin(self._running.get(number) or self._find(number))

    @property
    def open_origins(self) -> frozenset[int]:
        """Origins of the trials that run, or wait to go on. What waits for its first attempt has no checkpoint."""
        states = (OptunaState.RUNNING, OptunaState.WAITING)
        trials = self._study.get_trials(deepcopy=False, states=states)
        return frozenset(find_origin(trial) for trial in trials if is_begun(trial))

    def _queue_again(self, trial: FrozenTrial, *, is_suspect: bool = False) -> None:
        """Queue a lost trial's point as a new trial, if it may be tried again."""
        if (attrs := describe_retry(trial, is_suspect=is_suspect)) is not None:
            self._enqueue(trial.params, attrs)

    def _find(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    @property
    def running_numbers(self) -> tuple[int, ...]:
        """Numbers of the trials that were asked and not told."""
        return tuple(self._running)


def _mark_infeasible(study: optuna.Study, trial: Trial) -> None:
    """Tell samplers that a point cannot be trained. Pinned to Optuna 5 by a contract test."""
    study._storage.set_trial_system_attr(trial._trial_id, _CONSTRAINTS_KEY, [1.0])  # noqa: SLF001
