"""The best trial's recipe, as production training can use it."""

import json
import re
from typing import Any

from tuner.errors import ExportError
from tuner.production.reading import open_stored
from tuner.search.studies import StoredStudy, find_best
from tuner.search.trial_attrs import PARAMS_ATTR
from tuner.spec.sections import BackboneSection

_SURROGATE = re.compile("[\ud800-\udfff]")


def best_params(study: str, *, storage: str | None = None) -> dict[str, Any]:
    """Return the recipe of a study's best trial.

    Args:
        study: The study's name.
        storage: SQLite URL; default: ``TUNER_STORAGE``, else ``sqlite:///studies.db``.

    Returns:
        JSON: ``params`` is the whole resolved recipe, ``data`` how images are prepared, ``backbone`` how the backbone
        is made, and ``trial`` where all of it comes from.

    Raises:
        ExportError: If no trial completed.
        StudyError, StorageError: If there is no such study.
    """
    with open_stored(study, storage) as (stored, _):
        trial = find_best(stored.study)
        if trial is None:
            raise ExportError(f"study {study!r}: at least one trial must have completed, got none; 'tuner run' goes on")
        recipe = trial.user_attrs[PARAMS_ATTR]
        return {
            "trial": {
                "study": study,
                "number": trial.number,
                "objective": stored.spec.study.objective,
                "value": trial.value,
            },
            "params": recipe,
            "data": _describe_data(stored, recipe["backbone"]),
            "backbone": _describe_backbone(stored, recipe["backbone"]),
        }


def _describe_data(stored: StoredStudy, backbone: str) -> dict[str, Any]:
    return {
        "classes": list(stored.facts.classes),
        "image_size": stored.spec.data.image_size,
        "resize": stored.spec.data.resize,
        **stored.facts.preprocessing[backbone],
    }


def _describe_backbone(stored: StoredStudy, backbone: str) -> dict[str, Any]:
    section = stored.spec.backbones.get(backbone, BackboneSection())
    described: dict[str, Any] = {"n_groups": stored.facts.group_counts[backbone], "kwargs": section.kwargs}
    if section.weights:
        described["weights"] = section.weights
    return described


def write_toml(tables: dict[str, Any]) -> str:
    """Return tables of plain values as TOML."""
    lines: list[str] = []
    for name, table in tables.items():
        lines += [f"[{name}]", *(f"{_write_key(key)} = {_write_value(value)}" for key, value in table.items()), ""]
    return "\n".join(lines)


def _write_key(key: str) -> str:
    return key if key.replace("_", "").replace("-", "").isalnum() and key.isascii() else _write_text(key)


def _write_text(text: str) -> str:
    """Return text in TOML's quotes, which JSON's are but for DEL and for what stands for bytes that are no UTF-8."""
    return json.dumps(_SURROGATE.sub("\ufffd", text), ensure_ascii=False).replace("\x7f", "\\u007f")


def _write_value(value: Any) -> str:
    match value:
        case dict():
            inner = ", ".join(f"{_write_key(key)} = {_write_value(each)}" for key, each in value.items())
            return f"{{ {inner} }}" if inner else "{}"
        case list() | tuple():
            return f"[{', '.join(_write_value(each) for each in value)}]"
        case bool():
            return json.dumps(value)
        case str():
            return _write_text(value)
        case int() | float():
            return repr(value)
        case _:
            raise TypeError(f"TOML has no {type(value).__name__}")
