"""Wrong data: each mistake with its exact message and exit code."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.e2e.mistakes import Mistake, expect, fail, replace_images, write, write_images, write_study

IS_ROOT = os.geteuid() == 0
CSV = (('source = "image_folder"', 'source = "csv"'), ('"images"', '"table.csv"'))
PAIR = [f"{name}/{number}.png" for name in ("cat", "dog") for number in range(3)]
MISTAKES = [
    Mistake(
        what="missing folder",
        edits=(('"images"', '"imagse"'),),
        problem="data.path: must be an existing folder, got 'FOLDER/imagse'",
    ),
    Mistake(
        what="file for folder",
        edits=(('"images"', '"images/cat/0.png"'),),
        problem="data.path: must be a folder, got the file 'FOLDER/images/cat/0.png'",
    ),
    Mistake(
        what="empty folder",
        edits=(('"images"', '"empty"'),),
        prepare=lambda folder: (folder / "empty").mkdir(),
        problem="data.path: must hold one folder per class, got 'FOLDER/empty' with 0 images and no folder",
    ),
    Mistake(
        what="empty class",
        prepare=lambda folder: (folder / "images/bird").mkdir(),
        problem="data.path: every class folder must hold images, got none in 'bird'; "
        "images end in .jpg, .png, .bmp, .gif, .tif, .webp or the like",
    ),
    Mistake(
        what="one class",
        prepare=replace_images("cat/0.png", "cat/1.png"),
        problem="data.path: must hold at least two class folders, got one in 'FOLDER/images': 'cat'",
    ),
    Mistake(
        what="one class folder itself",
        edits=(('"images"', '"images/cat"'),),
        problem="data.path: must hold one folder per class, got 'FOLDER/images/cat' with 6 images and no folder; "
        "if this folder is one class, set path to 'FOLDER/images'",
    ),
    Mistake(
        what="one folder too high",
        edits=(('"images"', '"."'),),
        problem="data.path: must hold at least two class folders, got 'FOLDER', where the only folder 'images' wraps "
        "'cat', 'dog'; set path to 'FOLDER/images'",
    ),
    Mistake(
        what="splits one folder too high",
        prepare=replace_images(*(f"pets/{split}/{name}" for split in ("train", "val") for name in PAIR)),
        problem="data.path: must hold class folders or train/, val/ and test/, got 'FOLDER/images', "
        "where 'pets' holds them; set path to 'FOLDER/images/pets'",
    ),
    Mistake(
        what="splits beside classes",
        prepare=lambda folder: write_images(folder / "images/train", *PAIR),
        problem="data.path: must hold either class folders or train/, val/ and test/, got both: "
        "'train' beside 'cat', 'dog'",
    ),
    Mistake(
        what="no train split",
        prepare=replace_images(*(f"val/{name}" for name in PAIR)),
        problem="data.path: must hold a folder train/ beside the other splits, got only 'val'",
    ),
    Mistake(
        what="class in val only",
        prepare=replace_images(*(f"train/{name}" for name in PAIR), "val/bird/0.png"),
        problem="data.path: val must hold classes of train only, got 'bird'",
    ),
    Mistake(
        what="class missing in val",
        prepare=replace_images(*(f"train/{name}" for name in PAIR), "val/cat/0.png"),
        problem="data.path: val must hold a usable image of every class, got none of 'dog'",
    ),
    Mistake(
        what="fewer images than splits",
        edits=(("image_size = 16", "image_size = 16\ntest_fraction = 0.2"),),
        prepare=replace_images(*PAIR, "bird/0.png", "bird/1.png"),
        problem="data.path: each class must have at least one image for each of train, val, test, got 2 of 'bird'",
    ),
    Mistake(
        what="unknown class",
        edits=(("image_size = 16", 'classes = ["cat", "dgo"]'),),
        problem="data.classes: must name classes of the data, got 'dgo'; did you mean 'dog'?",
    ),
    Mistake(
        what="csv missing",
        edits=CSV,
        problem="data.path: must be an existing csv file, got 'FOLDER/table.csv'",
    ),
    Mistake(
        what="csv is a folder",
        edits=CSV[:1],
        problem="data.path: must be a csv file, got the folder 'FOLDER/images'; source = 'image_folder' reads folders",
    ),
    Mistake(
        what="csv empty",
        edits=CSV,
        prepare=write("table.csv", ""),
        problem="data.path: must have a header with the columns path and label, got an empty file",
    ),
    Mistake(
        what="csv column missing",
        edits=CSV,
        prepare=write("table.csv", "file,label\nimages/cat/0.png,cat\n"),
        problem="data.path: must have the columns path and label, and split if splits are given; "
        "got no 'path', but 'file', 'label'",
    ),
    Mistake(
        what="csv label missing",
        edits=CSV,
        prepare=write("table.csv", "path,label\nimages/cat/0.png,cat\nimages/dog/0.png,\n"),
        problem="data.path: line 3: label must not be empty, got ''",
    ),
    Mistake(
        what="csv file missing",
        edits=CSV,
        prepare=write("table.csv", "path,label\nimages/cat/0.png,cat\nimages/dog/9.png,dog\n"),
        problem="data.path: paths must be files, relative to the table, got no file at 'images/dog/9.png' (line 3)",
    ),
    Mistake(
        what="csv unknown split",
        edits=CSV,
        prepare=write("table.csv", "path,label,split\nimages/cat/0.png,cat,dev\n"),
        problem="data.path: line 2: split must be train, val or test, got 'dev'",
    ),
    Mistake(
        what="csv group column missing",
        edits=(*CSV, ("image_size = 16", 'group = "patiant"')),
        prepare=write("table.csv", "path,label,patient\nimages/cat/0.png,cat,1\n"),
        problem="data.group: must be a column of the table, got 'patiant'; did you mean 'patient'?",
    ),
    Mistake(
        what="csv group empty",
        edits=(*CSV, ("image_size = 16", 'group = "patient"')),
        prepare=write("table.csv", "path,label,patient\nimages/cat/0.png,cat,1\nimages/cat/1.png,cat\n"),
        problem="data.path: line 3: patient must not be empty, got ''",
    ),
    Mistake(
        what="csv group column twice",
        edits=(*CSV, ("image_size = 16", 'group = "patient"')),
        prepare=write("table.csv", "path,label,patient,patient\nimages/cat/0.png,cat,1,1\n"),
        problem="data.path: must have each column once, got 'patient' in 'path', 'label', 'patient', 'patient'",
    ),
    Mistake(
        what="csv group torn",
        edits=(*CSV, ("image_size = 16", 'group = "patient"')),
        prepare=write(
            "table.csv",
            "path,label,split,patient\nimages/cat/0.png,cat,train,7\nimages/cat/1.png,cat,val,7\n"
            "images/dog/0.png,dog,train,8\nimages/dog/1.png,dog,val,9\n",
        ),
        problem="data.group: each group must stand in one split, got '7' in train and val; correct the split column, "
        "or leave it out and the groups are cut whole",
    ),
    Mistake(
        what="csv too few groups",
        edits=(*CSV, ("image_size = 16", 'group = "patient"')),
        prepare=write(
            "table.csv",
            "path,label,patient\nimages/cat/0.png,cat,7\nimages/cat/1.png,cat,7\n"
            "images/dog/0.png,dog,8\nimages/dog/1.png,dog,9\n",
        ),
        problem="data.group: each class must have at least one group for each of train, val, got 1 of 'cat'",
    ),
    Mistake(
        what="csv path twice",
        edits=CSV,
        prepare=write("table.csv", "path,label\nimages/cat/0.png,cat\nimages/cat/../cat/0.png,dog\n"),
        problem="data.path: line 3: each path must stand once, got 'images/cat/0.png' as in line 2",
    ),
    Mistake(
        what="csv one class",
        edits=CSV,
        prepare=write("table.csv", "path,label\nimages/cat/0.png,cat\nimages/cat/1.png,cat\n"),
        problem="data.path: must hold at least two classes, got one: 'cat'",
    ),
    Mistake(
        what="csv of a spreadsheet",
        edits=CSV,
        prepare=write("table.csv", "path,label\n".encode("utf-16")),
        problem="data.path: must be a csv file in UTF-8, got other bytes in 'FOLDER/table.csv'",
    ),
    Mistake(
        what="csv below a file",
        edits=(CSV[0], ('"images"', '"images/cat/0.png/table.csv"')),
        problem="data.path: must be a readable csv file, got 'FOLDER/images/cat/0.png/table.csv' (Not a directory)",
    ),
]


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.what)
def test_check_refuses_wrong_data(folder: Path, capsys: pytest.CaptureFixture[str], mistake: Mistake) -> None:
    """A mistake in folders and tables is found without opening an image."""
    study_file = write_study(folder, *mistake.edits)
    mistake.prepare(folder)
    assert fail(capsys, "check", study_file) == (5, expect(folder, mistake.problem))


@pytest.mark.skipif(IS_ROOT, reason="root may enter every folder")
def test_check_refuses_a_folder_that_may_not_be_entered(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The folder that stops the search is named."""
    (folder / "images/dog").chmod(0)
    try:
        result = fail(capsys, "check", write_study(folder))
    finally:
        (folder / "images/dog").chmod(0o700)
    problem = "data.path: must be a readable folder, got 'FOLDER/images/dog' (Permission denied)"
    assert result == (5, expect(folder, problem))


def test_run_refuses_too_many_broken_images(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Empty, truncated, alien and vanished files beyond the allowance are named, each with its reason."""
    study_file = write_study(folder, ("image_size = 16", "image_size = 16\nmax_bad_fraction = 0.3"))
    pixels = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "images/cat/1.png")
    whole = (folder / "images/cat/1.png").read_bytes()
    (folder / "images/cat/0.png").write_bytes(b"")
    (folder / "images/cat/1.png").write_bytes(whole[: len(whole) // 2])
    (folder / "images/cat/2.png").write_text("a cat")
    (folder / "images/dog/0.png").unlink()
    (folder / "images/dog/0.png").symlink_to("nowhere.png")
    code, said = fail(capsys, "run", study_file, "--quiet")
    assert code == 5
    where = "data.max_bad_fraction: at most 0.3 of the images may fail to decode, got 4 of 12: "
    assert said.startswith(f"error: {where}")
    reasons = {"cat/0.png (not an image)", "cat/1.png (image file is truncated)", "cat/2.png (not an image)"}
    assert set(said.removeprefix(f"error: {where}").strip().split(", ")) == {
        *reasons,
        "dog/0.png (No such file or directory)",
    }
