"""Confirmation: the best few recipes trained again on fresh seeds, since the best of many is partly the luckiest.

Where val was cut from the train images, each seed also cuts afresh: it validates on a tenth of train and val together,
a tenth of its own, most of which no choice has been based on. Where the data gives val, the images stay and only the
seeds are fresh. Trials that confirm carry ``CONFIRM_ATTR``, do not count towards ``n_trials``, and are never the best
trial.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from statistics import stdev
from typing import Any, Self

import optuna
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial, create_trial
from optuna.trial import TrialState as OptunaState

from tuner.search.intervals import Prediction, predict_accuracy
from tuner.search.samplers import derive_seed
from tuner.search.studies import StoredStudy, rank_trials
from tuner.search.study_facts import StudyFacts
from tuner.search.trial_attrs import CONFIRM_ATTR, EPOCHS_ATTR, REASON_ATTR, is_confirmation, is_given_up
from tuner.trial import EpochResult, Reason, Repeat

CONFIRMATION_ATTR = "tuner:confirmation"
"""User attribute of the study: the last confirmation, as ``Confirmation.to_json``."""
REPEAT_ATTR = "repeat"
"""Of a trial that confirms: its ``Repeat``."""
DEFAULT_TOP = 5
DEFAULT_SEEDS = 3
_MAX_FOLDS = 10
_MAX_ATTEMPTS = 3
_INTERRUPTED = (None, Reason.INTERRUPTED.value)


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """One training that a confirmation needs."""

    trial: int
    """Number of the trial that it confirms."""
    seed: int
    """Which of the fresh seeds, from 0; the same for every trial, which are then compared on the same images."""


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A recipe that was confirmed."""

    trial: int
    search_value: float
    """What the search saw."""
    seeds: tuple[int, ...]
    """Those that completed, from 0."""
    values: tuple[float, ...]
    """Of the objective, one for each of them."""
    accuracies: tuple[float, ...]
    losses: tuple[float, ...]
    """Mean cross entropy on the validation images."""
    n_failed: int
    """Seeds that did not complete."""

    @property
    def mean(self) -> float:
        """Of the values."""
        return sum(self.values) / len(self.values)

    @property
    def deviation(self) -> float:
        """Sample standard deviation of the values; 0 of a single one."""
        return _deviate(self.values)


