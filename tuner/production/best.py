"""The best trial's recipe, as production training can use it."""

import re
from typing import Any

import tomli_w

from tuner.errors import ExportError
from tuner.production.reading import open_stored
from tuner.search.studies import StoredStudy, find_best, read_params
from tuner.search.study_facts import explain_damage
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
        StudyError, StorageError: If there is no such study, or what is stored with it cannot be read.
    """
    with open_stored(study, storage) as (stored, _):
        trial = find_best(stored.study)
        if trial is None:
            raise ExportError(f"study {study!r}: at least one trial must have completed, got none; 'tuner run' goes on")
        recipe = read_params(trial)
        with explain_damage(f"study {study!r}"):
            data = _describe_data(stored, recipe["backbone"])
            backbone = _describe_backbone(stored, recipe["backbone"])
        return {
            "trial": {
                "study": study,
                "number": trial.number,
                "objective": stored.spec.study.objective,
                "value": trial.value,
            },
            "params": recipe,
            "data": data,
            "backbone": backbone,
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
    """Return tables of plain values as TOML, with a sign in place of bytes that are no UTF-8.

    Raises:
        TypeError: If a value has no form in TOML, as None.
    """
    text = _SURROGATE.sub("\ufffd", tomli_w.dumps(tables))
    # tomli-w escapes ASCII alone; other control characters stand in quotes too, and a terminal would obey them.
    return "".join(each if each.isprintable() or each == "\n" else f"\\U{ord(each):08x}" for each in text)
