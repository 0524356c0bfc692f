"""Tests of tuner.data.splits."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image

from tuner.data.index import NO_SPLIT, ImageIndex, Split
from tuner.data.splits import cut_splits, has_test, hash_data, pack_splits, unpack_splits
from tuner.errors import DataError
from tuner.spec.sections import DataSection


def make_index(*counts: int, given: Sequence[int] | None = None) -> ImageIndex:
    """Return an index with so many images of each class."""
    labels = np.repeat(np.arange(len(counts)), counts)
    return ImageIndex(
        classes=tuple("abcdefghij"[: len(counts)]),
        names=tuple(f"{row:04d}" for row in range(len(labels))),
        labels=labels,
        given_splits=np.full(len(labels), NO_SPLIT, dtype=np.int8) if given is None else np.array(given, dtype=np.int8),
        stamps=tuple(f"s{row}" for row in range(len(labels))),
        open_image=lambda row: Image.new("L", (2, 2), row),
    )


def make_section(val_fraction: float = 0.2, test_fraction: float | None = None) -> DataSection:
    """Return a section with these shares."""
    return DataSection(source="digits", val_fraction=val_fraction, test_fraction=test_fraction)


def count_images(index: ImageIndex, splits: np.ndarray) -> list[list[int]]:
    """Return the number of images per split, for each class."""
    return [np.bincount(splits[index.labels == label], minlength=3).tolist() for label in range(len(index.classes))]


def test_cut_splits_takes_shares_of_each_class() -> None:
    """Both shares are of all images of the class; train keeps the rest."""
    index = make_index(100, 10, 20)
    splits = cut_splits(index, make_section(0.2, 0.1), seed=0)
    assert count_images(index, splits) == [[70, 20, 10], [7, 2, 1], [14, 4, 2]]


def test_cut_splits_cuts_no_test_unasked() -> None:
    """Without ``test_fraction`` there is no test split."""
    index = make_index(10, 10)
    splits = cut_splits(index, make_section(), seed=0)
    assert count_images(index, splits) == [[8, 2, 0], [8, 2, 0]]
    assert not has_test(index, splits)


def test_cut_splits_follows_the_seed() -> None:
    """One seed gives one cut; another gives another."""
    index = make_index(50, 50)
    cuts = [cut_splits(index, make_section(), seed=seed).tolist() for seed in (3, 3, 4)]
    assert cuts[0] == cuts[1] != cuts[2]


@pytest.mark.parametrize("fraction", [0.01, 0.49])
def test_cut_splits_fills_each_split_of_small_classes(fraction: float) -> None:
    """Three images are enough for three splits, whatever the shares."""
    index = make_index(3, 4)
    splits = cut_splits(index, make_section(fraction, fraction), seed=0)
    assert all(min(counts) >= 1 for counts in count_images(index, splits))


def test_cut_splits_keeps_given_splits() -> None:
    """Given splits stay as they are; only what is missing is cut, and only from train."""
    train, val, test = Split.TRAIN, Split.VAL, Split.TEST
    complete = [train, val, test, train, val, test]
    index = make_index(3, 3, given=complete)
    assert cut_splits(index, make_section(0.5, 0.4), seed=0).tolist() == complete
    no_val = [train] * 4 + [test] * 2
    index = make_index(6, 6, given=no_val * 2)
    splits = cut_splits(index, make_section(0.25, 0.25), seed=0)
    assert count_images(index, splits) == [[3, 1, 2], [3, 1, 2]]
    assert (splits[index.given_splits == test] == test).all()
    no_test = [train] * 4 + [val] * 2
    index = make_index(6, 6, given=no_test * 2)
    assert cut_splits(index, make_section(), seed=0).tolist() == no_test * 2
    assert count_images(index, cut_splits(index, make_section(0.5, 0.25), seed=0)) == [[3, 2, 1], [3, 2, 1]]


def test_cut_splits_refuses_a_class_with_too_few_images() -> None:
    """A class must reach every split."""
    with pytest.raises(DataError, match=r"^data.path: each class must .* for each of train, val, test, got 2 of 'b'$"):
        cut_splits(make_index(10, 2), make_section(0.2, 0.2), seed=0)
    with pytest.raises(DataError, match=r"for each of train, val, got 1 of 'a'$"):
        cut_splits(make_index(1, 2), make_section(), seed=0)


def test_cut_splits_refuses_a_given_val_without_a_class() -> None:
    """A class that is never validated would silently not count."""
    index = make_index(2, 2, given=[Split.TRAIN, Split.VAL, Split.TRAIN, Split.TRAIN])
    with pytest.raises(DataError, match=r"^data.path: val must hold a usable image of every class, got none of 'b'$"):
        cut_splits(index, make_section(), seed=0)


def test_hash_data_sees_all_but_the_stamps_of_test_images() -> None:
    """The hash changes with names, labels, splits and stamps, but nothing of a test file goes into it."""
    index = make_index(4, 4)
    splits = np.array([0, 0, 1, 2, 0, 0, 1, 2], dtype=np.int8)
    base = hash_data(index, splits)
    assert len(base) == 64
    changed = [
        hash_data(replace(index, names=("x", *index.names[1:])), splits),
        hash_data(replace(index, labels=index.labels[::-1].copy()), splits),
        hash_data(replace(index, classes=("a", "c")), splits),
        hash_data(replace(index, stamps=("x", *index.stamps[1:])), splits),
        hash_data(index, splits[::-1].copy()),
    ]
    assert len({base, *changed}) == 6
    assert hash_data(replace(index, stamps=(*index.stamps[:7], "x")), splits) == base


def test_pack_splits_round_trips() -> None:
    """Packed splits come back as they were, writable."""
    splits = np.array([0, 1, 2, 0, 0], dtype=np.int8)
    text = pack_splits(splits)
    assert text.isascii()
    unpacked = unpack_splits(text)
    assert unpacked.tolist() == splits.tolist()
    assert unpacked.dtype == np.int8
    assert unpacked.flags.writeable
