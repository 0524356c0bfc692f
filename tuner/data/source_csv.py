"""Images named in a table with the columns ``path``, ``label`` and, if the splits are given, ``split``."""

import csv
import posixpath
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from tuner.data.index import SPLIT_NAMES, ImageIndex, Split, preview
from tuner.data.source_files import FileEntry, index_files
from tuner.errors import DataError
from tuner.spec.sections import DataSection
from tuner.spec.suggestions import did_you_mean


@dataclass(frozen=True, kw_only=True)
class _Line:
    """One image of the table, with where it stands."""

    number: int
    entry: FileEntry


def read_csv(section: DataSection) -> ImageIndex:
    """Return the images of the table ``data.path``; their paths are relative to its folder.

    Raises:
        DataError: If the table cannot be read, a line is wrong, or a file of train or val does not exist.
    """
    path = Path(str(section.path))
    lines = [_parse_line(path, number, row, section.group) for number, row in _read_rows(path, section.group)]
    if not lines:
        raise DataError(f"data.path: must hold at least one line below the header, got none in '{path}'")
    _check_unique(lines)
    _check_existing(lines)
    index = index_files([line.entry for line in lines])
    if len(index.classes) == 1:
        raise DataError(f"data.path: must hold at least two classes, got one: {index.classes[0]!r}")
    return index


def _read_rows(path: Path, group: str | None) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield line numbers and rows of the table, with stripped cells; a missing cell is empty."""
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            reader = csv.DictReader(file, restval="")
            reader.fieldnames = [name.strip() for name in reader.fieldnames or ()]
            _check_columns(reader.fieldnames, group)
            for row in reader:
                yield reader.line_num, {key: value.strip() for key, value in row.items() if isinstance(value, str)}
    except IsADirectoryError:
        hint = "source = 'image_folder' reads folders"
        raise DataError(f"data.path: must be a csv file, got the folder '{path}'; {hint}") from None
    except FileNotFoundError:
        raise DataError(f"data.path: must be an existing csv file, got '{path}'") from None
    except UnicodeDecodeError:
        raise DataError(f"data.path: must be a csv file in UTF-8, got other bytes in '{path}'") from None
    except csv.Error as error:
        raise DataError(f"data.path: must be a csv file, got '{path}' ({error})") from error
    except OSError as error:
        raise DataError(f"data.path: must be a readable csv file, got '{path}' ({error.strerror})") from error


def _check_columns(columns: list[str], group: str | None) -> None:
    for name in ("path", "label"):
        if name not in columns:
            raise DataError(
                f"data.path: must have the columns path and label, and split if splits are given; "
                f"got no {name!r}, but {preview(columns)}"
                if columns
                else "data.path: must have a header with the columns path and label, got an empty file"
            )
    if group is not None and group not in columns:
        hint = did_you_mean(group, columns) or f"; the columns are {preview(columns)}"
        raise DataError(f"data.group: must be a column of the table, got {group!r}{hint}")
    if twice := [name for name in ("path", "label", "split", group) if name and columns.count(name) > 1]:
        raise DataError(f"data.path: must have each column once, got {twice[0]!r} in {preview(columns)}")


def _parse_line(table: Path, number: int, row: dict[str, str], group: str | None) -> _Line:
    where = f"data.path: line {number}"
    for column in ("path", "label") if group is None else ("path", "label", group):
        if not row[column]:
            raise DataError(f"{where}: {column} must not be empty, got {row[column]!r}")
    split = row.get("split")
    if split is not None and split.lower() not in SPLIT_NAMES:
        raise DataError(f"{where}: split must be train, val or test, got {split!r}")
    name = posixpath.normpath(row["path"])
    return _Line(
        number=number,
        entry=FileEntry(
            name=name,
            path=table.parent / name,
            class_name=row["label"],
            split=None if split is None else SPLIT_NAMES[split.lower()],
            group=None if group is None else row[group],
        ),
    )


def _check_unique(lines: list[_Line]) -> None:
    seen: dict[str, int] = {}
    for line in lines:
        place = posixpath.normpath(line.entry.path)  # the same for a file's relative and absolute path
        if (first := seen.setdefault(place, line.number)) != line.number:
            raise DataError(
                f"data.path: line {line.number}: each path must stand once, got {line.entry.name!r} as in line {first}"
            )


def _check_existing(lines: list[_Line]) -> None:
    """Check that the files exist, except those of the test split: they stay untouched until ``tuner train``."""
    missing = [line for line in lines if line.entry.split is not Split.TEST and not _is_file(line.entry.path)]
    if missing:
        shown = ", ".join(f"{line.entry.name!r} (line {line.number})" for line in missing[:5])
        more = f" and {len(missing) - 5} more" if len(missing) > 5 else ""
        raise DataError(f"data.path: paths must be files, relative to the table, got no file at {shown}{more}")


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # a folder on the way that cannot be entered
        return False
