"""What a model's predictions are worth. Everything but the loss comes from the confusion matrix.

The definitions are scikit-learn's (``accuracy_score``, ``balanced_accuracy_score``,
``precision_recall_fscore_support(average="macro", zero_division=0)``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from tuner.trial import ClassReport


@dataclass(frozen=True, kw_only=True)
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
    report: ClassReport


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
    return score_confusion(count_confusion(labels, logits.argmax(dim=1), logits.shape[1]), loss=loss)


def score_stacked_logits(predict: Callable[[slice], Tensor], labels: Tensor, parts: Sequence[slice]) -> list[Scores]:
    """Score the predictions of several models on the same images, with the numbers of ``score_logits``.

    Args:
        predict: From some of the models to their logits, shape ``(n_models, n_images, n_classes)``.
        labels: True classes, int64, shape ``(n_images,)``, on the same device.
        parts: Which models to take at once.

    Returns:
        One for each model, in their order. Those of a model whose loss is not finite mean nothing.
    """
    losses, confusions = [], []
    for part in parts:
        logits = predict(part)
        n_models, _, n_classes = logits.shape
        own = logits.log_softmax(dim=2).gather(2, labels.expand(n_models, -1)[..., None])
        losses.append(-own.mean(dim=(1, 2)))
        cells = labels * n_classes + logits.argmax(dim=2)  # (n_models, n_images)
        cells += n_classes**2 * torch.arange(n_models, device=labels.device)[:, None]
        counts = torch.bincount(cells.flatten(), minlength=n_models * n_classes**2)
        confusions.append(counts.reshape(n_models, n_classes, n_classes))
    tables = torch.cat(confusions).cpu().numpy()
    return [score_confusion(table, loss=loss) for table, loss in zip(tables, torch.cat(losses).tolist(), strict=True)]


def count_confusion(labels: Tensor, predictions: Tensor, n_classes: int) -> NDArray[np.int64]:
    """Return the counts of (true class, predicted class), shape ``(n_classes, n_classes)``."""
    cells = torch.bincount(labels * n_classes + predictions, minlength=n_classes**2)
    return cells.reshape(n_classes, n_classes).cpu().numpy().astype(np.int64)


def score_confusion(confusion: NDArray[np.int64], *, loss: float) -> Scores:
    """Score a confusion matrix, rows true and columns predicted, that holds one image at least."""
    hits, n_true, n_predicted = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    precision = _divide(hits, n_predicted)
    recall = _divide(hits, n_true)
    f1 = _divide(2 * hits, n_true + n_predicted)
    seen = (n_true + n_predicted) > 0
    return Scores(
        loss=loss,
        accuracy=float(hits.sum() / confusion.sum()),
        balanced_accuracy=float(recall[n_true > 0].mean()),
        macro_precision=float(precision[seen].mean()),
        macro_recall=float(recall[seen].mean()),
        macro_f1=float(f1[seen].mean()),
        report=ClassReport(
            confusion_matrix=tuple(tuple(row) for row in confusion.tolist()),
            precision=tuple(precision.tolist()),
            recall=tuple(recall.tolist()),
            f1=tuple(f1.tolist()),
        ),
    )


def _divide(counts: NDArray[np.int64], totals: NDArray[np.int64]) -> NDArray[np.float64]:
    """Divide, with 0 for 0 / 0."""
    return np.divide(counts, totals, out=np.zeros(len(counts)), where=totals > 0)
