"""The images of a study as a worker knows them before it opens any. No torch."""

from dataclasses import dataclass
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from tuner.data.content import hash_content
from tuner.data.index import ImageIndex
from tuner.data.sources import read_index
from tuner.data.splits import cut_splits, hash_data, search_rows
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
