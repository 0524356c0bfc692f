"""What a model is worth on images that it has never seen."""

import math
from typing import Any

from tuner.search.intervals import Z_95
from tuner.training.metrics import Scores


def count_images(scores: Scores) -> int:
    """Return how many images were scored."""
    return len(scores.labels)


def accuracy_interval(scores: Scores) -> tuple[float, float]:
    """Return the 95 % interval of the accuracy on images like these."""
    return wilson_interval(int((scores.labels == scores.predictions).sum()), count_images(scores))


def wilson_interval(n_hits: int, n_images: int) -> tuple[float, float]:
    """Return Wilson's 95 % score interval of a share (Wilson 1927); it stays in [0, 1] and is honest for small counts.

    Args:
        n_hits: In ``[0, n_images]``.
        n_images: At least 1.
    """
    share, z2 = n_hits / n_images, Z_95**2
    centre = (share + z2 / (2 * n_images)) / (1 + z2 / n_images)
    half = Z_95 / (1 + z2 / n_images) * math.sqrt(share * (1 - share) / n_images + z2 / (4 * n_images**2))
    # Rounding may leave a share of 0 or 1 just outside its own interval.
    return min(max(0.0, centre - half), share), max(min(1.0, centre + half), share)


def describe_scores(scores: Scores, classes: tuple[str, ...]) -> dict[str, Any]:
    """Return scores as a JSON object, with the classes' names beside their numbers.

    Args:
        scores: Of a model with these classes.
        classes: In the order of the model's outputs.
    """
    report = scores.report
    rows = zip(classes, report.precision, report.recall, report.f1, report.confusion_matrix, strict=True)
    return {
        "n_images": count_images(scores),
        "loss": scores.loss if math.isfinite(scores.loss) else None,  # JSON knows no infinity
        "accuracy": scores.accuracy,
        "accuracy_interval_95": list(accuracy_interval(scores)),
        "balanced_accuracy": scores.balanced_accuracy,
        "macro_precision": scores.macro_precision,
        "macro_recall": scores.macro_recall,
        "macro_f1": scores.macro_f1,
        "classes": [
            {"name": name, "precision": precision, "recall": recall, "f1": f1, "support": sum(row)}
            for name, precision, recall, f1, row in rows
        ],
        "confusion_matrix": [list(row) for row in report.confusion_matrix],
    }
