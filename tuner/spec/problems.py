"""Say what is wrong with a study file, in the user's words: ``data.val_fraction: must lie in (0, 1), got 1.0``."""

import math
from typing import Any, get_args, get_origin

from pydantic import ValidationError

from tuner.spec.sections import DataSection, SearchSection, Section
from tuner.spec.space import PARAMETERS, Choices, Distribution, FloatRange, IntRange, contains, describe
from tuner.spec.suggestions import did_you_mean

_TYPE_WORDS = {
    "int": "a whole number",
    "float": "a number",
    "bool": "true or false",
    "string": "text in quotes",
    "tuple": "a list",
    "list": "a list",
    "dict": "a table",
    "model": "a table",
}
_PATH_SOURCES = {"image_folder", "csv", "torchvision"}
_SECRET_PLACES = {"study", "study.storage"}
"""A URL with a password may stand there; what is no URL at all is named by its kind alone."""
_KINDS = {bool: "true or false", int: "a number", float: "a number", str: "text", list: "a list", dict: "a table"}


def list_problems(error: ValidationError, section: type[Section], where: str) -> list[str]:
    """Return one line for each thing that pydantic found wrong with a section."""
    return [_describe(dict(detail), section, where) for detail in error.errors()]


def show_input(place: str, value: Any) -> str:
    """Return what was found in place of what must hold: ``got 3``."""
    return f"got {_KINDS.get(type(value), 'something else') if place in _SECRET_PLACES else repr(value)}"


def _describe(detail: dict[str, Any], section: type[Section], where: str) -> str:
    kind = detail["type"]
    owner, keys = _find_owner(section, detail["loc"])
    if kind == "extra_forbidden":
        keys.append(str(detail["loc"][-1]))
    place = ".".join([where, *keys])
    got = show_input(place, detail["input"])
    if kind == "extra_forbidden":
        return f"{place}: unknown key{did_you_mean(keys[-1], owner.model_fields)}"
    if kind == "missing":
        return f"{place}: is missing"
    if kind == "value_error":
        return f"{place}: {detail['ctx']['error']}, {got}"
    if kind == "literal_error":
        known = _literal_values(owner.model_fields[keys[-1]].annotation)
        return f"{place}: must be one of {', '.join(known)}, {got}{did_you_mean(str(detail['input']), known)}"
    if kind in {"too_short", "too_long"}:
        return f"{place}: must hold 3 numbers, {got}"
    word = _TYPE_WORDS.get(kind.split("_")[0])
    return f"{place}: must be {word}, {got}" if word else f"{place}: {detail['msg']}, {got}"


def _find_owner(section: type[Section], loc: tuple[str | int, ...]) -> tuple[type[Section], list[str]]:
    """Follow an error's location into nested sections; return the innermost one and its fields on the way."""
    keys: list[str] = []
    for part in loc:
        field = section.model_fields.get(str(part))
        if field is None:  # pydantic's own word for a kind of check, or an unknown key
            continue
        keys.append(str(part))
        if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
            section = field.annotation
    return section, keys


def _literal_values(annotation: Any) -> list[str]:
    if get_origin(annotation) is not None and str(get_origin(annotation)).endswith("Literal"):
        return [str(value) for value in get_args(annotation)]
    return [value for part in get_args(annotation) for value in _literal_values(part)]


def find_conflicts(parts: dict[str, Any], tables: dict[str, Any]) -> list[str]:
    """Return what is wrong between sections that are each well-formed.

    Args:
        parts: Checked sections by name; None where a section is wrong by itself.
        tables: The study file as TOML gave it.
    """
    space: dict[str, Distribution | None] = parts["space"]
    fixed = training if isinstance(training := tables.get("training", {}), dict) else {}
    problems = []
    if isinstance(data := parts.get("data"), DataSection):
        problems += _find_data_problems(data, "data")
    if (pretraining := parts.get("pretraining")) is not None:
        problems += _find_data_problems(pretraining.data, "pretraining.data")
        if pretraining.data.folds is not None:
            got = f"got {pretraining.data.folds}; pretraining only watches its val"
            problems.append(f"pretraining.data.folds: must be left out, {got}")
    problems += _find_fixed_problems(fixed, space)
    problems += _find_backbone_problems(fixed.get("backbone"), space, tables)
    problems += _find_enqueue_problems(tables.get("enqueue", []), space)
    if getattr(parts.get("search"), "screen", 0) > 0:
        problems += _find_screen_problems(parts["search"], fixed.get("unfrozen_layers", "all"), space)
    problems += _find_head_start_problems(fixed.get("head_start"), parts.get("search", SearchSection()))
    if getattr(parts.get("search"), "sampler", None) == "grid":
        problems += _find_grid_problems(space)
        if tables.get("enqueue"):
            problems.append("enqueue: must be left out with sampler = 'grid', which tries every point in its own order")
    return problems


