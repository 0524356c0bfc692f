"""Tests of tuner.data.source_folder."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tuner.data.index import NO_SPLIT, Split
from tuner.data.source_folder import read_image_folder
from tuner.errors import DataError
from tuner.spec.sections import DataSection


def write_images(root: Path, *names: str) -> None:
    """Write one small image per name."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4)).save(path)


def make_section(path: Path) -> DataSection:
    """Return a section that reads a folder."""
    return DataSection(source="image_folder", path=str(path))


def test_read_image_folder_lists_class_folders(tmp_path: Path) -> None:
    """Classes are sorted by name, and sub-folders belong to their class."""
    write_images(tmp_path, "dog/1.png", "cat/b/2.JPG", "cat/a.webp")
    index = read_image_folder(make_section(tmp_path))
    assert index.classes == ("cat", "dog")
    assert index.names == ("cat/a.webp", "cat/b/2.JPG", "dog/1.png")
    assert index.labels.tolist() == [0, 0, 1]
    assert set(index.given_splits) == {NO_SPLIT}
    assert index.stamps[2] == str((tmp_path / "dog/1.png").stat().st_size)
    with index.open_image(2) as image:
        assert image.size == (4, 4)


def test_read_image_folder_ignores_what_is_no_image(tmp_path: Path) -> None:
    """Hidden files and folders, other suffixes and files beside the class folders do not count."""
    write_images(tmp_path, "dog/1.png", "cat/1.png", "cat/._1.png", "cat/.thumbs/1.png", ".git/1.png", "logo.png")
    (tmp_path / "dog/notes.txt").write_text("a dog")
    assert read_image_folder(make_section(tmp_path)).names == ("cat/1.png", "dog/1.png")


def test_read_image_folder_takes_unicode_names(tmp_path: Path) -> None:
    """Names of files and classes may hold any characters."""
    write_images(tmp_path, "猫/naïve 1.png", "Ärger/☃.png")
    assert read_image_folder(make_section(tmp_path)).classes == ("Ärger", "猫")


@pytest.mark.parametrize(("val", "test"), [("val", "test"), ("Validation", "testing"), ("valid", "TEST")])
def test_read_image_folder_reads_given_splits(tmp_path: Path, val: str, test: str) -> None:
    """Split folders give the splits under all their usual names."""
    write_images(tmp_path, *(f"{split}/{name}/1.png" for split in ("train", val, test) for name in ("cat", "dog")))
    index = read_image_folder(make_section(tmp_path))
    splits = {Path(name).parts[0]: split for name, split in zip(index.names, index.given_splits, strict=True)}
    assert splits == {"train": Split.TRAIN, val: Split.VAL, test: Split.TEST}
    assert [bool(stamp) for stamp in index.stamps] == (index.given_splits != Split.TEST).tolist()


def test_read_image_folder_does_not_look_at_test_files(tmp_path: Path) -> None:
    """Test images that lead nowhere do no harm, since only their names are read."""
    write_images(tmp_path, "train/cat/1.png", "train/dog/1.png")
    for name in ("cat", "dog"):
        (tmp_path / "test" / name).mkdir(parents=True)
        (tmp_path / "test" / name / "1.png").symlink_to("nowhere")
    index = read_image_folder(make_section(tmp_path))
    assert np.bincount(index.given_splits).tolist() == [2, 0, 2]


