"""Properties of the table that names images: the right classes and splits, or one line on what is wrong."""

import csv
import io
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tuner.data.index import NO_SPLIT, SPLIT_NAMES, ImageIndex, Split
from tuner.data.source_csv import read_csv
from tuner.errors import DataError
from tuner.spec.sections import DataSection


def is_bare(cell: str) -> bool:
    """Whether a cell is what it is after the stripping of its ends."""
    return bool(cell) and cell == cell.strip()


characters = st.characters(exclude_categories=["Cs"], exclude_characters="\0/")
file_names = st.text(characters, min_size=1, max_size=20).filter(lambda name: is_bare(name) and name not in {".", ".."})
labels = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=20).filter(is_bare)
splits = st.sampled_from(sorted(SPLIT_NAMES)).flatmap(lambda name: st.sampled_from([name, name.upper(), f" {name} "]))
quotings = st.sampled_from([csv.QUOTE_ALL, csv.QUOTE_MINIMAL])


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """A table, and the way it is written."""

    rows: tuple[tuple[str, str, str], ...]
    """Paths, labels and splits."""
    columns: tuple[str, ...]
    quoting: int
    line_end: str
    encoding: str

    def write(self, place: Path) -> None:
        """Write the table and an empty file for each path."""
        out = io.StringIO()
        writer = csv.writer(out, quoting=self.quoting, lineterminator=self.line_end)  # type: ignore[arg-type]
        writer.writerow([f" {column} " for column in self.columns])
        for path, label, split in self.rows:
            cells = {"path": path, "label": label, "split": split}
            writer.writerow([cells.get(column, "other") for column in self.columns])
            place.with_name(path).touch()
        place.write_bytes(out.getvalue().encode(self.encoding))


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """Return a table whose files exist; its splits may leave classes out."""
    few = draw(st.lists(labels, min_size=1, max_size=3, unique=True))
    paths = draw(st.lists(file_names, min_size=1, max_size=8, unique=True).filter(lambda names: "t.csv" not in names))
    columns = ["path", "label", *(["split"] if draw(st.booleans()) else []), *(["note"] if draw(st.booleans()) else [])]
    return Manifest(
        rows=tuple((path, draw(st.sampled_from(few)), draw(splits)) for path in paths),
        columns=tuple(draw(st.permutations(columns))),
        # Python's writer does not quote a cell for its "\r".
        quoting=csv.QUOTE_ALL if "\r" in "".join([*few, *paths]) else draw(quotings),
        line_end=draw(st.sampled_from(["\n", "\r\n"])),
        encoding=draw(st.sampled_from(["utf-8", "utf-8-sig"])),
    )


def read(prepare: Callable[[Path], object]) -> ImageIndex | str:
    """Return the index of a table in a folder of its own, or the line on why there is none."""
    with tempfile.TemporaryDirectory() as folder:
        table = Path(folder, "t.csv")
        prepare(table)
        try:
            return read_csv(DataSection(source="csv", path=str(table)))
        except DataError as error:
            line = str(error)
    assert len(line.splitlines()) == 1
    assert line.startswith("data.path: ")
    return line


def expect(manifest: Manifest) -> dict[str, tuple[str, int]] | None:
    """Return label and split by path, worked out in another way; None if the table cannot be used."""
    has_splits = "split" in manifest.columns
    rows = {
        path: (label, int(SPLIT_NAMES[split.strip().lower()]) if has_splits else NO_SPLIT)
        for path, label, split in manifest.rows
    }
    trained = {label for label, split in rows.values() if split in {NO_SPLIT, Split.TRAIN}}
    return rows if len(trained) > 1 and {label for label, _ in rows.values()} == trained else None


@given(manifests())
def test_read_csv_finds_what_the_table_says(manifest: Manifest) -> None:
    """Whatever the names, the quoting and the order of columns: every image has its class and its split."""
    found = read(manifest.write)
    expected = expect(manifest)
    if expected is None:
        assert isinstance(found, str)
        return
    assert isinstance(found, ImageIndex)
    assert list(found.classes) == sorted({label for label, _ in expected.values()})
    rows = zip(found.names, found.labels.tolist(), found.given_splits.tolist(), strict=True)
    assert {name: (found.classes[label], split) for name, label, split in rows} == expected


@given(
    st.binary(max_size=200) | st.text(max_size=60).map(lambda more: b"path,label\n" + more.encode("utf-8", "replace"))
)
def test_read_csv_never_breaks_on_a_strange_file(content: bytes) -> None:
    """Any bytes, NUL and broken quotes included, give one line: none of them names a file that exists."""
    assert isinstance(read(lambda table: table.write_bytes(content)), str)


@given(
    st.lists(st.lists(st.text(max_size=10), max_size=5), max_size=5), st.sampled_from(["utf-8", "utf-16", "latin-1"])
)
def test_read_csv_never_breaks_on_strange_rows(rows: list[list[str]], encoding: str) -> None:
    """Neither do rows that are too short, too long or in another encoding."""
    out = io.StringIO()
    csv.writer(out).writerows([["path", "label", "split"], *rows])
    assert isinstance(read(lambda table: table.write_bytes(out.getvalue().encode(encoding, "replace"))), str)


@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "latin-1"])
def test_read_csv_asks_for_utf_8(encoding: str) -> None:
    """A table in another encoding is not read as something else."""
    found = read(lambda table: table.write_text("path,label\né.png,a\n", encoding=encoding))
    assert "must be a csv file in UTF-8" in str(found)


@pytest.mark.parametrize("column", ["path", "label", "split"])
def test_read_csv_refuses_a_column_that_stands_twice(column: str) -> None:
    """Of two columns of one name nobody knows which one is meant."""
    found = read(lambda table: table.write_text(f"path,label,split,{column}\na.png,a,train,b\n"))
    assert str(found) == (
        f"data.path: must have each column once, got '{column}' in 'path', 'label', 'split', '{column}'"
    )


def test_read_csv_refuses_a_file_by_two_names() -> None:
    """One image cannot be in train by its relative path and in val by its absolute one."""

    def prepare(table: Path) -> None:
        table.with_name("a.png").touch()
        table.write_text(f"path,label,split\na.png,a,train\n{table.parent}/./a.png,a,val\n")

    assert "line 3: each path must stand once, got" in str(read(prepare))
