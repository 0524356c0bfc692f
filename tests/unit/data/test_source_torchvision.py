"""Tests of tuner.data.source_torchvision, on data sets written by hand."""

import pickle
import struct
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tuner.data.index import NO_SPLIT, ImageIndex, Split, select_classes
from tuner.data.source_torchvision import DATASETS, _find_class, read_torchvision
from tuner.data.splits import cut_splits, has_test, unlock_test
from tuner.errors import DataError
from tuner.spec.sections import DataSection


def make_section(path: Path, dataset: str = "FashionMNIST") -> DataSection:
    """Return a section that reads a torchvision data set."""
    return DataSection(source="torchvision", path=str(path), dataset=dataset)


def write_idx(root: Path, prefix: str, labels: list[int]) -> None:
    """Write the images and labels of one Fashion-MNIST split; an image's pixels are all its row."""
    folder = root / "FashionMNIST" / "raw"
    folder.mkdir(parents=True, exist_ok=True)
    pixels = np.repeat(np.arange(len(labels), dtype=np.uint8), 28 * 28)
    header = struct.pack(">IIII", 0x803, len(labels), 28, 28)
    (folder / f"{prefix}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    (folder / f"{prefix}-labels-idx1-ubyte").write_bytes(struct.pack(">II", 0x801, len(labels)) + bytes(labels))


def write_dtd(root: Path, splits: dict[str, list[str]]) -> None:
    """Write a Describable Textures Dataset from the image names of each split."""
    for split, names in splits.items():
        (root / "dtd/dtd/labels").mkdir(parents=True, exist_ok=True)
        (root / f"dtd/dtd/labels/{split}1.txt").write_text("\n".join(names))
        for name in names:
            path = root / "dtd/dtd/images" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (4, 4)).save(path)


def read_value(index: ImageIndex, row: int) -> object:
    """Return the first pixel of an image."""
    with index.open_image(row) as image:
        return image.getpixel((0, 0))


def test_read_torchvision_reads_arrays(tmp_path: Path) -> None:
    """Classes are named by the data set and sorted, and each row opens its image."""
    write_idx(tmp_path, "train", [0, 9, 0, 1])
    index = read_torchvision(make_section(tmp_path))
    assert index.classes == ("Ankle boot", "T-shirt/top", "Trouser")
    assert index.labels.tolist() == [1, 0, 1, 2]
    assert index.names[:2] == ("train/000000", "train/000001")
    assert [read_value(index, row) for row in range(4)] == [0, 1, 2, 3]
    assert len(set(index.stamps)) == 4


def test_read_torchvision_leaves_the_test_split_alone_until_it_is_unlocked(tmp_path: Path) -> None:
    """The search works without test files, and unlocking adds them at the end."""
    write_idx(tmp_path, "train", [0, 0, 1, 1, 2, 2])
    section = make_section(tmp_path).model_copy(update={"test_fraction": 0.2})
    index = select_classes(read_torchvision(section), ["Trouser", "T-shirt/top"])
    splits = cut_splits(index, section, seed=0)
    assert np.bincount(splits).tolist() == [2, 2]
    assert has_test(index, splits)
    write_idx(tmp_path, "t10k", [1, 2, 0])
    unlocked, all_splits = unlock_test(index, splits)
    assert all_splits[4:].tolist() == [Split.TEST, Split.TEST]
    assert unlocked.names[4:] == ("test/000000", "test/000002")
    assert unlocked.labels[4:].tolist() == [0, 1]
    assert read_value(unlocked, 5) == 2


def test_read_torchvision_keeps_given_splits_of_files(tmp_path: Path) -> None:
    """A data set of files gives its val split, and labels agree across splits that lack a class."""
    splits = {"train": ["a/1.jpg", "b/1.jpg", "c/1.jpg"], "val": ["b/2.jpg", "c/2.jpg"], "test": ["c/3.jpg"]}
    write_dtd(tmp_path, splits)
    index = read_torchvision(make_section(tmp_path, "DTD"))
    assert index.given_splits.tolist() == [Split.TRAIN] * 3 + [Split.VAL] * 2
    assert index.labels.tolist() == [0, 1, 2, 1, 2]
    with index.open_image(4) as image:
        assert image.size == (4, 4)
    assert index.stamps[0] == str((tmp_path / "dtd/dtd/images/a/1.jpg").stat().st_size)
    unlocked, _ = unlock_test(index, index.given_splits)
    assert unlocked.labels[-1] == 2


def test_read_torchvision_refuses_a_class_that_train_lacks(tmp_path: Path) -> None:
    """A val class without train images cannot be learnt."""
    write_dtd(tmp_path, {"train": ["a/1.jpg", "b/1.jpg"], "val": ["z/2.jpg"]})
    with pytest.raises(DataError, match=r"^data.path: val must hold classes of train only, got 'z'$"):
        read_torchvision(make_section(tmp_path, "DTD"))


def test_read_torchvision_reads_a_data_set_without_splits(tmp_path: Path) -> None:
    """Where the data set has no splits, none is given."""
    for name in ("Forest", "River"):
        (tmp_path / "eurosat/2750" / name).mkdir(parents=True)
        Image.new("RGB", (4, 4)).save(tmp_path / "eurosat/2750" / name / "1.jpg")
    index = read_torchvision(make_section(tmp_path, "EuroSAT"))
    assert index.given_splits.tolist() == [NO_SPLIT, NO_SPLIT]
    assert not has_test(index, index.given_splits)


def test_read_torchvision_suggests_a_known_data_set() -> None:
    """A misspelt data set is met with the closest one."""
    with pytest.raises(DataError, match=r"^data.dataset: must be one of CIFAR10, .*; did you mean 'FashionMNIST'\?$"):
        read_torchvision(make_section(Path("x"), "FashonMNIST"))


def test_read_torchvision_says_where_files_belong(tmp_path: Path) -> None:
    """Without files and without a download, one line says where to put them."""
    (tmp_path / "file").touch()  # no folder can be made here, so that the download fails without a network too
    message = r"^data.path: must hold torchvision's FashionMNIST, got neither .*; put .* at '.*/FashionMNIST/raw'$"
    with pytest.raises(DataError, match=message) as caught:
        read_torchvision(make_section(tmp_path / "file"))
    assert "\n" not in str(caught.value)


def test_datasets_exist_in_torchvision() -> None:
    """The table names classes that torchvision has."""
    from torchvision import datasets

    assert set(DATASETS) <= set(datasets.__all__)


def test_read_torchvision_unpickles_nothing_but_the_published_files(tmp_path: Path) -> None:
    """CIFAR's files are pickles: torchvision compares their checksums first, and others' run no code."""
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    for name in ("batches.meta", "test_batch", *(f"data_batch_{number}" for number in range(1, 6))):
        (folder / name).write_bytes(f"cos\nmkdir\n(S'{tmp_path}/ran'\ntR.".encode())
    with pytest.raises(RuntimeError, match="not found or corrupted"):
        _find_class("CIFAR10", Split.TRAIN)(root=str(tmp_path))
    assert not (tmp_path / "ran").exists()
    pickle.loads((folder / "test_batch").read_bytes())  # noqa: S301 - the trap works
    assert (tmp_path / "ran").exists()
