"""Forms that several commands share."""

import pytest

from tuner.cli.options import format_table, say
from tuner.spec.printable import as_printable, as_printable_lines


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("digits ü 猫", "digits ü 猫"),
        ("a\x1b[2Jb", "a?[2Jb"),
        ("a\x9b2Jb", "a?2Jb"),
        ("a\nb\tc", "a?b?c"),
        ("caf\udce9", "caf?"),
        ("\u202egpj", "?gpj"),
    ],
)
def test_as_printable_lets_a_name_neither_move_the_cursor_nor_end_the_line(name: str, shown: str) -> None:
    """Names of another program's studies reach the terminal too."""
    assert as_printable(name) == shown
    assert format_table(("STUDY",), [(name,)]) == f"STUDY\n{shown}"
    assert format_table((name,), [("x",)]) == f"{shown}\nx"


def test_as_printable_lines_keeps_lines_and_nothing_else() -> None:
    """A traceback stays one; a carriage return would overwrite what stands before it."""
    assert as_printable_lines("a:\n\tb\x1b[2J\r\nc\u2028d") == "a:\n        b?[2J?\nc?d"


def test_say_prints_no_escapes(capsys: pytest.CaptureFixture[str]) -> None:
    """It is the door to the terminal."""
    say("a\x1b[2J\nb")
    assert capsys.readouterr().out == "a?[2J\nb\n"
