"""Cut the images into train, val and test: stratified and seeded, and never a split that the data already gives."""

import base64
import json
import zlib
from hashlib import sha256

import numpy as np
from numpy.typing import NDArray

from tuner.data.group_splits import check_given_groups, cut_groups
from tuner.data.index import ImageIndex, Split, join_indexes, preview
from tuner.errors import DataError
from tuner.spec.sections import DataSection

_MAX_IMAGES = 100_000_000


def cut_splits(index: ImageIndex, section: DataSection, seed: int) -> NDArray[np.int8]:
    """Return the split of each image.

    A given split stays. A missing val split, and a missing test split if ``test_fraction`` is set, are cut from the
    train images: these shares of each class, and at least one image. Groups stay whole, which the shares then follow
    as well as they can.

    Args:
        index: The images.
        section: Its ``val_fraction`` and ``test_fraction``.
        seed: The same seed cuts the same images in the same way.

    Returns:
        Shape ``(n_images,)``, each a ``Split``.

    Raises:
        DataError: If a class has fewer images, or groups, than there are splits to fill, a given val split lacks a
            class, or given splits tear a group apart.
    """
    given = index.given_splits
    shares: dict[Split, float] = {}
    if cuts_val(index):
        shares[Split.VAL] = section.val_fraction
    if section.test_fraction is not None and not has_test(index, given):
        shares[Split.TEST] = section.test_fraction
    splits = np.where(given < 0, np.int8(Split.TRAIN), given).astype(np.int8)
    generator = np.random.default_rng(seed)
    if index.groups is not None:
        check_given_groups(index)
        rows = np.flatnonzero(splits == Split.TRAIN)
        splits[rows] = cut_groups(index, rows, shares, generator) if shares else Split.TRAIN
        check_classes(index, splits)
        return splits
    for label, name in enumerate(index.classes):
        rows = generator.permutation(np.flatnonzero((splits == Split.TRAIN) & (index.labels == label)))
        start = 0
        for split, count in _count_images(name, len(rows), shares).items():
            splits[rows[start : start + count]] = split
            start += count
    check_classes(index, splits)
    return splits


def _count_images(class_name: str, n_images: int, shares: dict[Split, float]) -> dict[Split, int]:
    """Return how many images of a class go to each new split; at least one, and one stays for train."""
    if n_images <= len(shares):
        filled = ", ".join(split.name.lower() for split in (Split.TRAIN, *shares))
        raise DataError(
            f"data.path: each class must have at least one image for each of {filled}, got {n_images} of {class_name!r}"
        )
    counts = {split: max(1, int(n_images * share + 0.5)) for split, share in shares.items()}
    while sum(counts.values()) >= n_images:
        counts[max(counts, key=lambda split: counts[split])] -= 1
    return counts


def check_classes(index: ImageIndex, splits: NDArray[np.int8]) -> None:
    """Check that train and val hold every class.

    Args:
        index: The images.
        splits: Their splits; an image that cannot be used is left out with a value that is no ``Split``.

    Raises:
        DataError: If one lacks a class.
    """
    for split in (Split.TRAIN, Split.VAL):
        counts = np.bincount(index.labels[splits == split], minlength=len(index.classes))
        if lacking := [index.classes[label] for label in np.flatnonzero(counts == 0)]:
            where = split.name.lower()
            raise DataError(
                f"data.path: {where} must hold a usable image of every class, got none of {preview(lacking)}"
            )


def search_rows(splits: NDArray[np.int8]) -> NDArray[np.int64]:
    """Return the rows that a search may open: train, then val, so that each is one stretch of a store."""
    return np.concatenate([np.flatnonzero(splits == split) for split in (Split.TRAIN, Split.VAL)])


def cuts_val(index: ImageIndex) -> bool:
    """Whether val is cut from the train images; else the data gives it."""
    return not (index.given_splits == Split.VAL).any()


def has_test(index: ImageIndex, splits: NDArray[np.int8]) -> bool:
    """Whether there is a test split, cut or given, listed or not."""
    return index.read_test is not None or bool((splits == Split.TEST).any())


def unlock_test(index: ImageIndex, splits: NDArray[np.int8]) -> tuple[ImageIndex, NDArray[np.int8]]:
    """Return index and splits with a test split that has not been listed yet. Not for the search.

    Raises:
        DataError: If it cannot be read.
    """
    if index.read_test is None:
        return index, splits
    test = index.read_test()
    joined = np.concatenate([splits, np.full(len(test.names), Split.TEST, dtype=np.int8)])
    return join_indexes(index, test), joined


def hash_data(index: ImageIndex, splits: NDArray[np.int8]) -> str:
    """Return a SHA-256 of classes, names, labels, splits and stamps; stamps of TEST images are left out."""
    stamps = ["" if split == Split.TEST else stamp for stamp, split in zip(index.stamps, splits, strict=True)]
    texts = json.dumps([index.classes, index.names, stamps])
    return sha256(texts.encode() + index.labels.astype("<i8").tobytes() + splits.astype("<i1").tobytes()).hexdigest()


def pack_splits(splits: NDArray[np.int8]) -> str:
    """Return the splits as short text, to be kept with the study."""
    return base64.b64encode(zlib.compress(splits.astype(np.int8).tobytes())).decode()


def unpack_splits(text: str, max_images: int = _MAX_IMAGES) -> NDArray[np.int8]:
    """Read what ``pack_splits`` wrote.

    Args:
        text: What it returned, or what a database holds in place of it.
        max_images: More are not unpacked: a short text can stand for gigabytes.

    Raises:
        ValueError: If it is something else, or of more images.
    """
    unpacker = zlib.decompressobj()
    try:
        unpacked = unpacker.decompress(base64.b64decode(text, validate=True), max_length=max_images + 1)
    except zlib.error as error:
        raise ValueError("splits must be packed by zlib") from error
    if not unpacker.eof or len(unpacked) > max_images:
        raise ValueError(f"splits must be those of at most {max_images} images")
    return np.frombuffer(unpacked, dtype=np.int8).copy()
