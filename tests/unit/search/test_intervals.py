"""Does a predicted interval hold what it promises? Simulated studies, whose truth is known."""

import math

import numpy as np
import pytest

from tuner.search.intervals import predict_accuracy

COUNTS = {"train": 640, "val": 160, "test": 200}


def simulate(generator: np.random.Generator, *, n_folds: int, spread: float) -> tuple[bool, float]:
    """Return low, high, test accuracy, width and floor of one study of five equally good recipes."""
    n_val = 80 if n_folds else 160
    truth = 0.9
    if n_folds:
        luck = generator.binomial(n_val, truth, 3) / n_val - truth  # images of a fold are those of all recipes
    else:
        luck = np.full(3, generator.binomial(n_val, truth) / n_val - truth)
    own = generator.normal(0, spread, (5, 3)) + luck
    accuracies = np.clip(truth + own, 0, 1).tolist()
    ranked = sorted(accuracies, key=sum, reverse=True)
    found = predict_accuracy(ranked, ranked, counts=COUNTS, n_folds=n_folds)
    test = generator.binomial(200, min(1.0, truth + generator.normal(0, spread))) / 200
    return found.low <= test <= found.high, (found.high - found.low) / found.binomial_floor


@pytest.mark.parametrize("n_folds", [0, 10])
@pytest.mark.parametrize("spread", [0.0, 0.01, 0.03])
def test_interval_covers_what_it_promises(n_folds: int, spread: float) -> None:
    """At least 90 of 100 where 95 are promised, and hardly wider than the numbers of images alone make it."""
    generator = np.random.default_rng(0)
    covered, widths = zip(*(simulate(generator, n_folds=n_folds, spread=spread) for _ in range(400)), strict=True)
    assert np.mean(covered) >= 0.9
    assert np.mean(widths) <= (1.5 if spread < 0.03 else 2.5)


def test_prediction_is_not_the_luck_of_the_winner() -> None:
    """Of equal recipes the best mean is too good; what each seed says of the choice of the others is not."""
    generator = np.random.default_rng(0)
    optimism, naive = [], []
    for _ in range(500):
        accuracies = (0.8 + generator.normal(0, 0.02, (5, 3))).tolist()
        ranked = sorted(accuracies, key=sum, reverse=True)
        optimism.append(predict_accuracy(ranked, ranked, counts=COUNTS, n_folds=10).accuracy - 0.8)
        naive.append(np.mean(ranked[0]) - 0.8)
    assert abs(np.mean(optimism)) < 3 * np.std(optimism) / math.sqrt(500)
    assert np.mean(naive) > 0.01


def test_prediction_follows_the_ranking_and_not_the_accuracy() -> None:
    """With val_loss as the objective the recipe of the least loss is predicted."""
    accuracies = [[0.7, 0.7, 0.7], [0.9, 0.9, 0.9]]
    losses = [[-0.1, -0.1, -0.1], [-0.5, -0.5, -0.5]]
    assert predict_accuracy(accuracies, losses, counts=COUNTS, n_folds=10).accuracy == pytest.approx(0.7)


def test_interval_of_a_perfect_score_has_a_width() -> None:
    """No errors among some images is no proof that there are none; the interval stays in [0, 1]."""
    found = predict_accuracy([[1.0, 1.0, 1.0]], [[1.0, 1.0, 1.0]], counts=COUNTS, n_folds=10)
    assert (found.accuracy, found.high) == (1.0, 1.0)
    assert 0.95 < found.low < 1


def test_interval_without_test_images_is_narrower() -> None:
    """It is then for infinitely many, and says so."""
    values = [[0.9, 0.92, 0.88]]
    some = predict_accuracy(values, values, counts=COUNTS, n_folds=0)
    none = predict_accuracy(values, values, counts=COUNTS | {"test": 0}, n_folds=0)
    assert none.high - none.low < some.high - some.low
    assert "on 200 test images" in some.describe()
    assert "on images like these" in none.describe()
