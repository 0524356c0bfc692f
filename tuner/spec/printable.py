"""Text as it may be shown: what a file or a database holds moves no cursor and forges no line."""


def as_printable(text: object) -> str:
    """Return text for one line: a name from a file or a database must not move a terminal's cursor, or end the line."""
    return "".join(character if character.isprintable() else "?" for character in str(text))


def as_printable_lines(text: object) -> str:
    """Return text whose lines stay lines, such as a traceback, each of them printable."""
    return "\n".join(as_printable(line.expandtabs()) for line in str(text).split("\n"))