BAD_FOLDERS = {
    "one class": (["cat/1.png"], r"must hold at least two class folders, got one in '.*': 'cat'$"),
    "wrapper": (
        ["images/cat/1.png", "images/dog/1.png"],
        r"got '.*', where the only folder 'images' wraps 'cat', 'dog'; set path to '.*/images'$",
    ),
    "two wrappers": (["a/b/cat/1.png", "a/b/dog/1.png"], r"the only folder 'a' wraps .*; set path to '.*/a/b'$"),
    "wrapped splits": (
        ["pets/train/cat/1.png", "pets/train/dog/1.png"],
        r"must hold class folders or train/, val/ and test/, .* 'pets' holds them; set path to '.*/pets'$",
    ),
    "two data sets": (
        ["flowers/train/a/1.png", "pets/train/cat/1.png"],
        r"'flowers' holds them; set path to '.*/flowers'$",
    ),
    "wrapper in train": (
        ["train/images/cat/1.png", "train/images/dog/1.png"],
        r"the only folder 'images' wraps 'cat', 'dog'; set path to '.*/train/images'$",
    ),
    "no folder": (["1.png", "2.png"], r"must hold one folder per class, got '.*' with 2 images and no folder; if this"),
    "mixed": (["train/cat/1.png", "cat/1.png"], r"got both: 'train' beside 'cat'$"),
    "only test": (["test/cat/1.png", "test/dog/1.png"], r"must hold a folder train/ .*, got only 'test'$"),
    "two names of val": (
        ["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "valid/cat/1.png"],
        r"must hold one folder per split, got 'train', 'val', 'valid'$",
    ),
    "class not in train": (
        ["train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/emu/1.png"],
        r"val must hold classes of train only, got 'emu'$",
    ),
    "test class not in train": (
        ["train/cat/1.png", "train/dog/1.png", "test/emu/1.png"],
        r"test must hold classes of train only, got 'emu'$",
    ),
    "one class in train": (["train/cat/1.png", "val/cat/1.png"], r"at least two class folders, got one in '.*/train'"),
}


@pytest.mark.parametrize(("names", "message"), BAD_FOLDERS.values(), ids=BAD_FOLDERS)
def test_read_image_folder_refuses_a_wrong_layout(tmp_path: Path, names: list[str], message: str) -> None:
    """Each wrong layout is named, with the path to set where there is one."""
    write_images(tmp_path, *names)
    with pytest.raises(DataError, match=r"^data\.path: .*" + message):
        read_image_folder(make_section(tmp_path))


def test_read_image_folder_names_empty_class_folders(tmp_path: Path) -> None:
    """A class folder without images is an error, since a class without images cannot be learnt."""
    write_images(tmp_path, "cat/1.png", "dog/1.png")
    (tmp_path / "bird").mkdir()
    (tmp_path / "bird/1.heic").touch()
    with pytest.raises(DataError, match=r"^data.path: every class folder must hold images, got none in 'bird'; images"):
        read_image_folder(make_section(tmp_path))


def test_read_image_folder_refuses_what_is_no_folder(tmp_path: Path) -> None:
    """A missing path, a file and an empty folder are told apart."""
    with pytest.raises(DataError, match=r"^data.path: must be an existing folder, got '.*/nowhere'$"):
        read_image_folder(make_section(tmp_path / "nowhere"))
    (tmp_path / "list.csv").touch()
    with pytest.raises(
        DataError, match=r"^data.path: must be a folder, got the file '.*'; source = 'csv' reads tables$"
    ):
        read_image_folder(make_section(tmp_path / "list.csv"))
    with pytest.raises(DataError, match=r"^data.path: must hold one folder per class, got '.*' with 0 images and no f"):
        read_image_folder(make_section(tmp_path))


def test_read_image_folder_lists_pipes_as_images(tmp_path: Path) -> None:
    """They are listed without waiting for a writer, and are bad images as soon as somebody opens them."""
    for split in ("train", "val", "test"):
        write_images(tmp_path, *(f"{split}/{name}/1.png" for name in ("cat", "dog")))
        os.mkfifo(tmp_path / split / "cat" / "2.png")
        (tmp_path / split / "dog" / "2.png").symlink_to("/dev/zero")
    index = read_image_folder(make_section(tmp_path))
    problems = {}
    for row, name in enumerate(index.names):
        try:
            with index.open_image(row):
                pass
        except OSError as error:
            problems[name] = str(error)
    assert problems == {
        f"{split}/{name}/2.png": f"must be a file, got a {kind}"
        for split in ("test", "train", "val")
        for name, kind in (("cat", "pipe"), ("dog", "device"))
    }
