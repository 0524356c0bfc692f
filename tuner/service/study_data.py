"""The images of a study as a worker knows them before it opens any. No torch."""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from tuner.data.content import hash_content, list_digests
from tuner.data.duplicates import Compared, Duplicates, find_duplicates
from tuner.data.index import ImageIndex, Split
from tuner.data.sources import read_index
from tuner.data.splits import cut_splits, hash_data, search_rows
from tuner.data.store import PixelStore
from tuner.spec.sections import StudySpec


@dataclass(frozen=True, kw_only=True)
class StudyData:
    """An index, how it is cut, and the identity of both."""

    index: ImageIndex
    splits: NDArray[np.int8]
    hash: str
    """Of names, labels and splits of all images, and of what is in those that the search may open."""


def read_study_data(spec: StudySpec) -> StudyData:
    """Look at a study's images and cut them.

    Raises:
        DataError: If they cannot be used.
    """
    index = read_index(spec.data)
    splits = cut_splits(index, spec.data, spec.study.seed)
    parts = hash_data(index, splits), hash_content(index, search_rows(splits))
    return StudyData(index=index, splits=splits, hash=sha256(" ".join(parts).encode()).hexdigest())


def compare_search_splits(data: StudyData, store: PixelStore | None = None) -> Duplicates:
    """Return which images of val are among those of train; test is locked, so nobody looks there.

    Args:
        data: The images.
        store: Those of train and val, decoded; None looks for exact duplicates alone.
    """
    rows = search_rows(data.splits)
    digests = dict(zip(rows.tolist(), list_digests(data.index, rows), strict=True))
    usable = rows if store is None else store.rows

    def take(split: Split) -> Compared:
        positions = np.flatnonzero(data.splits[usable] == split)
        if not len(positions):  # all of them are bad images, which is said elsewhere
            return Compared(names=(), digests=())
        stretch = slice(positions[0], positions[-1] + 1)  # not the positions: they would copy the pixels
        chosen = usable[stretch].tolist()
        return Compared(
            names=tuple(data.index.names[row] for row in chosen),
            digests=tuple(digests[row] for row in chosen),
            pixels=None if store is None else store.pixels[stretch],
        )

    return find_duplicates(take(Split.VAL), take(Split.TRAIN))
