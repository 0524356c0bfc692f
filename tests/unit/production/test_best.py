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
    with pytest.raises(TypeError, match="TOML has no NoneType"):
        write_toml({"data": {"x": None}})