def _find_data_problems(data: DataSection, where: str) -> list[str]:
    problems = []
    if data.source in _PATH_SOURCES and not data.path:
        problems.append(f"{where}.path: is missing; source = {data.source!r} reads from it")
    if data.source == "torchvision" and not data.dataset:
        problems.append(f"{where}.dataset: is missing; name a class of torchvision.datasets such as FashionMNIST")
    if data.source != "torchvision" and data.dataset:
        problems.append(f"{where}.dataset: must be left out with source = {data.source!r}, got {data.dataset!r}")
    if data.source == "digits" and data.path:
        problems.append(f"{where}.path: must be left out with source = 'digits', got {data.path!r}")
    if data.source != "csv" and data.group is not None:
        got = f"got {data.group!r}; only csv tables name groups"
        problems.append(f"{where}.group: must be left out with source = {data.source!r}, {got}")
    if data.test_fraction and data.val_fraction + data.test_fraction >= 1:
        total = data.val_fraction + data.test_fraction
        problems.append(f"{where}: val_fraction + test_fraction must be less than 1, got {total:g}")
    if data.classes is not None and len(set(data.classes)) < max(len(data.classes), 2):
        problems.append(f"{where}.classes: must name at least two classes, each once, got {list(data.classes)!r}")
    return problems


def _find_fixed_problems(fixed: dict[str, Any], space: dict[str, Distribution | None]) -> list[str]:
    problems = []
    for name, parameter in PARAMETERS.items():
        if name not in fixed:
            continue
        value = fixed[name]
        if name in space:
            problems.append(f"training.{name}: must stand in [space] or in [training], not in both")
        if isinstance(value, dict):
            problems.append(f"training.{name}: must be one value, got {value!r}; distributions go to [space]")
        elif name == "unfrozen_layers" and isinstance(value, str):
            if value != "all":
                problems.append(f'training.{name}: must be a whole number or "all", got {value!r}')
        elif problem := parameter.find_problem(value):
            problems.append(f"training.{name}: {problem}")
    return problems


def _find_backbone_problems(fixed: Any, space: dict[str, Distribution | None], tables: dict[str, Any]) -> list[str]:
    if "backbone" not in space and fixed is None:
        return ['space.backbone: is missing; name backbones such as { choices = ["resnet50.a1_in1k"] }']
    searched = space.get("backbone")
    names = searched.choices if isinstance(searched, Choices) else (fixed,) if isinstance(fixed, str) else ()
    described = tables.get("backbones", {})
    if not names or not isinstance(described, dict):
        return []
    return [
        f'backbones."{name}": must be one of the study\'s backbones{did_you_mean(name, map(str, names))}'
        for name in described
        if name not in names
    ]


def _find_enqueue_problems(entries: Any, space: dict[str, Distribution | None]) -> list[str]:
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        return ["enqueue: must be tables headed [[enqueue]]"]
    problems = []
    for number, entry in enumerate(entries, start=1):
        where = f"enqueue[{number}]"
        if not entry:
            problems.append(f"{where}: must name at least one param of [space]")
        for name, value in entry.items():
            if problem := _find_entry_problem(name, value, space):
                problems.append(f"{where}.{name}: {problem}")
    return problems


def _find_entry_problem(name: str, value: Any, space: dict[str, Distribution | None]) -> str:
    if name not in space:
        return f"must be a param of [space]{did_you_mean(name, space)}"
    if problem := PARAMETERS[name].find_problem(value):
        return problem
    distribution = space[name]
    if distribution is None or contains(distribution, value):
        return ""
    must = "must be" if isinstance(distribution, Choices) else "must lie in"
    return f"{must} {describe(distribution)}, got {value!r}"


def _find_screen_problems(search: SearchSection, fixed: Any, space: dict[str, Distribution | None]) -> list[str]:
    """Return why heads cannot be screened.

    Args:
        search: With a screen.
        fixed: The unfrozen layers of trials whose space has none.
        space: By param; None where a distribution is wrong by itself.
    """
    must = "search.screen: must be 0"
    problems = []
    if search.sampler == "grid":
        problems.append(f"{must} with sampler = 'grid', which tries every point in its own order, got {search.screen}")
    got = f"where no trial trains the head alone, got {search.screen}"
    if "unfrozen_layers" not in space:
        if fixed != 1:
            problems.append(f"{must} {got}; let space.unfrozen_layers start at 1, or set training.unfrozen_layers = 1")
    elif (searched := space["unfrozen_layers"]) is not None and not contains(searched, 1):
        problems.append(f"{must} {got}; let space.unfrozen_layers reach 1, which is the classifier")
    return problems


def _find_head_start_problems(head_start: Any, search: SearchSection | None) -> list[str]:
    if head_start != "screen" or search is None or search.screen > 0:
        return []
    advice = "set search.screen = 8, say, for eight heads of each backbone to choose from"
    return [f'training.head_start: must be "none" without a screen, got "screen"; {advice}']


def _find_grid_problems(space: dict[str, Distribution | None]) -> list[str]:
    problems = [
        f"space.{name}: must have a step or choices with sampler = 'grid', got {describe(distribution)}"
        for name, distribution in space.items()
        if isinstance(distribution, FloatRange) and distribution.step is None
    ]
    sizes = [
        len(distribution.choices) if isinstance(distribution, Choices) else _count_points(distribution)
        for distribution in space.values()
        if distribution is not None
    ]
    if not problems and (points := math.prod(sizes)) > 100_000:
        problems.append(f"search.sampler: a grid must have at most 100000 points, got {points:.0f}")
    return problems


def _count_points(distribution: FloatRange | IntRange) -> float:
    if distribution.high == "all" or distribution.step is None:
        return 1
    return math.floor((distribution.high - distribution.low) / distribution.step + 1e-8) + 1
