"""Scores and calibration as pictures."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from tuner.production.calibration import Calibration
from tuner.production.evaluate import accuracy_interval, count_images
from tuner.production.pictures import shorten_name, write_picture
from tuner.training.metrics import Scores

_MAX_NAMED = 60
"""Classes; of more the worst by F1 are drawn."""


def draw_scores(path: Path, scores: Scores, classes: tuple[str, ...]) -> None:
    """Write accuracy with its interval, the other scores, and precision, recall and F1 of each class as PNG.

    Args:
        path: The file.
        scores: Of a model with these classes.
        classes: In the order of the model's outputs; nothing in them is taken for markup.
    """
    write_picture(path, lambda: _draw_scores(scores, classes))


def _draw_scores(scores: Scores, classes: tuple[str, ...]) -> Figure:
    shown = np.argsort(scores.f1, kind="stable")[:_MAX_NAMED] if len(classes) > _MAX_NAMED else np.arange(len(classes))
    heights = 1.6, max(1.2, 0.22 * len(shown))
    figure = Figure(figsize=(7, sum(heights) + 0.8), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=heights, sharex=True)
    _draw_totals(above, scores)
    positions = np.arange(len(shown))
    for values, marker, name in (
        (scores.precision, ">", "precision"),
        (scores.recall, "<", "recall"),
        (scores.f1, "o", "F1"),
    ):
        below.plot(values[shown], positions, marker, markersize=5, label=name, alpha=0.8)
    below.set_yticks(positions, labels=[shorten_name(classes[label]) for label in shown], fontsize=8)
    below.set_ylim(len(shown) - 0.4, -0.6)
    below.grid(axis="x", color="0.9")
    below.legend(loc="lower left", fontsize=8)
    if len(shown) < len(classes):
        below.set_title(f"the {len(shown)} of {len(classes)} classes with the least F1", fontsize=9)
    return figure


def _draw_totals(axes: Axes, scores: Scores) -> None:
    low, high = accuracy_interval(scores)
    rows = {
        "accuracy": scores.accuracy,
        "balanced accuracy": scores.balanced_accuracy,
        "macro precision": scores.macro_precision,
        "macro recall": scores.macro_recall,
        "macro F1": scores.macro_f1,
    }
    positions = np.arange(len(rows))
    axes.plot([low, high], [0, 0], color="0.5", linewidth=4, solid_capstyle="butt")
    axes.plot(list(rows.values()), positions, "D", color="black", markersize=5)
    axes.set_yticks(positions, labels=[f"{name} {value:.4f}" for name, value in rows.items()], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.set_xlim(-0.02, 1.02)
    axes.grid(axis="x", color="0.9")
    axes.set_title(f"test, {count_images(scores)} images; grey: 95 % interval of the accuracy", fontsize=9)


def draw_calibration(path: Path, before: Calibration, after: Calibration, *, temperature: float) -> None:
    """Write a reliability diagram as PNG: above the diagonal a model is better than it says, below it is worse.

    Args:
        path: The file.
        before: Of the model's own probabilities.
        after: Of those that its temperature gives.
        temperature: Divides the logits.
    """
    write_picture(path, lambda: draw_calibration_figure(before, after, temperature))


def draw_calibration_figure(before: Calibration, after: Calibration, temperature: float) -> Figure:
    """Return what ``draw_calibration`` writes."""
    figure = Figure(figsize=(8, 4.2), layout="constrained")
    kinds = ("as trained", before), (f"at temperature {temperature:.3g}", after)
    for axes, (title, found) in zip(figure.subplots(1, 2, sharey=True), kinds, strict=True):
        axes.plot([0, 1], [0, 1], color="0.7", linewidth=1)
        sizes = [20 + 200 * each.n_images / sum(part.n_images for part in found.bins) for each in found.bins]
        axes.scatter(
            [each.confidence for each in found.bins], [each.accuracy for each in found.bins], s=sizes, alpha=0.7
        )
        axes.set_title(f"{title}: ECE {found.ece:.4f}", fontsize=10)
        axes.set_xlabel("confidence")
        axes.set_xlim(0, 1.02)
        axes.set_ylim(-0.02, 1.02)
        axes.set_ylabel("accuracy")
        axes.grid(color="0.93")
    return figure
