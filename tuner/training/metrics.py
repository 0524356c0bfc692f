"""What a model's predictions are worth. Everything but the loss comes from counts per class.

The definitions are scikit-learn's (``accuracy_score``, ``balanced_accuracy_score``,
``precision_recall_fscore_support(average="macro", zero_division=0)``). Scoring takes time and memory with images plus
classes; only a report, which holds the confusion matrix, takes them with the square of the classes.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tuner.trial import ClassReport


@dataclass(frozen=True, kw_only=True, eq=False)
class Scores:
    """What predictions on a set of images are worth."""

    loss: float
    """Mean cross entropy, without smoothing or weights."""
    accuracy: float
    balanced_accuracy: float
    """Mean recall of the classes that occur among the labels."""
    macro_precision: float
    """Mean over the classes that occur among the labels or the predictions, as are the next two."""
    macro_recall: float
    macro_f1: float
    precision: NDArray[np.float64]
    """Of every class, shape ``(n_classes,)``, as are the next two; 0 for 0 / 0."""
    recall: NDArray[np.float64]
    f1: NDArray[np.float64]
    labels: NDArray[np.int64]
    """True classes, shape ``(n_images,)``."""
    predictions: NDArray[np.int64]
    """Predicted classes, shape ``(n_images,)``."""

    @property
    def report(self) -> ClassReport:
        """Class by class, made anew each time: it takes time and memory with the square of the number of classes."""
        confusion = count_confusion(self.labels, self.predictions, len(self.recall))
        return ClassReport(
            confusion_matrix=tuple(tuple(row.tolist()) for row in confusion),
            precision=tuple(self.precision.tolist()),
            recall=tuple(self.recall.tolist()),
            f1=tuple(self.f1.tolist()),
        )


def score_logits(logits: Tensor, labels: Tensor) -> Scores:
    """Score predictions.

    Args:
        logits: Unnormalised scores, float, shape ``(n_images, n_classes)``.
        labels: True classes, int64, shape ``(n_images,)``, each in ``[0, n_classes)``, on the same device.

    Raises:
        ValueError: If there are no images, or the two disagree on how many there are.
    """
    if len(logits) == 0 or len(logits) != len(labels):
        raise ValueError(f"logits: must be as many as labels, and one at least, got {len(logits)} and {len(labels)}")
    precise = logits if logits.dtype == torch.float64 else logits.float()
    loss = functional.cross_entropy(precise, labels).item()
    true, predicted = torch.stack((labels, logits.argmax(dim=1))).cpu().numpy()
    return score_predictions(true, predicted, logits.shape[1], loss=loss)


def score_stacked_logits(predict: Callable[[slice], Tensor], labels: Tensor, parts: Sequence[slice]) -> list[Scores]:
    """Score the predictions of several models on the same images, with the numbers of ``score_logits``.

    Args:
        predict: From some of the models to their logits, shape ``(n_models, n_images, n_classes)``. Those of one part
            are let go before the next are asked for.
        labels: True classes, int64, shape ``(n_images,)``, on the same device.
        parts: Which models to take at once.

    Returns:
        One for each model, in their order. Those of a model whose loss is not finite mean nothing.
    """
    losses, predictions, sizes = zip(*(_look_at(predict(part), labels) for part in parts), strict=True)
    true, *predicted = torch.cat((labels[None], *predictions)).cpu().numpy()  # labels too: one transfer, not two
    per_model = zip(predicted, torch.cat(losses).tolist(), strict=True)
    return [score_predictions(true, own, sizes[0], loss=loss) for own, loss in per_model]


def _look_at(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor, int]:
    """Return the models' losses, ``(n_models,)``, their predictions, ``(n_models, n_images)``, and the classes."""
    own = logits.log_softmax(dim=2).gather(2, labels.expand(len(logits), -1)[..., None])
    return -own.mean(dim=(1, 2)), logits.argmax(dim=2), logits.shape[2]


def score_predictions(
    labels: NDArray[np.int64], predictions: NDArray[np.int64], n_classes: int, *, loss: float
) -> Scores:
    """Score predicted classes.

    Args:
        labels: True classes, shape ``(n_images,)``, of one image at least, each in ``[0, n_classes)``.
        predictions: Predicted classes, of the same shape and range.
        n_classes: Also those that do not occur.
        loss: Of the same predictions.
    """
    is_hit = labels == predictions
    hits = np.bincount(labels[is_hit], minlength=n_classes)
    n_true = np.bincount(labels, minlength=n_classes)
    n_predicted = np.bincount(predictions, minlength=n_classes)
    precision = _divide(hits, n_predicted)
    recall = _divide(hits, n_true)
    f1 = _divide(2 * hits, n_true + n_predicted)
    seen = (n_true + n_predicted) > 0
    return Scores(
        loss=loss,
        accuracy=float(is_hit.sum() / len(labels)),
        balanced_accuracy=float(recall[n_true > 0].mean()),
        macro_precision=float(precision[seen].mean()),
        macro_recall=float(recall[seen].mean()),
        macro_f1=float(f1[seen].mean()),
        precision=precision,
        recall=recall,
        f1=f1,
        labels=labels,
        predictions=predictions,
    )


def pool_scores(parts: Sequence[Scores]) -> Scores:
    """Return what predictions on several sets of images of the same classes are worth together.

    Args:
        parts: At least one.
    """
    n_images = sum(len(part.labels) for part in parts)
    return score_predictions(
        np.concatenate([part.labels for part in parts]),
        np.concatenate([part.predictions for part in parts]),
        len(parts[0].recall),
        loss=sum(part.loss * len(part.labels) for part in parts) / n_images,
    )


def count_confusion(labels: NDArray[np.int64], predictions: NDArray[np.int64], n_classes: int) -> NDArray[np.int64]:
    """Return the counts of (true class, predicted class), shape ``(n_classes, n_classes)``."""
    cells = np.bincount(labels * n_classes + predictions, minlength=n_classes**2)
    return cells.reshape(n_classes, n_classes)


def _divide(counts: NDArray[np.int64], totals: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide, with 0 for 0 / 0."""
    return np.divide(counts, totals, out=np.zeros(len(counts)), where=totals > 0)
