"""Tests of tuner.production.evaluate."""

import json
import math

import numpy as np
import pytest
from scipy.stats import binomtest

from tuner.production.evaluate import accuracy_interval, count_images, describe_scores, wilson_interval
from tuner.training.metrics import Scores, score_predictions


def score_matrix(*rows: tuple[int, ...], loss: float = 0.3) -> Scores:
    """Score predictions that have a confusion matrix, rows true and columns predicted."""
    cells = np.indices((len(rows), len(rows))).reshape(2, -1)
    true, predicted = np.repeat(cells, np.ravel(rows), axis=1)
    return score_predictions(true, predicted, len(rows), loss=loss)


@pytest.mark.parametrize(("n_hits", "n_images"), [(0, 1), (1, 1), (0, 7), (7, 7), (3, 7), (168, 180), (999, 1000)])
def test_wilson_interval_is_scipys(n_hits: int, n_images: int) -> None:
    """The same interval as SciPy's, the ends included."""
    expected = binomtest(n_hits, n_images).proportion_ci(method="wilson")
    low, high = wilson_interval(n_hits, n_images)
    assert (low, high) == pytest.approx((expected.low, expected.high), abs=1e-12)
    assert 0 <= low <= n_hits / n_images <= high <= 1


def test_accuracy_interval_counts_the_diagonal() -> None:
    """Hits are on the diagonal, images everywhere."""
    scores = score_matrix((8, 2), (1, 9))
    assert count_images(scores) == 20
    assert accuracy_interval(scores) == wilson_interval(17, 20)


def test_describe_scores_names_the_classes() -> None:
    """Every class has its name, its numbers and its support; a class without images has zeros."""
    scores = score_matrix((8, 2, 0), (1, 9, 0), (0, 0, 0))
    described = describe_scores(scores, ("a", "b", "c"))
    assert described["classes"][0] == {"name": "a", "precision": 8 / 9, "recall": 0.8, "f1": 16 / 19, "support": 10}
    assert described["classes"][2] == {"name": "c", "precision": 0, "recall": 0, "f1": 0, "support": 0}
    assert described["confusion_matrix"] == [[8, 2, 0], [1, 9, 0], [0, 0, 0]]
    assert described["accuracy"] == 0.85


def test_describe_scores_stays_json_with_an_infinite_loss() -> None:
    """JSON has no word for infinity."""
    described = describe_scores(score_matrix((1, 0), (0, 1), loss=math.inf), ("a", "b"))
    assert described["loss"] is None
    json.dumps(described, allow_nan=False)
