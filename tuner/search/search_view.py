"""A study as samplers and pruners may see it: without the trials that confirm others.

A confirmation repeats points of the search on other images: to a sampler its values would be of another experiment.
"""

from collections.abc import Callable
from typing import Any, cast

from optuna.distributions import BaseDistribution
from optuna.pruners import BasePruner
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from tuner.search.trial_attrs import is_confirmation


class StudyView:
    """An Optuna study of which some trials cannot be seen; all else is the study's own."""

    def __init__(self, study: Study, shows: Callable[[FrozenTrial], bool]) -> None:
        self._viewed = study
        self._shows = shows

    def __getattr__(self, name: str) -> Any:
        return getattr(self._viewed, name)

    @property
    def trials(self) -> list[FrozenTrial]:
        """The trials that can be seen."""
        return self.get_trials()

    def get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        """Return the trials that can be seen."""
        return [trial for trial in self._viewed.get_trials(*args, **kwargs) if self._shows(trial)]

    def _get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
        trials = self._viewed._get_trials(*args, **kwargs)  # noqa: SLF001 - what Optuna's samplers call
        return [trial for trial in trials if self._shows(trial)]


def view(study: Study, shows: Callable[[FrozenTrial], bool]) -> Study:
    """Return a study that shows some of its trials alone."""
    return cast("Study", StudyView(study, shows))


def shows_search(trial: FrozenTrial) -> bool:
    """Whether a sampler may learn from a trial."""
    return not is_confirmation(trial)


class SearchSampler(BaseSampler):
    """A sampler that sees no confirmation."""

    def __init__(self, sampler: BaseSampler) -> None:
        """Take the sampler that proposes."""
        self._sampler = sampler

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        """Return what ``sample_relative`` is asked for."""
        return self._sampler.infer_relative_search_space(view(study, shows_search), trial)

    def sample_relative(
        self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]
    ) -> dict[str, Any]:
        """Return the params that are proposed together."""
        return self._sampler.sample_relative(view(study, shows_search), trial, search_space)

    def sample_independent(
        self, study: Study, trial: FrozenTrial, param_name: str, param_distribution: BaseDistribution
    ) -> Any:
        """Return one param."""
        return self._sampler.sample_independent(view(study, shows_search), trial, param_name, param_distribution)

    def before_trial(self, study: Study, trial: FrozenTrial) -> None:
        """Tell the sampler that a trial begins."""
        self._sampler.before_trial(study, trial)

    def after_trial(self, study: Study, trial: FrozenTrial, state: OptunaState, values: Any) -> None:
        """Tell the sampler that a trial ends, unless it confirms another."""
        if shows_search(trial):
            self._sampler.after_trial(study, trial, state, values)

    def reseed_rng(self) -> None:
        """Draw other random numbers from now on."""
        self._sampler.reseed_rng()


class ViewingPruner(BasePruner):
    """A pruner that compares a trial with those alone that it may see."""

    def __init__(self, pruner: BasePruner, shows: Callable[[FrozenTrial], bool]) -> None:
        """Take the pruner that compares, and what it sees."""
        self._pruner, self._shows = pruner, shows

    def prune(self, study: Study, trial: FrozenTrial) -> bool:
        """Say whether a trial should be pruned."""
        return self._pruner.prune(view(study, self._shows), trial)