@dataclass(frozen=True, kw_only=True)
class Confirmation:
    """What a confirmation found."""

    objective: str
    n_seeds: int
    n_folds: int
    """Of the fresh cuts; 0: the study's own val."""
    n_search_trials: int
    """Trials that counted when it was made; with more of them it is of the past."""
    candidates: tuple[Candidate, ...]
    """The best first."""
    prediction: Prediction
    """Of the winner's accuracy in production."""

    @property
    def winner(self) -> Candidate:
        """The recipe to use."""
        return self.candidates[0]

    @property
    def gain(self) -> float:
        """Confirmed mean less the search's own number of the same trial: mostly a loss."""
        return self.winner.mean - self.winner.search_value

    def to_json(self) -> dict[str, Any]:
        """Return the confirmation as a JSON object."""
        candidates = [
            asdict(each) | {"mean": each.mean, "standard_deviation": each.deviation} for each in self.candidates
        ]
        return asdict(self) | {"candidates": candidates, "winner": self.winner.trial, "gain": self.gain}

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what ``to_json`` wrote.

        Raises:
            KeyError, TypeError: If nothing of ours wrote it.
        """
        candidates = tuple(
            Candidate(
                trial=int(each["trial"]),
                search_value=float(each["search_value"]),
                seeds=tuple(map(int, each["seeds"])),
                values=tuple(map(float, each["values"])),
                accuracies=tuple(map(float, each["accuracies"])),
                losses=tuple(map(float, each["losses"])),
                n_failed=int(each["n_failed"]),
            )
            for each in values["candidates"]
        )
        return cls(
            objective=str(values["objective"]),
            n_seeds=int(values["n_seeds"]),
            n_folds=int(values["n_folds"]),
            n_search_trials=int(values["n_search_trials"]),
            candidates=candidates,
            prediction=Prediction.from_json(values["prediction"]),
        )


def read_confirmation(study: optuna.Study) -> Confirmation | None:
    """Return a study's last confirmation, if there is one.

    Raises:
        KeyError, TypeError, ValueError: If it cannot be read; ``explain_damage`` says so in a user's words.
    """
    stored = study.user_attrs.get(CONFIRMATION_ATTR)
    return None if stored is None else Confirmation.from_json(stored)


def choose_candidates(study: optuna.Study, top: int) -> tuple[int, ...]:
    """Return the numbers of the best completed trials, each recipe once, the best first."""
    chosen: list[FrozenTrial] = []
    for trial in rank_trials(study):
        if len(chosen) == top:
            break
        if not any(trial.params == other.params for other in chosen):
            chosen.append(trial)
    return tuple(trial.number for trial in chosen)


def count_folds(facts: StudyFacts) -> int:
    """Return how many folds the fresh cuts have: ten, so that nearly as many images train as in production.

    Args:
        facts: Of the study.

    Returns:
        Fewer where a class is too small; 0 where the data gives val.
    """
    n_folds = min(facts.max_folds, _MAX_FOLDS)
    return n_folds if n_folds > 1 else 0


def make_repeat(study_seed: int, which: int, n_folds: int) -> Repeat:
    """Return how the training of one fresh seed goes; seeds and cuts are those of no trial of the search."""
    seed = derive_seed(study_seed, "confirm", which, bits=63)
    if n_folds == 0:
        return Repeat(seed=seed)
    turn, fold = divmod(which, n_folds)
    return Repeat(seed=seed, n_folds=n_folds, fold=fold, cut_seed=derive_seed(study_seed, "confirm cut", turn))


def list_missing(study: optuna.Study, candidates: Iterable[int], n_seeds: int) -> list[Wanted]:
    """Return what is still to be trained, all seeds of the best candidate first; what is running is not missing.

    One that was lost is tried again, three times in all, and one that was interrupted as often as that happens.
    """
    is_over: set[tuple[int, int]] = set()
    n_lost: Counter[tuple[int, int]] = Counter()
    for trial in filter(is_confirmation, study.get_trials(deepcopy=False)):
        key = _identify(trial)
        n_lost[key] += trial.state == OptunaState.FAIL and trial.user_attrs.get(REASON_ATTR) not in _INTERRUPTED
        if trial.state != OptunaState.FAIL or is_given_up(trial) or n_lost[key] >= _MAX_ATTEMPTS:
            is_over.add(key)
    return [
        Wanted(trial=candidate, seed=seed)
        for candidate in candidates
        for seed in range(n_seeds)
        if (candidate, seed) not in is_over
    ]


def _identify(confirming: FrozenTrial) -> tuple[int, int]:
    confirms = confirming.user_attrs[CONFIRM_ATTR]
    return int(confirms["trial"]), int(confirms["seed"])


class ConfirmingTrial:
    """A running trial with another one's params: what a trial book needs of Optuna's ``Trial``, which would sample."""

    def __init__(
        self, storage: BaseStorage, study: optuna.Study, confirmed: FrozenTrial, attrs: dict[str, Any]
    ) -> None:
        self._storage = storage
        template = create_trial(
            state=OptunaState.RUNNING,
            params=confirmed.params,
            distributions=confirmed.distributions,
            user_attrs=attrs,
        )
        self._trial_id = storage.create_new_trial(study._study_id, template)  # noqa: SLF001
        self.number = storage.get_trial(self._trial_id).number

    @property
    def user_attrs(self) -> dict[str, Any]:
        """The trial's user attributes."""
        return self._storage.get_trial(self._trial_id).user_attrs

    def set_user_attr(self, key: str, value: Any) -> None:
        """Set one."""
        self._storage.set_trial_user_attr(self._trial_id, key, value)


