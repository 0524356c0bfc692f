"""The trials of a running study: asked, reported, told and queued again. One process holds the book."""

import dataclasses
import sys
from collections import Counter
from collections.abc import Sequence
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from tuner.search.distributions import (
    Point,
    list_grid,
    make_distributions,
    project_default_recipe,
    resolve_params,
)
from tuner.search.samplers import derive_seed
from tuner.search.studies import StoredStudy, find_best
from tuner.trial import ClassReport, EpochResult, Reason, TrialOutcome, TrialParams, TrialState

PARAMS_ATTR = "params_resolved"
EPOCHS_ATTR = "epochs"
REASON_ATTR = "reason"
_ENDING_ATTR = "ending"
_MAX_MATRIX_CLASSES = 100
"""Of more classes a whole matrix per trial would slow down every reader of the database."""
_COUNTED = (OptunaState.COMPLETE, OptunaState.PRUNED)
_CONSTRAINTS_KEY = "constraints"
"""Optuna's older key: the only form that both Optuna 5 and its dashboard 0.21 read."""


class TrialBook:
    """Keeps the count exact: a trial counts when it is COMPLETE or PRUNED, and each is told once."""

    def __init__(self, stored: StoredStudy) -> None:
        self._study = stored.study
        self._spec = stored.spec
        self._group_counts = stored.facts.group_counts
        self._distributions = make_distributions(self._spec, self._group_counts)
        self._running: dict[int, Trial] = {}
        self._epochs: dict[int, list[EpochResult]] = {}
        self._is_exhausted = False
        self._is_grid = self._spec.search.sampler == "grid"
        self._grid = list_grid(self._distributions, seed=self._spec.study.seed) if self._is_grid else []

    def prepare(self) -> int:
        """Adopt what an earlier run left: end its running trials and queue them again; fill an empty study's queue.

        Returns:
            How many trials were left running.
        """
        orphans = self._study.get_trials(deepcopy=False, states=(OptunaState.RUNNING,))
        for orphan in orphans:
            self._adopt(orphan)
        for point in self._first_points():
            self._study.enqueue_trial(point, skip_if_exists=True)
        return len(orphans)

    def _adopt(self, orphan: FrozenTrial) -> None:
        """End a trial that no process runs: as it was about to be told, or as interrupted."""
        if (ending := orphan.user_attrs.get(_ENDING_ATTR)) is not None:
            self._study.tell(orphan.number, ending["value"], state=OptunaState[ending["state"]])
            return
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
        return [project_default_recipe(self._spec, self._distributions)] if is_new else []

    def count_finished(self) -> int:
        """Return how many trials count: COMPLETE and PRUNED ones of the whole study."""
        return len(self._study.get_trials(deepcopy=False, states=_COUNTED))

    @property
    def max_trials(self) -> int:
        """Return how many trials the space allows: the points of a grid."""
        return len(self._grid) if self._is_grid else sys.maxsize

    @property
    def is_exhausted(self) -> bool:
        """Whether there is no point left to ask for."""
        return self._is_exhausted

    def ask(self, device: str = "") -> tuple[int, TrialParams] | None:
        """Start the next trial, a queued one first.

        Args:
            device: Where it will run; kept with the trial.

        Returns:
            Its number and its resolved params; None if a grid has no point left.
        """
        if self._is_grid and not self._queue_grid_point():
            self._is_exhausted = True
            return None
        trial = self._study.ask(self._distributions)
        params = self._resolve(trial.number, trial.params)
        trial.set_user_attr(PARAMS_ATTR, params.to_json())
        trial.set_user_attr("unfrozen_layers_resolved", params.unfrozen_layers)
        trial.set_user_attr("device", device)
        self._running[trial.number] = trial
        self._epochs[trial.number] = []
        return trial.number, params

    def _resolve(self, number: int, point: Point) -> TrialParams:
        seed = derive_seed(self._spec.study.seed, "trial", number, bits=63)
        return resolve_params(self._spec, point, self._group_counts, seed=seed)

    def _queue_grid_point(self) -> bool:
        """Queue the next untried point, unless one waits; return whether there is something to ask for."""
        trials = self._study.get_trials(deepcopy=False)
        if any(trial.state == OptunaState.WAITING for trial in trials):
            return True
        tried = {_freeze(trial.params) for trial in trials}
        for point in self._grid:
            if _freeze(point) not in tried:
                self._study.enqueue_trial(point)
                return True
        return False

    def report(self, number: int, result: EpochResult) -> bool:
        """Record one epoch.

        Returns:
            Whether the trial should be pruned.
        """
        trial = self._running[number]
        self._epochs[number].append(result)
        trial.report(result.objective_value(self._spec.study.objective), step=result.epoch)
        return result.epoch < self._spec.training.epochs and trial.should_prune()

    def best_number(self) -> int | None:
        """Return the number of the best completed trial."""
        best = find_best(self._study)
        return best.number if best else None

    def would_be_best(self, number: int, value: float) -> bool:
        """Whether a trial that completes with this value would be the study's best, as ``find_best`` picks it."""
        best = find_best(self._study)
        if best is None or best.value is None:
            return True
        sign = -1 if self._study.direction == optuna.study.StudyDirection.MINIMIZE else 1
        return (sign * value, -number) > (sign * best.value, -best.number)

    def tell(self, number: int, outcome: TrialOutcome) -> float | None:
        """Finish a running trial, and queue its point again if it was lost.

        Returns:
            Its value, if it completed.
        """
        trial = self._running.pop(number)
        epochs = self._epochs.pop(number)
        for key, attr in _describe(outcome, epochs, self._spec.study.objective).items():
            trial.set_user_attr(key, attr)
        if outcome.reason and outcome.reason.infeasible:
            _mark_infeasible(self._study, trial)
        is_complete = outcome.state is TrialState.COMPLETE
        value = epochs[-1].objective_value(self._spec.study.objective) if is_complete else None
        if outcome.reason in {Reason.WORKER_LOST, Reason.INTERRUPTED}:
            self._queue_again(self._find(number), is_suspect=outcome.reason is Reason.WORKER_LOST)
        # After this a kill loses nothing: the next start tells the trial as it was to be told.
        trial.set_user_attr(_ENDING_ATTR, {"state": outcome.state.value, "value": value})
        self._study.tell(trial, value, state=OptunaState[outcome.state.name])
        return value

    def _queue_again(self, trial: FrozenTrial, *, is_suspect: bool = False) -> None:
        """Queue a lost trial's point as a new trial; once only where the point itself may be at fault."""
        attempt = trial.user_attrs.get("attempt", 0)
        trials = self._study.get_trials(deepcopy=False)
        is_queued = any(other.user_attrs.get("retry_of") == trial.number for other in trials)
        if is_queued or (is_suspect and attempt > 0):
            return
        # A trial that was killed while it was asked may hold its point only as it was queued.
        point = trial.system_attrs.get("fixed_params", {}) | trial.params
        if point:
            attrs = {"retry_of": trial.number, "attempt": attempt + is_suspect}
            self._study.enqueue_trial(point, user_attrs=attrs)

    def _find(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    @property
    def running_numbers(self) -> tuple[int, ...]:
        """Numbers of the trials that were asked and not told."""
        return tuple(self._running)


def _freeze(point: Point) -> tuple[tuple[str, Any], ...]:
    return tuple(
        sorted((name, round(value, 12) if isinstance(value, float) else value) for name, value in point.items())
    )


def _mark_infeasible(study: optuna.Study, trial: Trial) -> None:
    """Tell samplers that a point cannot be trained. Pinned to Optuna 5 by a contract test."""
    study._storage.set_trial_system_attr(trial._trial_id, _CONSTRAINTS_KEY, [1.0])  # noqa: SLF001


def _describe(outcome: TrialOutcome, epochs: list[EpochResult], objective: str) -> dict[str, Any]:
    """Return the user attributes of a finished trial."""
    attrs: dict[str, Any] = {"feasible": not (outcome.reason and outcome.reason.infeasible)}
    if epochs:
        best = (min if objective == "val_loss" else max)(epochs, key=lambda result: result.objective_value(objective))
        attrs |= {
            "seconds": round(sum(result.seconds for result in epochs), 3),
            "images_per_second": round(sum(result.images_per_second for result in epochs) / len(epochs), 1),
            "best_epoch": best.epoch,
            "best_epoch_value": best.objective_value(objective),
            EPOCHS_ATTR: [dataclasses.asdict(result) for result in epochs],
        }
    if outcome.report:
        attrs["class_report"] = _describe_report(outcome.report)
    if outcome.reason:
        attrs |= {REASON_ATTR: outcome.reason.value, "message": outcome.message}
    if outcome.traceback:
        attrs["traceback"] = outcome.traceback
    return attrs


def _describe_report(report: ClassReport) -> dict[str, Any]:
    """Return a report as JSON; of many classes only the cells that hold something, as (true, predicted, count)."""
    described = dataclasses.asdict(report)
    if len(report.recall) > _MAX_MATRIX_CLASSES:
        matrix = described.pop("confusion_matrix")
        described["confusion_cells"] = [
            (true, predicted, count) for true, row in enumerate(matrix) for predicted, count in enumerate(row) if count
        ]
    return described


def count_reasons(study: optuna.Study) -> Counter[tuple[str, str]]:
    """Return how many PRUNED and FAIL trials there are by state and reason."""
    return Counter(
        (trial.state.name, trial.user_attrs.get(REASON_ATTR, Reason.INTERRUPTED.value))
        for trial in study.get_trials(deepcopy=False)
        if trial.state in {OptunaState.PRUNED, OptunaState.FAIL}
    )
