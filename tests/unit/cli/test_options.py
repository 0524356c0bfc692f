"""Forms that several commands share."""

import pytest

from tuner.cli.options import as_printable, format_table


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("digits ü 猫", "digits ü 猫"),
        ("a\x1b[2Jb", "a?[2Jb"),
        ("a\nb\tc", "a?b?c"),
        ("caf\udce9", "caf?"),
        ("\u202egpj", "?gpj"),
    ],
)
def test_as_printable_lets_a_name_neither_move_the_cursor_nor_end_the_line(name: str, shown: str) -> None:
    """Names of another program's studies reach the terminal too."""
    assert as_printable(name) == shown
    assert format_table(("STUDY",), [(name,)]) == f"STUDY\n{shown}"
