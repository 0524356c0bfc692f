"""The trials of a running study: asked, reported, told and queued again. One process holds the book."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import optuna
from optuna.trial import FrozenTrial, Trial
from optuna.trial import TrialState as OptunaState

from tuner.search.confirmation import REPEAT_ATTR, ConfirmingTrial, Wanted, make_repeat
from tuner.search.distributions import make_distributions, resolve_params
from tuner.search.head_starts import HeadStarts
from tuner.search.repeats import average, list_repeats, list_values
from tuner.search.retries import count_attempts, find_origin, is_begun
from tuner.search.samplers import derive_seed
from tuner.search.screening import (
    is_counted,
)
from tuner.search.studies import StoredStudy, find_best
from tuner.search.trial_attrs import (
    CONFIRM_ATTR,
    COST_ATTR,
    LAYERS_ATTR,
    PARAMS_ATTR,
    REASON_ATTR,
    SCREEN_ATTR,
    VALUES_ATTR,
    describe_end,
)
from tuner.search.trial_queue import TrialQueue
from tuner.search.warm_start import WarmRecipe
from tuner.trial import EpochResult, Reason, Repeat, TrialOutcome, TrialParams, TrialState, Usage

_CONSTRAINTS_KEY = "constraints"
"""Optuna's older key: the only form that both Optuna 5 and its dashboard 0.21 read."""


