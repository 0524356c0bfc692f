"""Tests of tuner.data.index."""

import numpy as np
import pytest
from PIL import Image

from tuner.data.index import NO_SPLIT, ImageIndex, join_indexes, select_classes
from tuner.errors import DataError


def make_index(*labels: int, prefix: str = "a") -> ImageIndex:
    """Return an index over grey images whose grey value is their row."""
    return ImageIndex(
        classes=("ant", "bee", "cat"),
        names=tuple(f"{prefix}/{row}" for row in range(len(labels))),
        labels=np.array(labels, dtype=np.int64),
        given_splits=np.full(len(labels), NO_SPLIT, dtype=np.int8),
        stamps=tuple(f"{prefix}{row}" for row in range(len(labels))),
        open_image=lambda row: Image.new("L", (2, 2), row),
    )


def read_values(index: ImageIndex) -> list[object]:
    """Return the grey value of each image."""
    values: list[object] = []
    for row in range(len(index.names)):
        with index.open_image(row) as image:
            values.append(image.getpixel((0, 0)))
    return values


def test_select_classes_keeps_the_order_asked_for() -> None:
    """Labels follow the list of classes, and rows still open their own image."""
    index = select_classes(make_index(0, 1, 2, 1), ["cat", "bee"])
    assert index.classes == ("cat", "bee")
    assert index.names == ("a/1", "a/2", "a/3")
    assert index.labels.tolist() == [1, 0, 1]
    assert read_values(index) == [1, 2, 3]


def test_select_classes_refuses_an_unknown_class() -> None:
    """A name that the data lacks is met with the closest one."""
    with pytest.raises(
        DataError, match=r"^data.classes: must name classes of the data, got 'bees'; did you mean 'bee'"
    ):
        select_classes(make_index(0, 1), ["ant", "bees"])


def test_join_indexes_opens_images_of_both() -> None:
    """Rows of the second index come after those of the first."""
    index = join_indexes(make_index(0, 1), make_index(2, 1, prefix="b"))
    assert index.names == ("a/0", "a/1", "b/0", "b/1")
    assert index.labels.tolist() == [0, 1, 2, 1]
    assert read_values(index) == [0, 1, 0, 1]
    assert [index.image_version(row) for row in range(4)] == ["a0", "a1", "b0", "b1"]
