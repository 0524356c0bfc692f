"""Tests of tuner.data.image_set."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from tuner.data.image_set import ImageSet, choose_residence, load_image_set, move_to
from tuner.data.index import ImageIndex, Split
from tuner.data.locks import is_mapped
from tuner.errors import DataError
from tuner.spec.sections import DataSection


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Keep the cache in the test's folder."""
    monkeypatch.setenv("TUNER_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


SECTION = DataSection(source="digits", image_size=8, max_bad_fraction=0.5)
SPLITS = np.array([0, 1, 2, 0, 0, 1, 2, 0], dtype=np.int8)


def make_index(unusable: tuple[int, ...] = ()) -> ImageIndex:
    """Return eight grey images of two classes in turn, whose value is their row; unusable ones cannot be opened."""

    def open_image(row: int) -> Image.Image:
        if row in unusable:
            raise OSError("broken")
        return Image.new("L", (8, 8), row)

    return ImageIndex(
        classes=("a", "b"),
        names=tuple(f"{row}" for row in range(8)),
        labels=np.array([0, 1, 0, 1, 0, 0, 1, 1]),
        given_splits=SPLITS,
        stamps=tuple(f"{row}{unusable}" for row in range(8)),
        open_image=open_image,
    )


def load(index: ImageIndex, *which: Split) -> ImageSet:
    """Load some splits."""
    return load_image_set(index, SPLITS, SECTION, which, interpolation="nearest")


@pytest.mark.parametrize(
    ("which", "rows"),
    [
        ((Split.TRAIN,), [0, 3, 4, 7]),
        ((Split.VAL,), [1, 5]),
        ((Split.TRAIN, Split.VAL), [0, 3, 4, 7, 1, 5]),
        ((Split.VAL, Split.TRAIN), [1, 5, 0, 3, 4, 7]),
        ((Split.TEST,), [2, 6]),
        ((Split.TEST, Split.VAL), [2, 6, 1, 5]),
    ],
)
def test_load_image_set_takes_the_splits_asked_for(which: tuple[Split, ...], rows: list[int]) -> None:
    """Pixels and labels belong together, in the order of the splits."""
    index = make_index()
    images = load(index, *which)
    assert images.pixels[:, 0, 0, 0].tolist() == rows
    assert images.labels.tolist() == index.labels[rows].tolist()
    assert images.pixels.dtype == torch.uint8
    assert images.labels.dtype == torch.int64
    assert images.n_classes == 2


def test_load_image_set_never_opens_test_for_the_search() -> None:
    """With broken test files, train and val load as before, from one store."""
    index = make_index(unusable=(2, 6))
    assert len(load(index, Split.TRAIN).labels) == 4
    assert len(load(index, Split.VAL).labels) == 2
    with pytest.raises(DataError, match=r"^data.max_bad_fraction: .* got 2 of 2: 2 \(broken\), 6 \(broken\)$"):
        load(index, Split.TEST)


def test_load_image_set_decodes_train_and_val_together(cache: Path) -> None:
    """The search decodes once: train, val and both come from one file."""
    for which in ((Split.TRAIN,), (Split.VAL,), (Split.TRAIN, Split.VAL)):
        load(make_index(), *which)
    assert len(list((cache / "pixels").glob("*.npy"))) == 1


def test_load_image_set_leaves_bad_images_out() -> None:
    """Labels stay with their images when some are bad."""
    images = load(make_index(unusable=(3,)), Split.TRAIN)
    assert images.pixels[:, 0, 0, 0].tolist() == [0, 4, 7]
    assert images.labels.tolist() == [0, 0, 1]


@pytest.mark.parametrize(("unusable", "where"), [((1,), "val"), ((3, 7), "train")])
def test_load_image_set_refuses_a_class_whose_images_are_all_bad(unusable: tuple[int, ...], where: str) -> None:
    """Train and val must keep every class, whichever of them is loaded."""
    with pytest.raises(
        DataError, match=f"^data.path: {where} must hold a usable image of every class, got none of 'b'$"
    ):
        load(make_index(unusable), Split.TRAIN)


def test_load_image_set_gives_a_writable_view(cache: Path) -> None:
    """A write by mistake neither crashes nor reaches the cache."""
    load(make_index(), Split.TRAIN).pixels.fill_(200)
    assert load(make_index(), Split.TRAIN).pixels.max() == 7


@pytest.mark.parametrize("which", [(Split.TRAIN,), (Split.VAL,), (Split.TRAIN, Split.VAL), (Split.TEST,)])
def test_load_image_set_copies_nothing(cache: Path, which: tuple[Split, ...]) -> None:
    """What the CPU trains on is the map itself, so data larger than the memory is no trouble."""
    images = move_to(load(make_index(), *which), torch.device("cpu", 0))
    (path,) = (cache / "pixels").glob("*.npy")
    assert is_mapped(path)
    del images
    assert not is_mapped(path)


@pytest.mark.parametrize(("n_bytes", "expected"), [(400, "device"), (401, "pinned"), (800, "pinned"), (801, "mapped")])
def test_choose_residence_prefers_the_fastest_memory_with_room(n_bytes: int, expected: str) -> None:
    """On the device up to 40 % of what is free there, then pinned up to 40 % of what the host has, then mapped."""
    assert choose_residence(n_bytes, device_bytes=1000, host_bytes=2000) == expected


def test_choose_residence_pins_nothing_where_memory_is_unknown() -> None:
    """A system that does not say what is left gets no pinned copy."""
    assert choose_residence(1, device_bytes=0, host_bytes=0) == "mapped"


def test_move_to_stays_where_it_is() -> None:
    """Images that are on the device already are returned as they are."""
    images = load(make_index(), Split.VAL)
    assert move_to(images, torch.device("cpu")) is images


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_move_to_moves_what_fits() -> None:
    """A small set lies on the device, with its labels."""
    images = move_to(load(make_index(), Split.VAL), torch.device("cuda", 0))
    assert images.pixels.is_cuda
    assert images.labels.is_cuda
