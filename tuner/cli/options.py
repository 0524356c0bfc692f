"""Options and forms that several commands share."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

storage_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--storage", metavar="URL", help="SQLite URL.  [default: TUNER_STORAGE, else sqlite:///studies.db]"
)
json_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document."
)


def as_printable(text: object) -> str:
    """Return text for a terminal: a name from a file or a database must not move its cursor, or end a line."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return rows under a header, in columns as wide as their widest cell."""
    lines = [list(header), *([as_printable(cell) for cell in row] for row in rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def format_value(value: float | None) -> str:
    """Return an objective value with four digits, or a dash for none."""
    return "-" if value is None else f"{value:.4f}"