class TrialBook:
    """Keeps the count exact: a trial counts when it is COMPLETE or PRUNED, and each is told once.

    What happens to trials is stored by ``flush``. A kill loses what came after the last one: a trial is then in the
    file as running, and is adopted by the next run, or not at all, and its number is given again.

    Raises:
        ValueError: If the study was loaded to be read only.
    """

    def __init__(self, stored: StoredStudy, warm_recipes: Sequence[WarmRecipe] = ()) -> None:
        """Take the study.

        Args:
            stored: Opened to run.
            warm_recipes: Of earlier studies, to try before all else if this one is new.
        """
        if stored.mirror is None:
            raise ValueError("a trial book needs a study that was opened to run, got one that is only read")
        self._mirror, self._warm_recipes = stored.mirror, warm_recipes
        self._study = stored.study
        self._spec = stored.spec
        self._group_counts = stored.facts.group_counts
        self._distributions = make_distributions(self._spec, self._group_counts)
        self._running: dict[int, Trial | ConfirmingTrial] = {}
        self._epochs: dict[int, list[EpochResult]] = {}
        self._repeats: dict[int, tuple[Repeat, ...]] = {}
        self.queue = TrialQueue(self._study, self._spec, self._distributions, self._group_counts)
        trials = self._study.get_trials(deepcopy=False)
        self._n_finished = sum(map(is_counted, trials))
        best = find_best(self._study)
        self._best = None if best is None else (best.number, best.value or 0.0)
        self._running_screen: set[int] = set()
        self._head_starts = HeadStarts(self._study, self._spec)

    def prepare(self) -> int:
        """Adopt what an earlier run left, and fill an empty study's queue.

        All of it is stored when this returns.

        Returns:
            How many trials were left running.
        """
        n_orphans = self.adopt()
        self.queue.fill(self._warm_recipes)
        self._follow_screen()
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
        self.queue.push_again(orphan)
        attrs: dict[str, Any] = {
            REASON_ATTR: Reason.INTERRUPTED.value,
            "message": "the run was killed",
            "feasible": True,
        }
        for key, value in attrs.items():
            self._study._storage.set_trial_user_attr(orphan._trial_id, key, value)  # noqa: SLF001
        self._study.tell(orphan.number, state=OptunaState.FAIL)

    def count_finished(self) -> int:
        """Return how many trials count: COMPLETE and PRUNED ones of the whole study, the screen's left out."""
        return self._n_finished

    def count_confirming(self) -> int:
        """Return how many running trials confirm others."""
        return sum(isinstance(trial, ConfirmingTrial) for trial in self._running.values())

    def count_running(self) -> int:
        """Return how many trials were asked and not told, the screen's left out."""
        return sum(isinstance(trial, Trial) for trial in self._running.values()) - len(self._running_screen)

    # --- the screen ---

    @property
    def is_screening(self) -> bool:
        """Whether a screen trial still waits or runs."""
        return self.queue.has_screen or len(self._running_screen) > 0

    def _follow_screen(self) -> None:
        """Queue what the screen proposes once it is finished."""
        if not self.is_screening:
            self.queue.push_deeper()

    # --- one trial ---

    def ask(self) -> tuple[int, TrialParams] | None:
        """Start the next trial, a queued one first.

        Returns:
            Its number and its resolved params; None if a grid has no point left.
        """
        if not self.queue.push_grid_point():
            return None
        trial = self._study.ask(self._distributions)
        params = self._resolve(trial)
        if SCREEN_ATTR in trial.user_attrs:
            self._running_screen.add(trial.number)
        self.queue.note_asked(was_screen=SCREEN_ATTR in trial.user_attrs)
        self._start(trial, params, list_repeats(self._spec, params))
        return trial.number, params

    def ask_confirmation(self, wanted: Wanted, n_folds: int) -> tuple[int, TrialParams]:
        """Start the training of a trial's recipe on a fresh seed, with fresh views, on images rather than features."""
        confirmed = self._find(wanted.trial)
        repeat = make_repeat(self._spec.study.seed, wanted.seed, n_folds)
        recipe = TrialParams.from_json(confirmed.user_attrs[PARAMS_ATTR])
        params = replace(recipe.with_seed(repeat.seed), views="fresh")
        attrs = {CONFIRM_ATTR: asdict(wanted), REPEAT_ATTR: asdict(repeat)}
        trial = ConfirmingTrial(self._mirror, self._study, confirmed, attrs)
        self._start(trial, params, (repeat,))
        return trial.number, params

    def _start(self, trial: Trial | ConfirmingTrial, params: TrialParams, repeats: tuple[Repeat, ...]) -> None:
        trial.set_user_attr(PARAMS_ATTR, params.to_json())
        trial.set_user_attr(LAYERS_ATTR, params.unfrozen_layers)
        self._running[trial.number] = trial
        self._epochs[trial.number] = []
        self._repeats[trial.number] = repeats

    def list_repeats(self, number: int) -> tuple[Repeat, ...]:
        """Return the trainings of a running trial; nothing for one that is trained once, on the study's train."""
        return self._repeats[number]

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

    def _resolve(self, trial: Trial) -> TrialParams:
        origin = find_origin(trial)
        seed = derive_seed(self._spec.study.seed, "trial", origin, bits=63)
        params = resolve_params(self._spec, trial.params, self._group_counts, seed=seed)
        first = None if origin == trial.number else self._find(origin)
        return self._head_starts.add(params, first_attempt=first, is_screening=self.is_screening)

    def report(self, number: int, result: EpochResult) -> bool:
        """Record one epoch.

        Pruners see the first training of a trial alone: what they compare was shown by the same images after as many
        epochs. A trial that has come through it trains to its end.

        Returns:
            Whether the trial should be pruned; one of the screen never is, nor one that confirms another.
        """
        trial = self._running[number]
        self._epochs[number].append(result)
        if result.repeat > 0 or isinstance(trial, ConfirmingTrial):
            return False
        trial.report(result.objective_value(self._spec.study.objective), step=result.epoch)
        may_prune = result.epoch < self._spec.training.epochs and number not in self._running_screen
        return may_prune and trial.should_prune()

    @property
    def best(self) -> tuple[int, float] | None:
        """Number and value of the best completed trial, as ``find_best`` picks it."""
        return self._best

    def list_unfinished(self, numbers: Iterable[int]) -> list[int]:
        """Return those running trials that have epochs to come."""
        return [number for number in numbers if not self._is_at_end(number)]

    def _is_at_end(self, number: int) -> bool:
        last = self._epochs[number][-1] if self._epochs[number] else None
        n_repeats = max(1, len(self._repeats[number]))
        return last is not None and (last.epoch, last.repeat + 1) == (self._spec.training.epochs, n_repeats)

    def list_final_values(self, numbers: Iterable[int]) -> dict[int, float]:
        """Return the values of those running trials of the search that have just finished their last epoch."""
        return {
            number: average(self._epochs[number], self._spec.study.objective)
            for number in numbers
            if isinstance(self._running[number], Trial) and self._is_at_end(number)
        }

    def find_new_best(self, values: Mapping[int, float]) -> int | None:
        """Return which of some trials would be the study's best, if they complete with these values; None: none."""
        number = max(values, key=lambda each: self._rank(each, values[each]))
        is_new = self._best is None or self._rank(number, values[number]) > self._rank(*self._best)
        return number if is_new else None

    def _rank(self, number: int, value: float) -> tuple[float, int]:
        """Return what is larger for a better trial, and for the earlier one of equals."""
        return (-value if self._study.direction == optuna.study.StudyDirection.MINIMIZE else value, -number)

    def tell(
        self, number: int, outcome: TrialOutcome, usage: Usage | None = None, *, device_seconds: float = 0.0
    ) -> float | None:
        """Finish a running trial, and queue its point again if it was lost.

        Args:
            number: The trial's.
            outcome: How it ended.
            usage: What it was trained with; None if that is not known.
            device_seconds: What it took of a device.

        Returns:
            Its value, if it completed.
        """
        trial = self._running.pop(number)
        epochs, repeats = self._epochs.pop(number), self._repeats.pop(number)
        objective = self._spec.study.objective
        attrs = describe_end(outcome, epochs, objective, usage)
        if len(repeats) > 1:
            attrs[VALUES_ATTR] = list_values(epochs, objective)
        attrs[COST_ATTR] = round(device_seconds, 3)
        for key, attr in attrs.items():
            trial.set_user_attr(key, attr)
        value = average(epochs, objective) if outcome.state is TrialState.COMPLETE else None
        if isinstance(trial, Trial):
            if outcome.reason and outcome.reason.infeasible:
                _mark_infeasible(self._study, trial)
            if outcome.reason and (outcome.reason.may_pass or outcome.reason is Reason.INTERRUPTED):
                self.queue.push_again(self._find(number), is_suspect=outcome.reason is not Reason.INTERRUPTED)
        told = trial if isinstance(trial, Trial) else number
        self._study.tell(told, value, state=OptunaState[outcome.state.name])
        if isinstance(trial, Trial):
            self._count(number, outcome.state, value)
        return value

    def _count(self, number: int, state: TrialState, value: float | None) -> None:
        if value is not None and self.find_new_best({number: value}) is not None:
            self._best = (number, value)
        if number not in self._running_screen:
            self._n_finished += state is not TrialState.FAIL
            return
        self._running_screen.remove(number)
        self._follow_screen()

    def origin(self, number: int) -> int:
        """Return the number of a trial's first attempt; all attempts have their seed and their checkpoint from it."""
        return find_origin(self._running.get(number) or self._find(number))

    @property
    def open_origins(self) -> frozenset[int]:
        """Origins of the trials that run, or wait to go on. What waits for its first attempt has no checkpoint."""
        states = (OptunaState.RUNNING, OptunaState.WAITING)
        trials = self._study.get_trials(deepcopy=False, states=states)
        return frozenset(find_origin(trial) for trial in trials if is_begun(trial))

    def _find(self, number: int) -> FrozenTrial:
        return self._study.get_trials(deepcopy=False)[number]

    @property
    def running_numbers(self) -> tuple[int, ...]:
        """Numbers of the trials that were asked and not told."""
        return tuple(self._running)


def _mark_infeasible(study: optuna.Study, trial: Trial) -> None:
    """Tell samplers that a point cannot be trained. Pinned to Optuna 5 by a contract test."""
    study._storage.set_trial_system_attr(trial._trial_id, _CONSTRAINTS_KEY, [1.0])  # noqa: SLF001
