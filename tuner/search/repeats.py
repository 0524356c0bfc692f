"""Trials that are trained more than once: on several folds, with several seeds, or both."""

from collections.abc import Sequence
from statistics import fmean

from tuner.search.samplers import derive_seed
from tuner.spec.sections import StudySpec
from tuner.trial import EpochResult, Repeat, TrialParams


def list_repeats(spec: StudySpec, params: TrialParams) -> tuple[Repeat, ...]:
    """Return the trainings of a trial of the search: every fold with the first seed, then with the next one.

    All trials of a study have the same folds.

    Returns:
        Nothing for the usual trial, which is trained once on train.
    """
    n_folds, n_seeds = spec.data.folds or 0, spec.search.seeds_per_trial
    if n_folds == 0 and n_seeds == 1:
        return ()
    cut_seed = derive_seed(spec.study.seed, "folds")
    return tuple(
        Repeat(
            seed=params.seed if which == 0 else derive_seed(params.seed, "repeat", which, bits=63),
            n_folds=n_folds,
            fold=fold,
            cut_seed=cut_seed if n_folds else 0,
        )
        for which in range(n_seeds)
        for fold in range(max(1, n_folds))
    )


def list_values(epochs: Sequence[EpochResult], objective: str) -> list[float]:
    """Return the value of each training after its last epoch, in their order."""
    last = {result.repeat: result for result in epochs}
    return [last[repeat].objective_value(objective) for repeat in sorted(last)]


def average(epochs: Sequence[EpochResult], objective: str) -> float:
    """Return a trial's value: the mean over its trainings after their last epoch."""
    return fmean(list_values(epochs, objective))
