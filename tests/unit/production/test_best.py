"""The recipe as TOML."""

import tomllib
from typing import Any

import pytest

from tuner.production.best import write_toml


def test_write_toml_is_read_again_by_tomllib() -> None:
    """Whatever class names and kwargs hold, other programs read the same."""
    tables: dict[str, dict[str, Any]] = {
        "data": {"classes": ["cat 😀", 'a"b\\c', "tab\t", "del\x7f", "日本"], "mean": (0.5, 1e-7), "n": 3},
        "backbone": {"kwargs": {"pad type": "same", "bn_eps": 1e-3, "flag": True, "none": {}}},
    }
    expected = {**tables, "data": {**tables["data"], "mean": [0.5, 1e-7]}}
    assert tomllib.loads(write_toml(tables)) == expected


def test_write_toml_refuses_what_toml_has_not() -> None:
    """None has no form in TOML."""
    with pytest.raises(TypeError, match="NoneType"):
        write_toml({"data": {"x": None}})


@pytest.mark.parametrize(
    "name",
    [
        "../../x",
        "<script>alert(1)</script>",
        '"; DROP TABLE studies; --',
        '"""',
        "a\nb\r\n[study]\tc",
        "\x00\x01\x1b[31m\x7f\x85",
        "😀\u2028\ufeff",
        "\\",
        "=cmd|' /C calc'!A0",
        "",
        "x" * 5000,
    ],
)
def test_write_toml_keeps_names_that_look_like_something_else(name: str) -> None:
    """Names are data: as keys and as values they come back as they were."""
    tables = {"trial": {"study": name}, "backbone": {"kwargs": {name: [name, {name: True}]}}}
    assert tomllib.loads(write_toml(tables)) == tables


def test_write_toml_replaces_bytes_that_are_no_text() -> None:
    """TOML is UTF-8: a folder's name that is none cannot come back."""
    text = write_toml({"data": {"classes": ["caf\udce9"]}})
    assert tomllib.loads(text) == {"data": {"classes": ["caf\ufffd"]}}


def test_write_toml_is_printable() -> None:
    """It is printed; control characters beyond ASCII are escaped like the others, and read as they were."""
    tables = {"data": {"classes": ["a\x9b2J", "\u202egpj", "\t", "日本"], "\x85": "\xa0\n"}}
    text = write_toml(tables)
    assert all(line.isprintable() for line in text.split("\n"))
    assert "日本" in text
    assert tomllib.loads(text) == tables
