"""Scores against scikit-learn's, and what they cost."""

import tracemalloc
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from sklearn import metrics as sklearn_metrics
from torch import Tensor
from torch.overrides import TorchFunctionMode

from tuner.training.metrics import Scores, count_confusion, score_logits, score_stacked_logits


def draw_logits(n_classes: int, *, seed: int, only_labels: int | None = None) -> tuple[Tensor, Tensor]:
    """Return logits that are right more often than not, and labels of the first classes only if asked."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(0, only_labels or n_classes, (40,), generator=generator)
    logits = torch.randn(40, n_classes, generator=generator)
    logits[torch.arange(40), labels] += 0.8
    return logits, labels


def list_shares(scores: Scores) -> tuple[float, ...]:
    """Return all numbers that travel but the loss."""
    return (
        scores.accuracy,
        scores.balanced_accuracy,
        scores.macro_precision,
        scores.macro_recall,
        scores.macro_f1,
    )


@pytest.mark.parametrize(
    ("n_classes", "seed", "only_labels"), [(2, 0, None), (5, 1, None), (5, 2, 3), (60, 3, None), (60, 4, 7)]
)
def test_score_logits_agrees_with_sklearn(n_classes: int, seed: int, only_labels: int | None) -> None:
    """All scores, also where classes are missing among labels or predictions."""
    logits, labels = draw_logits(n_classes, seed=seed, only_labels=only_labels)
    scores = score_logits(logits, labels)
    true, predicted = labels.numpy(), logits.argmax(1).numpy()
    macro = sklearn_metrics.precision_recall_fscore_support(true, predicted, average="macro", zero_division=0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="y_pred contains classes not in y_true")
        balanced = sklearn_metrics.balanced_accuracy_score(true, predicted)
    assert scores.accuracy == pytest.approx(sklearn_metrics.accuracy_score(true, predicted))
    assert scores.balanced_accuracy == pytest.approx(balanced)
    assert (scores.macro_precision, scores.macro_recall, scores.macro_f1) == pytest.approx(macro[:3])
    assert scores.loss == pytest.approx(
        sklearn_metrics.log_loss(true, logits.double().softmax(1).numpy(), labels=list(range(n_classes))), rel=1e-5
    )


def test_score_logits_reports_every_class() -> None:
    """The report has one entry per class, as scikit-learn with all labels given, 0 for 0 / 0."""
    logits, labels = draw_logits(6, seed=5, only_labels=4)
    report = score_logits(logits, labels).report
    true, predicted = labels.numpy(), logits.argmax(1).numpy()
    expected = sklearn_metrics.precision_recall_fscore_support(true, predicted, labels=range(6), zero_division=0)
    for ours, theirs in zip((report.precision, report.recall, report.f1), expected[:3], strict=True):
        np.testing.assert_allclose(ours, theirs)
    np.testing.assert_array_equal(
        report.confusion_matrix, sklearn_metrics.confusion_matrix(true, predicted, labels=range(6))
    )


def test_count_confusion_has_true_classes_as_rows() -> None:
    """One image of class 2 taken for class 0 lies in row 2, column 0."""
    confusion = count_confusion(np.array([2]), np.array([0]), 3)
    assert confusion[2, 0] == 1
    assert confusion.sum() == 1


@pytest.mark.parametrize(("n_logits", "n_labels"), [(0, 0), (2, 3)])
def test_score_logits_refuses_sizes_that_do_not_fit(n_logits: int, n_labels: int) -> None:
    """No images have no accuracy."""
    with pytest.raises(ValueError, match=rf"^logits: must be as many as labels.*got {n_logits} and {n_labels}$"):
        score_logits(torch.zeros(n_logits, 2), torch.zeros(n_labels, dtype=torch.int64))


@pytest.mark.parametrize("parts", [[slice(0, 5)], [slice(0, 2), slice(2, 4), slice(4, 6)]])
def test_score_stacked_logits_scores_each_model_as_alone(parts: list[slice]) -> None:
    """All at once, or some at a time."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(5, 40, 3, generator=generator, dtype=torch.float64)
    labels = torch.randint(0, 3, (40,), generator=generator)
    for found, one in zip(score_stacked_logits(logits.__getitem__, labels, parts), logits, strict=True):
        expected = score_logits(one, labels)
        assert found.loss == pytest.approx(expected.loss)
        assert list_shares(found) == list_shares(expected)
        assert found.report == expected.report


def test_score_stacked_logits_holds_the_logits_of_one_part() -> None:
    """Those of the part before are gone when the next are asked for."""
    labels = torch.zeros(4, dtype=torch.int64)
    given: list[weakref.ref[Tensor]] = []

    def predict(part: slice) -> Tensor:
        assert [logits() for logits in given] == [None] * len(given)
        logits = torch.ones(part.stop - part.start, 4, 3)
        given.append(weakref.ref(logits))
        return logits

    assert len(score_stacked_logits(predict, labels, [slice(0, 2), slice(2, 4), slice(4, 5)])) == 5
    assert len(given) == 3


class LargestTensor(TorchFunctionMode):
    """Remembers the most numbers that one tensor held which torch made in the meantime."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call a function and look at what it made."""
        made = func(*args, **(kwargs or {}))
        if isinstance(made, Tensor):
            self.size = max(self.size, made.numel())
        return made


def test_scoring_grows_with_classes_not_with_their_square() -> None:
    """No tensor is larger than the logits, and outside torch it takes less than one byte per cell of one matrix."""
    n_models, n_images, n_classes = 2, 20, 4000
    logits = torch.randn(n_models, n_images, n_classes, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(n_images)
    tracemalloc.start()
    with LargestTensor() as largest:
        stacked = score_stacked_logits(logits.__getitem__, labels, [slice(0, n_models)])
        alone = [score_logits(one, labels) for one in logits]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [list_shares(one) for one in stacked] == [list_shares(one) for one in alone]
    assert 0 < largest.size <= logits.numel()
    assert peak < n_classes**2
