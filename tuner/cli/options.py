"""Options and forms that several commands share."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import click

from tuner.spec.printable import as_printable, as_printable_lines

storage_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--storage", metavar="URL", help="SQLite URL.  [default: TUNER_STORAGE, else sqlite:///studies.db]"
)
json_option: Callable[[Callable[..., Any]], Callable[..., Any]] = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document."
)


def say(text: object, *, err: bool = False) -> None:
    """Print lines for a person; nothing in them that a database or a file brought moves the terminal's cursor."""
    click.echo(as_printable_lines(text), err=err)


def format_table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """Return rows under a header, in columns as wide as their widest cell."""
    lines = [[as_printable(cell) for cell in row] for row in (header, *rows)]
    widths = [max(len(line[column]) for line in lines) for column in range(len(header))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines
    )


def format_value(value: float | None) -> str:
    """Return an objective value with four digits, or a dash for none."""
    return "-" if value is None else f"{value:.4f}"
