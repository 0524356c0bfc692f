"""What an epoch showed, in numbers: its losses, whether they went astray, and the line that travels."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from tuner.training.metrics import Scores
from tuner.trial import EpochResult


class Diverged(Exception):  # noqa: N818 - the name of what happened to the trial, no mistake of the user or of ours
    """A loss became NaN or infinite; the text is one line for a person."""


def weigh_classes(labels: Tensor, n_classes: int) -> Tensor:
    """Return the weights with which all classes count the same: n / (n_classes * count), scikit-learn's "balanced".

    Args:
        labels: int64, shape ``(n_images,)``.
        n_classes: How many classes there are, those without images included.

    Returns:
        Float64, shape ``(n_classes,)``, on the labels' device.
    """
    counts = torch.bincount(labels, minlength=n_classes).clamp(min=1)
    return len(labels) / (n_classes * counts.double())


def find_divergence(losses: Sequence[float], epoch: int) -> Diverged | None:
    """Return what the training losses of an epoch's steps tell, if one of them is not finite."""
    for step, loss in enumerate(losses, start=1):
        if not math.isfinite(loss):
            return Diverged(f"training loss is {loss} in epoch {epoch}, step {step} of {len(losses)}")
    return None


def average_losses(losses: Sequence[float], n_images: Sequence[int]) -> float:
    """Return the mean loss over an epoch's images from the mean loss and the number of images of each step."""
    return math.fsum(loss * count for loss, count in zip(losses, n_images, strict=True)) / sum(n_images)


def tell_bad_validation(loss: float, epoch: int) -> Diverged:
    """Return what a validation loss tells that is not finite."""
    return Diverged(f"validation loss is {loss} in epoch {epoch}")


def summarise_epoch(
    epoch: int, train_loss: float, scores: Scores, *, seconds: float, val_seconds: float, images_per_second: float
) -> EpochResult:
    """Return an epoch's numbers as they travel."""
    return EpochResult(
        epoch=epoch,
        train_loss=train_loss,
        val_loss=scores.loss,
        val_accuracy=scores.accuracy,
        val_balanced_accuracy=scores.balanced_accuracy,
        val_macro_precision=scores.macro_precision,
        val_macro_recall=scores.macro_recall,
        val_macro_f1=scores.macro_f1,
        seconds=seconds,
        val_seconds=val_seconds,
        images_per_second=images_per_second,
    )
