"""Read a study file: TOML in, a checked ``StudySpec`` out, or every problem of the file at once."""

import tomllib
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from tuner.errors import SpecError
from tuner.spec import sections
from tuner.spec.problems import find_conflicts, list_problems, show_input
from tuner.spec.sections import Section, StudySpec
from tuner.spec.space import PARAMETERS, Distribution, parse_distribution
from tuner.spec.suggestions import did_you_mean

SECTIONS: dict[str, type[Section]] = {
    "study": sections.StudySection,
    "data": sections.DataSection,
    "training": sections.TrainingSection,
    "pretraining": sections.PretrainingSection,
    "search": sections.SearchSection,
    "workers": sections.WorkersSection,
    "warm_start": sections.WarmStartSection,
}
_TABLES = (*SECTIONS, "space", "backbones", "enqueue")
_MAX_DEPTH = 20
_MAX_LINE = 600


def load_spec(path: str | Path) -> StudySpec:
    """Read and check a study file.

    Args:
        path: The TOML file. Paths inside it are relative to its folder.

    Returns:
        The checked spec, with absolute paths.

    Raises:
        SpecError: With all problems of the file, one per line, if there are any.
    """
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8-sig")  # some editors put a byte order mark in front
    except (OSError, UnicodeDecodeError) as error:
        hint = "; 'tuner init FOLDER' writes a study file" if isinstance(error, IsADirectoryError) else ""
        reason = getattr(error, "strerror", None) or "it is not UTF-8 text"
        raise SpecError(f"{path}: must be a readable study file, got: {reason}{hint}") from error
    try:
        tables = tomllib.loads(text)
    except (ValueError, RecursionError) as error:  # tomllib lets both through where Python itself gives up
        reason = "tables, lists or numbers without end"
        reason = _make_printable(str(error)) if isinstance(error, tomllib.TOMLDecodeError) else reason
        raise SpecError(f"{path}: must be TOML, got: {reason}") from error
    return parse_spec(tables, path.resolve().parent)


def parse_spec(tables: dict[str, Any], folder: Path) -> StudySpec:
    """Check the tables of a study file.

    Args:
        tables: What TOML gave.
        folder: What relative paths inside are relative to.

    Raises:
        SpecError: With all problems, if there are any.
    """
    if unusable := _find_unusable(tables):  # by itself: the other checks cannot look at such values
        raise SpecError(map(_make_printable, unusable))
    problems = [f"{key}: unknown key{did_you_mean(key, _TABLES)}" for key in tables if key not in _TABLES]
    parts: dict[str, Any] = {}
    for name, section in SECTIONS.items():
        if name in tables or name in {"study", "data"}:
            parts[name] = _parse_section(section, tables.get(name, {}), name, problems)
    parts["backbones"] = {
        name: _parse_section(sections.BackboneSection, table, f'backbones."{name}"', problems)
        for name, table in _expect_table(tables.get("backbones", {}), "backbones", problems).items()
    }
    parts["space"] = _parse_space(tables.get("space", {}), problems)
    parts["enqueue"] = tables.get("enqueue", [])
    problems += find_conflicts(parts, tables)
    if problems:
        raise SpecError(map(_make_printable, problems))
    return _resolve_paths(StudySpec(**parts), folder)


def _find_unusable(tables: dict[str, Any]) -> list[str]:
    """Return what is nested too deeply or too large for JSON, for SQLite or for a message, without recursion."""
    problems: list[str] = []
    waiting: list[tuple[str, Any, int]] = [(key, value, 1) for key, value in reversed(tables.items())]
    while waiting:
        where, value, depth = waiting.pop()
        if isinstance(value, int) and not -(2**63) <= value < 2**63:
            problems.append(f"{where}: must be a whole number of at most 64 bits, got a larger one")
        parts: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            parts = [(f"{where}.{key}", part) for key, part in value.items()]
        elif isinstance(value, list):
            parts = [(f"{where}[{number}]", part) for number, part in enumerate(value, start=1)]
        if parts and depth >= _MAX_DEPTH:
            problems.append(f"{where}: must not be nested deeper than {_MAX_DEPTH} tables and lists")
        else:
            waiting += [(place, part, depth + 1) for place, part in reversed(parts)]
    return problems


def _make_printable(problem: str) -> str:
    """Return a problem as one line of bearable length, whatever characters the file's keys and values hold."""
    line = "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode() for character in problem
    )
    place, colon, reason = line.partition(": ")
    return _shorten(place or '""', _MAX_LINE // 3) + colon + _shorten(reason, _MAX_LINE)


def _shorten(text: str, length: int) -> str:
    tail = length // 4
    return text if len(text) <= length else f"{text[: length - tail]} … {text[-tail:]}"


def _resolve(path: str, folder: Path, where: str) -> str:
    try:
        return str((folder / Path(path).expanduser()).resolve())
    except (OSError, RuntimeError, ValueError) as error:  # no such home, a loop of links, a NUL
        raise SpecError(f"{where}: must be a path, got {path!r} ({error})") from error


def _expect_table(value: Any, where: str, problems: list[str]) -> dict[str, Any]:
    if isinstance(value, dict):
        return value
    problems.append(f"{where}: must be a table, got {value!r}")
    return {}


def _parse_section(section: type[Section], table: Any, where: str, problems: list[str]) -> Section | None:
    """Check one section; on failure add its problems and return None."""
    if not isinstance(table, dict):
        problems.append(f"{where}: must be a table, {show_input(where, table)}")
        return None
    try:
        return section.model_validate(table)
    except ValidationError as error:
        problems += list_problems(error, section, where)
        return None


def _parse_space(table: Any, problems: list[str]) -> dict[str, Distribution | None]:
    """Check ``[space]``; a name whose distribution is wrong maps to None."""
    space: dict[str, Distribution | None] = {}
    for name, entry in _expect_table(table, "space", problems).items():
        if name not in PARAMETERS:
            problems.append(f"space.{name}: unknown key{did_you_mean(name, PARAMETERS)}")
            continue
        space[name], found = parse_distribution(name, entry)
        problems += found
    return space


def _resolve_paths(spec: StudySpec, folder: Path) -> StudySpec:
    """Return the spec with every path made absolute."""

    def resolve_data(data: sections.DataSection, where: str) -> sections.DataSection:
        return data.model_copy(update={"path": _resolve(data.path, folder, where)}) if data.path else data

    backbones = {
        name: section
        if section.weights in {None, "random"}
        else section.model_copy(
            update={"weights": _resolve(str(section.weights), folder, f'backbones."{name}".weights')}
        )
        for name, section in spec.backbones.items()
    }
    pretraining = spec.pretraining and spec.pretraining.model_copy(
        update={"data": resolve_data(spec.pretraining.data, "pretraining.data.path")}
    )
    data = resolve_data(spec.data, "data.path")
    return spec.model_copy(update={"data": data, "backbones": backbones, "pretraining": pretraining})
