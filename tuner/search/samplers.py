"""The samplers by the names of the study file.

A resumed study makes its sampler anew. Seeding it with the number of stored trials keeps it from repeating the points
that the same seed gave before (Optuna's FAQ: same seed, same points).
"""

import hashlib
import warnings
from collections.abc import Callable

from optuna.exceptions import ExperimentalWarning
from optuna.samplers import BaseSampler, GPSampler, QMCSampler, RandomSampler, TPESampler

N_STARTUP_TRIALS = 10
"""Random trials before a model of the objective is used (Optuna's own default)."""


def derive_seed(*parts: object, bits: int = 32) -> int:
    """Return a seed that depends on every part, the same in every process and version of Python."""
    digest = hashlib.sha256("/".join(map(str, parts)).encode()).digest()
    return int.from_bytes(digest[:8], "big") & ((1 << bits) - 1)


def _make_qmc(study_seed: int, n_stored: int) -> BaseSampler:
    # The position in the sequence lives in the storage, so the scrambling must not change between runs;
    # what comes before the sequence starts is drawn independently and must change.
    independent = RandomSampler(seed=derive_seed(study_seed, n_stored))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ExperimentalWarning)
        return QMCSampler(
            qmc_type="sobol",
            scramble=True,
            seed=derive_seed(study_seed),
            independent_sampler=independent,
            warn_independent_sampling=False,
        )


SAMPLERS: dict[str, Callable[[int, int], BaseSampler]] = {
    "tpe": lambda seed, n_stored: TPESampler(n_startup_trials=N_STARTUP_TRIALS, seed=derive_seed(seed, n_stored)),
    "gp": lambda seed, n_stored: GPSampler(n_startup_trials=N_STARTUP_TRIALS, seed=derive_seed(seed, n_stored)),
    "random": lambda seed, n_stored: RandomSampler(seed=derive_seed(seed, n_stored)),
    "qmc": _make_qmc,
    # Grid points come through the queue (see trial_book); the sampler is never asked.
    "grid": lambda seed, n_stored: RandomSampler(seed=derive_seed(seed, n_stored)),
}


def make_sampler(name: str, *, study_seed: int, n_stored: int) -> BaseSampler:
    """Make a sampler.

    Args:
        name: A key of ``SAMPLERS``.
        study_seed: The study file's seed.
        n_stored: Trials that the study already holds, in any state.
    """
    return SAMPLERS[name](study_seed, n_stored)