def summarise(stored: StoredStudy, candidates: Sequence[int], n_seeds: int) -> Confirmation | None:
    """Return what the trainings so far say of the candidates that have all of theirs; None if none has.

    Args:
        stored: The study.
        candidates: Of ``choose_candidates``.
        n_seeds: Of each.
    """
    study, spec = stored.study, stored.spec
    open_trials = {wanted.trial for wanted in list_missing(study, candidates, n_seeds)}
    n_folds = count_folds(stored.facts)
    trials = study.get_trials(deepcopy=False)
    confirming = [trial for trial in trials if is_confirmation(trial)]
    open_trials |= {_identify(trial)[0] for trial in confirming if trial.state == OptunaState.RUNNING}
    seen = [_collect(confirming, trials[number], n_seeds, spec.study.objective) for number in candidates]
    whole = [each for each in seen if each.trial not in open_trials and each.values]
    if not whole:
        return None
    sign = -1 if study.direction == optuna.study.StudyDirection.MINIMIZE else 1
    # A recipe that fails on a seed is no recipe for production, however good its other seeds are.
    ranked = sorted(whole, key=lambda each: (each.n_failed, -sign * each.mean, each.trial))
    return Confirmation(
        objective=spec.study.objective,
        n_seeds=n_seeds,
        n_folds=n_folds,
        n_search_trials=count_search_trials(study),
        candidates=tuple(ranked),
        prediction=predict(ranked, spec.study.objective, counts=stored.facts.split_counts, n_folds=n_folds),
    )


def predict(ranked: Sequence[Candidate], objective: str, *, counts: Mapping[str, int], n_folds: int) -> Prediction:
    """Return what production will get of the first of some candidates.

    Args:
        ranked: The winner first.
        objective: By which they were ranked.
        counts: Images in train, val and test.
        n_folds: Of the fresh cuts; 0: val itself.
    """
    sign = -1 if objective == "val_loss" else 1
    shared = ranked[0].seeds
    alike = [each for each in ranked if each.seeds == shared]  # each seed is compared with itself
    return predict_accuracy(
        [each.accuracies for each in alike],
        [[sign * value for value in each.values] for each in alike],
        counts=counts,
        n_folds=n_folds,
    )


def count_search_trials(study: optuna.Study) -> int:
    """Return how many trials completed in the search."""
    return len(rank_trials(study))


def _collect(confirming: Iterable[FrozenTrial], candidate: FrozenTrial, n_seeds: int, objective: str) -> Candidate:
    ends: dict[int, EpochResult] = {}
    for trial in confirming:
        confirmed, seed = _identify(trial)
        if confirmed == candidate.number and trial.state == OptunaState.COMPLETE and seed < n_seeds:
            ends[seed] = EpochResult(**trial.user_attrs[EPOCHS_ATTR][-1])
    seeds = sorted(ends)
    return Candidate(
        trial=candidate.number,
        search_value=candidate.value or 0.0,
        seeds=tuple(seeds),
        values=tuple(ends[seed].objective_value(objective) for seed in seeds),
        accuracies=tuple(ends[seed].val_accuracy for seed in seeds),
        losses=tuple(ends[seed].val_loss for seed in seeds),
        n_failed=n_seeds - len(seeds),
    )


def _deviate(values: Sequence[float]) -> float:
    return stdev(values) if len(values) > 1 else 0.0


def describe_confirmation(confirmation: Confirmation) -> list[str]:
    """Return a confirmation for a person, a line for each candidate."""
    winner, objective = confirmation.winner, confirmation.objective
    where = f"{confirmation.n_folds} fresh folds" if confirmation.n_folds else "the study's own val"
    value = f"{objective} {winner.mean:.4f} ± {winner.deviation:.4f} ({confirmation.n_seeds} fresh seeds on {where})"
    search = f"the search said {winner.search_value:.4f}, {confirmation.gain:+.4f}"
    lines = [f"confirmed: trial {winner.trial}, {value}; {search}", confirmation.prediction.describe()]
    lines += [
        f"  {rank}. trial {each.trial}: {each.mean:.4f} ± {each.deviation:.4f}, in the search {each.search_value:.4f}"
        + (f", {each.n_failed} seeds failed" if each.n_failed else "")
        for rank, each in enumerate(confirmation.candidates, start=1)
    ]
    return lines
