"""What a data source found: names, labels and given splits of the images. No pixel has been read."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from tuner.errors import DataError
from tuner.spec.suggestions import did_you_mean


class Split(IntEnum):
    """What an image is for. The search never opens a TEST image."""

    TRAIN = 0
    VAL = 1
    TEST = 2


NO_SPLIT = -1
"""In ``ImageIndex.given_splits``: the source does not say."""

SPLIT_NAMES: dict[str, Split] = {
    "train": Split.TRAIN,
    "training": Split.TRAIN,
    "val": Split.VAL,
    "valid": Split.VAL,
    "validation": Split.VAL,
    "test": Split.TEST,
    "testing": Split.TEST,
}
"""Names of split folders and of a table's split column, in lower case."""


@dataclass(frozen=True, kw_only=True)
class ImageIndex:
    """The images of a data source. Row ``i`` of every field describes image ``i``."""

    classes: tuple[str, ...]
    """Class names; a label is a position in it."""
    names: tuple[str, ...]
    """Unique: a path relative to the data, or such as ``digits/0017``; sorted."""
    labels: NDArray[np.int64]
    """Shape ``(n_images,)``."""
    given_splits: NDArray[np.int8]
    """Shape ``(n_images,)``; a ``Split``, or ``NO_SPLIT``."""
    stamps: tuple[str, ...]
    """Identity without reading the file: its size, or a short hash of an array. Empty for TEST files."""
    open_image: Callable[[int], AbstractContextManager[Image.Image]]
    """Opens image ``i`` as stored, not yet converted, in a ``with``. Safe to call from several threads."""
    read_version: Callable[[int], str] | None = None
    """Returns what changes whenever file ``i`` does (size and times), for the cache of decoded images. None: the stamp.
    It looks at the file, so it may be called for a TEST image only where that image may be opened."""
    find_file: Callable[[int], Path] | None = None
    """Returns the file that ``open_image`` opens, for decoding it in another process and for hashing what is in it; the
    latter not for TEST images. None: there are no files, and the stamps hash the content."""
    groups: tuple[str, ...] | None = None
    """What each image belongs to (a patient, a scene), where the source says: a group stays in one split."""
    read_test: Callable[[], "ImageIndex"] | None = None
    """Lists the given test split where listing it would open its files (torchvision); those images are then not in
    this index until ``unlock_test`` adds them. None: there is no test split, or it is already in this index."""

    def image_version(self, row: int) -> str:
        """Return what changes whenever the image does."""
        return self.read_version(row) if self.read_version else self.stamps[row]


def select_classes(index: ImageIndex, classes: Sequence[str]) -> ImageIndex:
    """Return the images of some classes, with labels in the order of ``classes``.

    Raises:
        DataError: If a class does not exist.
    """
    for name in classes:
        if name not in index.classes:
            hint = did_you_mean(name, index.classes) or f"; the classes are {preview(index.classes)}"
            raise DataError(f"data.classes: must name classes of the data, got {name!r}{hint}")
    new_labels = np.full(len(index.classes), -1, dtype=np.int64)
    new_labels[[index.classes.index(name) for name in classes]] = np.arange(len(classes))
    labels = new_labels[index.labels]
    rows = np.flatnonzero(labels >= 0)
    read_version, find_file, read_test = index.read_version, index.find_file, index.read_test
    return ImageIndex(
        classes=tuple(classes),
        names=tuple(index.names[row] for row in rows),
        labels=labels[rows],
        given_splits=index.given_splits[rows],
        stamps=tuple(index.stamps[row] for row in rows),
        open_image=lambda row: index.open_image(int(rows[row])),
        read_version=(lambda row: read_version(int(rows[row]))) if read_version else None,
        find_file=(lambda row: find_file(int(rows[row]))) if find_file else None,
        groups=None if index.groups is None else tuple(index.groups[row] for row in rows),
        read_test=(lambda: select_classes(read_test(), classes)) if read_test else None,
    )


def join_indexes(first: ImageIndex, second: ImageIndex) -> ImageIndex:
    """Return the images of two indexes with the same classes, those of ``first`` first, without what few sources have.

    ``read_test``, ``find_file`` and ``groups`` are dropped.
    """
    n_first = len(first.names)

    def locate(row: int) -> tuple[ImageIndex, int]:
        return (first, row) if row < n_first else (second, row - n_first)

    def open_image(row: int) -> AbstractContextManager[Image.Image]:
        index, own_row = locate(row)
        return index.open_image(own_row)

    def read_version(row: int) -> str:
        index, own_row = locate(row)
        return index.image_version(own_row)

    return ImageIndex(
        classes=first.classes,
        names=first.names + second.names,
        labels=np.concatenate([first.labels, second.labels]),
        given_splits=np.concatenate([first.given_splits, second.given_splits]),
        stamps=first.stamps + second.stamps,
        open_image=open_image,
        read_version=read_version if first.read_version or second.read_version else None,
    )


def preview(names: Sequence[str], n_shown: int = 5) -> str:
    """Return the first names, quoted, and how many more there are."""
    shown = ", ".join(repr(name) for name in names[:n_shown])
    return shown + (f" and {len(names) - n_shown} more" if len(names) > n_shown else "")
