"""Whether probabilities mean what they say: the calibration error, and the temperature that mends most of it."""

import math
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

N_BINS = 15
_LOG_TEMPERATURES = (math.log(0.05), math.log(20.0))
"""Beyond them a softmax says nothing but 0, 1 or the same for all classes."""


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Predictions of about the same confidence."""

    n_images: int
    confidence: float
    """Mean probability of the predicted class."""
    accuracy: float
    """Share of them that are right."""


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """How far confidence and accuracy are apart."""

    ece: float
    """Expected calibration error: the mean distance of a bin's confidence and accuracy, weighted by its images."""
    log_loss: float
    """Mean cross entropy of the same probabilities."""
    bins: tuple[Bin, ...]
    """Of equal width from 0 to 1; empty ones are left out."""

    def to_json(self) -> dict[str, Any]:
        """Return the calibration as a JSON object."""
        log_loss = self.log_loss if math.isfinite(self.log_loss) else None
        return {"ece": self.ece, "log_loss": log_loss, "bins": [asdict(each) for each in self.bins]}


def fit_temperature(logits: Tensor, labels: Tensor) -> float:
    """Return the temperature by which logits are to be divided: that of the least log loss on images held out.

    After Guo et al. 2017, *On Calibration of Modern Neural Networks*, with the targets of Platt 1999: n images that are
    all right are no proof of more than ``(n + 1) / (n + 2)``. Without them the temperature would go to 0 there.

    Args:
        logits: Float, shape ``(n_images, n_classes)``, at least one image, finite.
        labels: True classes, int64, shape ``(n_images,)``, on the same device.

    Returns:
        In [0.05, 20]; no prediction changes with it.
    """
    from scipy.optimize import minimize_scalar

    precise, true = logits.double().cpu(), labels.cpu()
    n_images, n_classes = precise.shape
    doubt = n_classes / max(1, n_classes - 1) / (n_images + 2)  # torch leaves a share of it with the true class

    def lose(log_temperature: float) -> float:
        return float(functional.cross_entropy(precise / math.exp(log_temperature), true, label_smoothing=doubt))

    found = minimize_scalar(lose, bounds=_LOG_TEMPERATURES, method="bounded")
    return math.exp(float(found.x)) if lose(float(found.x)) < lose(0.0) else 1.0


def measure_calibration(logits: Tensor, labels: Tensor, *, temperature: float = 1.0) -> Calibration:
    """Compare how sure a model is with how often it is right.

    Args:
        logits: Float, shape ``(n_images, n_classes)``, at least one image.
        labels: True classes, int64, shape ``(n_images,)``, on the same device.
        temperature: Divides the logits first; > 0.
    """
    scaled, true = (logits.double() / temperature).cpu(), labels.cpu()
    confidence, predicted = (each.numpy() for each in scaled.softmax(dim=1).max(dim=1))
    hits = predicted == true.numpy()
    positions = np.minimum((confidence * N_BINS).astype(np.int64), N_BINS - 1)
    bins = tuple(
        Bin(
            n_images=int(chosen.sum()),
            confidence=float(confidence[chosen].mean()),
            accuracy=float(hits[chosen].mean()),
        )
        for chosen in (positions == number for number in range(N_BINS))
        if chosen.any()
    )
    error = sum(each.n_images * abs(each.confidence - each.accuracy) for each in bins) / len(true)
    return Calibration(ece=error, log_loss=float(functional.cross_entropy(scaled, true)), bins=bins)


def softmax(logits: Tensor, temperature: float) -> Tensor:
    """Return probabilities, float64, of the logits' shape ``(n_images, n_classes)``."""
    return torch.softmax(logits.double() / temperature, dim=1)
