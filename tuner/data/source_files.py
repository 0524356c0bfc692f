"""From a list of image files with class names to an index; shared by the sources that read files."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from tuner.data.decode import open_image
from tuner.data.index import NO_SPLIT, ImageIndex, Split, preview
from tuner.errors import DataError


@dataclass(frozen=True, kw_only=True)
class FileEntry:
    """One image file of a data source."""

    name: str
    """Unique; relative to the data."""
    path: Path
    class_name: str
    split: Split | None
    """None: the source does not say."""
    group: str | None = None
    """What it belongs to with others; None, then for all entries: nothing."""


def index_files(entries: Sequence[FileEntry]) -> ImageIndex:
    """Return the index of image files. TEST files are not even looked at.

    Args:
        entries: At least one; in any order.

    Raises:
        DataError: If there are no train images, or a class that train lacks.
    """
    entries = sorted(entries, key=lambda entry: entry.name)
    classes = _find_classes(entries)
    positions = {name: label for label, name in enumerate(classes)}
    splits = [NO_SPLIT if entry.split is None else entry.split for entry in entries]
    return ImageIndex(
        classes=classes,
        names=tuple(entry.name for entry in entries),
        labels=np.array([positions[entry.class_name] for entry in entries], dtype=np.int64),
        given_splits=np.array(splits, dtype=np.int8),
        stamps=tuple("" if entry.split is Split.TEST else _read_size(entry.path) for entry in entries),
        groups=None if entries[0].group is None else tuple(str(entry.group) for entry in entries),
        open_image=lambda row: open_image(entries[row].path),
        read_version=lambda row: file_version(entries[row].path),
        find_file=lambda row: entries[row].path,
    )


def _find_classes(entries: Sequence[FileEntry]) -> tuple[str, ...]:
    """Return the sorted classes of the train images (all images where no split is given)."""
    classes = sorted({entry.class_name for entry in entries if entry.split in {Split.TRAIN, None}})
    if not classes:
        raise DataError("data.path: must hold images of the train split, got none")
    for split in (Split.VAL, Split.TEST):
        lacking = sorted({entry.class_name for entry in entries if entry.split is split}.difference(classes))
        if lacking:
            raise DataError(f"data.path: {split.name.lower()} must hold classes of train only, got {preview(lacking)}")
    return tuple(classes)


def _read_size(path: Path) -> str:
    try:
        return str(path.stat().st_size)
    except OSError:  # a broken link: it counts as a bad image when it is opened
        return "missing"


def file_version(path: str | Path) -> str:
    """Return size and times of a file; ctime too, since ``chmod`` can make an unreadable image readable."""
    try:
        status = Path(path).stat()
    except OSError:
        return "missing"
    return f"{status.st_size}-{status.st_mtime_ns}-{status.st_ctime_ns}"
