"""Tests of tuner.data.source_csv."""

from pathlib import Path

import pytest
from PIL import Image

from tuner.data.index import NO_SPLIT, Split
from tuner.data.source_csv import read_csv
from tuner.errors import DataError
from tuner.spec.sections import DataSection


def make_section(path: Path) -> DataSection:
    """Return a section that reads a table."""
    return DataSection(source="csv", path=str(path))


def write_table(folder: Path, *lines: str, images: tuple[str, ...] = ("a.png", "b.png", "c.png")) -> DataSection:
    """Write a table and the images beside it."""
    for name in images:
        Image.new("L", (4, 4)).save(folder / name)
    (folder / "table.csv").write_text("\n".join(lines), encoding="utf-8")
    return make_section(folder / "table.csv")


def test_read_csv_lists_images(tmp_path: Path) -> None:
    """Paths are relative to the table; other columns, blanks and a byte order mark do no harm."""
    section = write_table(tmp_path, "\ufeffpath, label,note", "b.png,dog,x", './a.png , "cat",', "c.png,dog")
    index = read_csv(section)
    assert index.names == ("a.png", "b.png", "c.png")
    assert index.classes == ('"cat"', "dog")
    assert set(index.given_splits) == {NO_SPLIT}
    with index.open_image(0) as image:
        assert image.size == (4, 4)


def test_read_csv_reads_groups(tmp_path: Path) -> None:
    """They follow their images into the order of names; without the key the column is one of no interest."""
    section = write_table(tmp_path, "path,label,patient", "b.png,dog,p 2", "a.png,cat, p1", "c.png,dog,p1 ")
    assert read_csv(section).groups is None
    assert read_csv(section.model_copy(update={"group": "patient"})).groups == ("p1", "p 2", "p1")


def test_read_csv_reads_given_splits_without_looking_at_test_files(tmp_path: Path) -> None:
    """Files of the test split need not even exist."""
    section = write_table(
        tmp_path, "path,label,split", "a.png,cat,train", "b.png,dog,Train", "c.png,dog,validation", "no.png,cat,test"
    )
    index = read_csv(section)
    assert index.given_splits.tolist() == [Split.TRAIN, Split.TRAIN, Split.VAL, Split.TEST]
    assert index.stamps[3] == ""


BAD_TABLES = {
    "column": (["file,label", "a.png,cat"], r"got no 'path', but 'file', 'label'$"),
    "label column": (["path,class", "a.png,cat"], r"got no 'label', but 'path', 'class'$"),
    "semicolons": (["path;label", "a.png;cat"], r"got no 'path', but 'path;label'$"),
    "empty": ([], r"must have a header with the columns path and label, got an empty file$"),
    "no lines": (["path,label"], r"must hold at least one line below the header, got none in '.*'$"),
    "no label": (["path,label", "a.png,cat", "b.png,"], r"line 3: label must not be empty, got ''$"),
    "short line": (["path,label", "a.png"], r"line 2: label must not be empty, got ''$"),
    "no path": (["path,label", " ,cat"], r"line 2: path must not be empty, got ''$"),
    "split": (["path,label,split", "a.png,cat,dev"], r"line 2: split must be train, val or test, got 'dev'$"),
    "no split": (["path,label,split", "a.png,cat,"], r"line 2: split must be train, val or test, got ''$"),
    "twice": (
        ["path,label", "a.png,cat", "b.png,dog", "./a.png,dog"],
        r"line 4: each path must stand once, got 'a.png' as in line 2$",
    ),
    "missing": (
        ["path,label", "a.png,cat", "x.png,dog", "y.png,dog"],
        r"got no file at 'x.png' \(line 3\), 'y.png' \(line 4\)$",
    ),
    "one class": (["path,label", "a.png,cat", "b.png,cat"], r"must hold at least two classes, got one: 'cat'$"),
    "no train": (["path,label,split", "a.png,cat,val"], r"must hold images of the train split, got none$"),
    "val class": (
        ["path,label,split", "a.png,cat,train", "b.png,dog,train", "c.png,emu,val"],
        r"val must hold classes of train only, got 'emu'$",
    ),
}


@pytest.mark.parametrize(("lines", "message"), BAD_TABLES.values(), ids=BAD_TABLES)
def test_read_csv_refuses_a_wrong_table(tmp_path: Path, lines: list[str], message: str) -> None:
    """Each wrong table is met with the line or the column at fault."""
    section = write_table(tmp_path, *lines)
    with pytest.raises(DataError, match=r"^data\.path: .*" + message):
        read_csv(section)


def test_read_csv_refuses_what_is_no_table(tmp_path: Path) -> None:
    """A missing file, a folder and other bytes are told apart."""
    with pytest.raises(DataError, match=r"^data.path: must be an existing csv file, got '.*/no.csv'$"):
        read_csv(make_section(tmp_path / "no.csv"))
    with pytest.raises(
        DataError, match=r"^data.path: must be a csv file, got the folder '.*'; source = 'image_folder'"
    ):
        read_csv(make_section(tmp_path))
    (tmp_path / "latin.csv").write_bytes("path,label\nä.png,cat".encode("latin-1"))
    with pytest.raises(DataError, match=r"^data.path: must be a csv file in UTF-8, got other bytes in '.*latin.csv'$"):
        read_csv(make_section(tmp_path / "latin.csv"))
