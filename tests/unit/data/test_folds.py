"""Other cuts of train and val: every image once, classes and groups kept, the same cut whatever the order."""

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import pytest
import torch

from tuner.data.folds import check_folds, count_max_folds, cut_fold, find_fold
from tuner.data.image_set import ImageSet
from tuner.data.index import NO_SPLIT, ImageIndex, Split
from tuner.errors import DataError
from tuner.training.batches import take_batch
from tuner.trial import Repeat

N_IMAGES, N_CLASSES, N_FOLDS = 60, 3, 5


def open_nothing(_: int) -> AbstractContextManager[Any]:
    """Open no image: folds look at none."""
    return nullcontext()


def make_index(*, groups: tuple[str, ...] | None = None, given: int = NO_SPLIT) -> ImageIndex:
    """Return 60 images of three classes in turn."""
    return ImageIndex(
        classes=("a", "b", "c"),
        names=tuple(f"{row:03d}" for row in range(N_IMAGES)),
        labels=np.arange(N_IMAGES) % N_CLASSES,
        given_splits=np.full(N_IMAGES, given, dtype=np.int8),
        stamps=("",) * N_IMAGES,
        open_image=open_nothing,
        groups=groups,
    )


def make_images(index: ImageIndex, rows: list[int]) -> ImageSet:
    """Return images whose pixels are their row."""
    return ImageSet(
        pixels=torch.tensor(rows, dtype=torch.uint8)[:, None, None, None].expand(-1, 3, 2, 2).contiguous(),
        labels=torch.from_numpy(index.labels[rows]),
        n_classes=len(index.classes),
        rows=torch.tensor(rows),
    )


def cut(index: ImageIndex, fold: int, *, order: int = 0, seed: int = 0) -> tuple[ImageSet, ImageSet]:
    """Cut the images, which lie in some order."""
    rows = np.random.default_rng(order).permutation(N_IMAGES).tolist()
    return cut_fold(make_images(index, rows), Repeat(seed=0, n_folds=N_FOLDS, fold=fold, cut_seed=seed), index)


def take_pixels(images: ImageSet) -> list[int]:
    """Return what batches show: the row that each image's pixels say."""
    pixels, _ = take_batch(images, torch.arange(len(images.labels)), torch.device("cpu"))
    return (pixels[:, 0, 0, 0] * 255).round().int().tolist()


def test_folds_validate_every_image_once_and_train_on_all_others() -> None:
    """No image is on both sides of a fold; pixels, labels and rows stay together; classes stay even."""
    index = make_index()
    seen = []
    for fold in range(N_FOLDS):
        train, val = cut(index, fold)
        assert sorted([*train.rows.tolist(), *val.rows.tolist()]) == list(range(N_IMAGES))
        for part in (train, val):
            assert take_pixels(part) == part.rows.tolist()
            assert part.labels.tolist() == index.labels[part.rows].tolist()
        assert torch.bincount(val.labels).tolist() == [N_IMAGES // N_FOLDS // N_CLASSES] * N_CLASSES
        seen += val.rows.tolist()
    assert sorted(seen) == list(range(N_IMAGES))


def test_folds_depend_on_the_seed_alone() -> None:
    """The order of the images does not matter, and another seed cuts otherwise."""
    index = make_index()
    one, same, other = (sorted(cut(index, 0, **how)[1].rows.tolist()) for how in ({}, {"order": 30}, {"seed": 1}))
    assert one == same
    assert one != other
    rows = np.random.default_rng(0).permutation(N_IMAGES)
    mask = find_fold(rows, index.labels[rows], None, Repeat(seed=9, n_folds=N_FOLDS, cut_seed=0))
    assert sorted(rows[mask].tolist()) == one


def test_folds_keep_groups_whole() -> None:
    """A patient is on one side only."""
    groups = tuple(f"patient {row // 6}" for row in range(N_IMAGES))
    index = make_index(groups=groups)
    for fold in range(N_FOLDS):
        train, val = cut(index, fold)
        sides = [{groups[row] for row in part.rows.tolist()} for part in (train, val)]
        assert sides[1]
        assert not sides[0] & sides[1]


def test_cut_fold_refuses_to_train_without_a_class() -> None:
    """All images of a class in one group cannot be on both sides."""
    groups = tuple("c" if row % N_CLASSES == 2 else f"{row}" for row in range(N_IMAGES))
    index = make_index(groups=groups)
    with pytest.raises(DataError, match=r"^data\.path: the folds that train must hold every class, got none of 'c'"):
        _ = [cut(index, fold) for fold in range(N_FOLDS)]


def test_check_folds_names_the_smallest_class() -> None:
    """Before anything is trained, in one line."""
    index, splits = make_index(), np.full(N_IMAGES, Split.TRAIN, dtype=np.int8)
    check_folds(index, splits, 20)
    with pytest.raises(DataError, match=r"^data\.folds: must not exceed the images of .* got 21 with 20 of 'a'"):
        check_folds(index, splits, 21)


def test_max_folds_are_none_where_val_is_given() -> None:
    """A given val stays apart; else the largest class, or with groups the smallest, says how far to go."""
    splits = np.full(N_IMAGES, Split.TRAIN, dtype=np.int8)
    assert count_max_folds(make_index(), splits) == 20
    assert count_max_folds(make_index(given=Split.VAL), splits) == 0
    assert count_max_folds(make_index(groups=tuple(str(row // 15) for row in range(N_IMAGES))), splits) == 4
