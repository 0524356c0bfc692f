"""The confusion matrix as a picture."""

from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from tuner.production.pictures import shorten_name, write_picture

_MIN_INCHES, _MAX_INCHES = 3.2, 22.0
"""Side of the matrix."""
_MAX_DETAILED = 120
"""Classes; beyond it cells are too small for counts and for lines between them."""
_POINTS_PER_INCH = 72


def draw_confusion(path: Path, confusion: NDArray[np.int64], classes: tuple[str, ...], *, title: str) -> None:
    """Write a confusion matrix as PNG: colour is the share of the true class, numbers are images.

    Args:
        path: The file.
        confusion: Rows are true classes, columns are predicted ones; shape ``(n_classes, n_classes)``.
        classes: Their names; nothing in them is taken for markup.
        title: Stands above.
    """
    write_picture(path, lambda: draw_confusion_figure(confusion, classes, title))


def draw_confusion_figure(confusion: NDArray[np.int64], classes: tuple[str, ...], title: str) -> Figure:
    """Return what ``draw_confusion`` writes."""
    n_classes = len(classes)
    side = min(max(_MIN_INCHES, n_classes * _choose_cell(n_classes)), _MAX_INCHES)
    figure = Figure(figsize=(side, side))
    axes = figure.add_axes((0, 0, 1, 1))  # names stick out of it; the file is cut to fit
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    cell_points = side / n_classes * _POINTS_PER_INCH
    _name_axes(axes, classes, cell_points)
    if n_classes <= _MAX_DETAILED:
        _separate_cells(axes, n_classes)
        _write_counts(axes, confusion, shares, cell_points)
    axes.set_title(title, pad=12)
    return figure


def _choose_cell(n_classes: int) -> float:
    """Return the side of a cell in inches: roomy for a few classes, small for many."""
    return float(np.interp(n_classes, [5, 20, 100], [0.7, 0.4, 0.2]))


def _name_axes(axes: Axes, classes: tuple[str, ...], cell_points: float) -> None:
    size = float(np.clip(0.6 * cell_points, 6, 10))
    step = max(1, int(np.ceil(1.2 * size / cell_points)))  # names may not overlap
    names = [shorten_name(name) for name in classes[::step]]
    positions = np.arange(0, len(classes), step)
    turned = any(len(name) * 0.6 * size > cell_points for name in names)
    axes.set_xticks(positions, labels=names, fontsize=size, rotation=90 if turned else 0)
    axes.set_yticks(positions, labels=names, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")


def _separate_cells(axes: Axes, n_classes: int) -> None:
    edges = np.arange(n_classes + 1) - 0.5
    axes.set_xticks(edges, minor=True)
    axes.set_yticks(edges, minor=True)
    axes.grid(which="minor", color="0.85", linewidth=0.5)
    axes.tick_params(which="minor", length=0)


def _write_counts(axes: Axes, confusion: NDArray[np.int64], shares: NDArray[np.float64], cell_points: float) -> None:
    """Write the counts into the cells; an empty cell stays empty."""
    n_digits = max(2, len(str(confusion.max())))
    size = min(1.3 * cell_points / n_digits, 0.5 * cell_points, 12)
    for row, column in np.argwhere(confusion):
        colour = "white" if shares[row, column] > 0.5 else "black"
        text = str(confusion[row, column])
        axes.text(column, row, text, ha="center", va="center", fontsize=size, color=colour)
