"""Write a study file from plain tables."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def write_study_file(path: Path, tables: Mapping[str, Mapping[str, Any]]) -> None:
    """Write tables of plain values as TOML; ``backbones`` becomes one section for each."""
    lines = []
    for name, table in tables.items():
        sections = (
            {f"{name}.{_quote(key)}": value for key, value in table.items()} if name == "backbones" else {name: table}
        )
        for section, values in sections.items():
            lines.append(f"[{section}]")
            lines += [f"{key} = {_format(value)}" for key, value in values.items()]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _quote(text: str) -> str:
    return json.dumps(text)


def _format(value: Any) -> str:
    match value:
        case dict():
            return "{ " + ", ".join(f"{key} = {_format(item)}" for key, item in value.items()) + " }"
        case list() | tuple():
            return "[" + ", ".join(map(_format, value)) + "]"
        case str():
            return _quote(value)
        case bool():
            return "true" if value else "false"
        case _:
            return repr(value)
