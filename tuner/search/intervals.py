"""What a model trained in production will be worth: from a few confirmed accuracies to a prediction interval."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, variance
from typing import Any, Self

Z_95 = 1.959963984540054
"""Standard normal quantile at 0.975."""


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """A 95 % prediction interval for the accuracy of one model that ``tuner train`` makes, on images never seen."""

    accuracy: float
    """Mean over the seeds, each of which was told by a recipe that the others chose."""
    low: float
    high: float
    n_val: int
    """Images that each confirmation was validated on."""
    n_test: int
    """Images that the accuracy will be measured on; 0: infinitely many."""
    binomial_floor: float
    """Width that the sizes of the study's val and test alone would give, had training no randomness."""

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> Self:
        """Read what ``dataclasses.asdict`` and JSON made of a prediction."""
        return cls(
            accuracy=float(values["accuracy"]),
            low=float(values["low"]),
            high=float(values["high"]),
            n_val=int(values["n_val"]),
            n_test=int(values["n_test"]),
            binomial_floor=float(values["binomial_floor"]),
        )

    def describe(self) -> str:
        """Return the prediction for a person."""
        on = f"on {self.n_test} test images" if self.n_test else "on images like these"
        return f"prediction: accuracy {self.accuracy:.4f} in production, 95 % {self.low:.4f} to {self.high:.4f} {on}"


def predict_accuracy(
    accuracies: Sequence[Sequence[float]],
    scores: Sequence[Sequence[float]],
    *,
    counts: Mapping[str, int],
    n_folds: int,
) -> Prediction:
    """Return where the accuracy of one more training will lie on test images, in 95 of 100 studies.

    The winner of a few recipes is partly lucky even on fresh seeds. So each seed tells the accuracy of the recipe that
    the *other* seeds would have chosen, as in nested cross-validation, and the mean of that is what is predicted.

    Added up are the binomial error of the validation images, that of the test images, and the spread of trainings that
    is more than binomial, pooled over all recipes and with Student's quantile. On fresh folds the mean of S of k folds
    has the variance ``(1/S + 1/(k-1))`` of one fold (Nadeau & Bengio 2003, *Inference for the generalization error*):
    their training images overlap.

    Args:
        accuracies: Of each recipe, one per seed; the first is the one to predict. Each at least one number.
        scores: By which recipes are ranked, the higher the better; as many as there are accuracies.
        counts: Images in train, val and test; with no test images the interval is for infinitely many.
        n_folds: Folds that train and val were cut into, each seed validating on another one; 0: all on val.
    """
    n_test = counts["test"]
    n_val = (counts["train"] + counts["val"]) // n_folds if n_folds else counts["val"]
    n_seeds = len(accuracies[0])
    mean = _cross_fit(accuracies, scores)
    # Bayes' estimate with a uniform prior: a share of exactly 1 is no proof that there are no errors.
    n_seen = n_val * (n_seeds if n_folds else 1)
    share = (mean * n_seen + 1) / (n_seen + 2)
    per_image = share * (1 - share)
    repeats = [each for each in accuracies if len(each) > 1]
    freedom = sum(len(each) - 1 for each in repeats)
    pooled = sum((len(each) - 1) * variance(each) for each in repeats) / freedom if freedom else 0.0
    if n_folds:
        spread = max(0.0, pooled - per_image / n_val)
        binomial_val = per_image / n_val * (1 / n_seeds + 1 / (n_folds - 1))
    else:
        spread = pooled
        binomial_val = per_image / n_val
    binomial_test = per_image / n_test if n_test else 0.0
    model = spread * (1 + 1 / n_seeds)
    half = math.sqrt(Z_95**2 * (binomial_val + binomial_test) + _quantile(freedom) ** 2 * model)
    return Prediction(
        accuracy=mean,
        low=max(0.0, mean - half),
        high=min(1.0, mean + half),
        n_val=n_val,
        n_test=n_test,
        binomial_floor=2 * Z_95 * math.sqrt(per_image / counts["val"] + binomial_test),
    )


def _cross_fit(accuracies: Sequence[Sequence[float]], scores: Sequence[Sequence[float]]) -> float:
    """Return the mean over the seeds of the accuracy, on each, of the recipe that scores best on the others."""
    n_seeds = len(accuracies[0])
    if n_seeds == 1:
        return accuracies[0][0]
    whole = [recipe for recipe, each in enumerate(accuracies) if len(each) == n_seeds]

    def choose_without(seed: int) -> int:
        return max(whole, key=lambda recipe: sum(scores[recipe]) - scores[recipe][seed])

    return fmean(accuracies[choose_without(seed)][seed] for seed in range(n_seeds))


def _quantile(freedom: int) -> float:
    """Return Student's quantile at 0.975; the normal one where nothing was estimated."""
    if freedom == 0:
        return Z_95
    from scipy.stats import t

    return float(t.ppf(0.975, freedom))
