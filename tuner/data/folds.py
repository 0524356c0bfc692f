"""Other cuts of the images that a search may open: stratified folds of train and val together, groups kept whole."""

import warnings
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from tuner.data.image_set import ImageSet
from tuner.data.index import ImageIndex, Split, preview
from tuner.data.splits import cuts_val
from tuner.errors import DataError
from tuner.trial import Repeat


def check_folds(index: ImageIndex, splits: NDArray[np.int8], n_folds: int, where: str = "data.folds") -> None:
    """Check that every fold can hold every class.

    Args:
        index: The images.
        splits: Their splits.
        n_folds: At least 2.
        where: The key that asks for them.

    Raises:
        DataError: If a class has fewer images, or groups, than there are folds.
    """
    counts = count_units(index, splits)
    if (counts < n_folds).any():
        label = int(np.argmin(counts))
        what = "images" if index.groups is None else "groups"
        raise DataError(
            f"{where}: must not exceed the {what} of train and val in the smallest class, "
            f"got {n_folds} with {counts[label]} of {preview([index.classes[label]])}"
        )


def count_max_folds(index: ImageIndex, splits: NDArray[np.int8]) -> int:
    """Return how many folds train and val can be cut into; 0 where the data gives val, which then stays apart.

    A class with fewer images is missing in the validation of some folds. Groups are not spread that thin: every fold
    could hold every class.
    """
    if not cuts_val(index):
        return 0
    counts = count_units(index, splits)
    return int(counts.max() if index.groups is None else counts.min())


def count_units(index: ImageIndex, splits: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return how many images, or groups where there are some, each class has in train and val: ``(n_classes,)``."""
    rows = np.flatnonzero(splits != Split.TEST)
    if index.groups is None:
        return np.bincount(index.labels[rows], minlength=len(index.classes))
    pairs = {(int(index.labels[row]), index.groups[row]) for row in rows}
    return np.bincount([label for label, _ in pairs], minlength=len(index.classes))


def cut_fold(images: ImageSet, repeat: Repeat, index: ImageIndex) -> tuple[ImageSet, ImageSet]:
    """Return what trains and what validates in one fold of the images of train and val together.

    The same seed cuts the same images in the same way, in whatever order they are.

    Args:
        images: Of train and val.
        repeat: Says how many folds there are, and which one validates.
        index: The images' groups, if they have some.

    Returns:
        Sets that share the pixels of all images.

    Raises:
        DataError: If a class is missing in what trains.
    """
    rows, labels = images.rows.numpy(), images.labels.cpu().numpy()
    groups = None if index.groups is None else np.array([index.groups[row] for row in rows])
    validates = find_fold(rows, labels, groups, repeat)
    n_left = np.bincount(labels[~validates], minlength=images.n_classes)
    if lacking := [index.classes[label] for label in np.flatnonzero(n_left == 0)]:
        raise DataError(f"data.path: the folds that train must hold every class, got none of {preview(lacking)}")
    return _take(images, ~validates), _take(images, validates)


def find_fold(
    rows: NDArray[np.int64], labels: NDArray[np.int64], groups: NDArray[np.str_] | None, repeat: Repeat
) -> NDArray[np.bool_]:
    """Return which images validate in a fold: shape ``(n_images,)``.

    Args:
        rows: Of the images in the data index, in any order; the cut does not depend on it.
        labels: Of the images.
        groups: Of the images; each stays whole.
        repeat: Says how many folds there are, and which one validates.
    """
    from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold

    order = np.argsort(rows)
    kind = StratifiedKFold if groups is None else StratifiedGroupKFold
    folds = kind(n_splits=repeat.n_folds, shuffle=True, random_state=repeat.cut_seed)
    with warnings.catch_warnings():  # of a class with fewer images than folds, which is looked for by its absence
        warnings.simplefilter("ignore", UserWarning)
        cuts = list(folds.split(order, labels[order], None if groups is None else groups[order]))
    chosen = np.zeros(len(rows), dtype=np.bool_)
    chosen[order[cuts[repeat.fold][1]]] = True
    return chosen


def _take(images: ImageSet, mask: NDArray[np.bool_]) -> ImageSet:
    positions = torch.from_numpy(np.flatnonzero(mask))
    there = positions.to(images.labels.device)
    return replace(images, labels=images.labels[there], rows=images.rows[positions], positions=there)
