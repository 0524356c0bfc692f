"""The best trial's recipe, as production training can use it."""

import re
from typing import Any

import tomli_w
from optuna.trial import FrozenTrial, TrialState

from tuner.errors import ExportError
from tuner.production.reading import open_stored
from tuner.search.confirmation import read_confirmation
from tuner.search.studies import StoredStudy, read_params
from tuner.search.study_facts import explain_damage
from tuner.search.trial_attrs import CONFIRM_ATTR, MICRO_BATCH_ATTR, is_confirmation
from tuner.search.warm_start import find_winner
from tuner.spec.sections import BackboneSection

_SURROGATE = re.compile("[\ud800-\udfff]")


def best_params(study: str, *, storage: str | None = None, trial: int | None = None) -> dict[str, Any]:
    """Return the recipe of a study's best trial: the confirmed one, else the best of the search.

    Args:
        study: The study's name.
        trial: The number of another completed trial to take.
        storage: SQLite URL; default: ``TUNER_STORAGE``, else ``sqlite:///studies.db``.

    Returns:
        JSON: ``params`` is the whole resolved recipe, ``data`` how images are prepared, ``backbone`` how the backbone
        is made, ``trial`` where all of it comes from (and ``micro_batch``, if its batches did not fit into memory
        whole), and ``confirmed``, if it was, what it showed on fresh seeds.

    Raises:
        ExportError: If no trial completed, or not the one that was asked for.
        StudyError, StorageError: If there is no such study, or what is stored with it cannot be read.
    """
    with open_stored(study, storage) as (stored, _):
        chosen = find_winner(stored.study) if trial is None else _find_completed(stored, trial)
        if chosen is None:
            raise ExportError(f"study {study!r}: at least one trial must have completed, got none; 'tuner run' goes on")
        recipe = read_params(chosen)
        with explain_damage(f"study {study!r}"):
            data = _describe_data(stored, recipe["backbone"])
            backbone = _describe_backbone(stored, recipe["backbone"])
            confirmed = _describe_confirmed(stored, chosen.number)
            parts = _describe_parts(stored, chosen, recipe)
        if confirmed is not None:
            recipe["views"] = "fresh"  # as it was confirmed, whatever the search kept for speed
        return {
            "trial": {
                "study": study,
                "number": chosen.number,
                "objective": stored.spec.study.objective,
                "value": chosen.value,
                **parts,
            },
            "params": recipe,
            "data": data,
            "backbone": backbone,
            **({"confirmed": confirmed} if confirmed else {}),
        }


def _find_completed(stored: StoredStudy, number: int) -> FrozenTrial:
    trials = stored.study.get_trials(deepcopy=False)
    if number >= len(trials) or trials[number].state != TrialState.COMPLETE:
        got = trials[number].state.name.lower() if number < len(trials) else f"{len(trials)} trials"
        raise ExportError(f"study {stored.name!r}: trial {number} must be a completed one, got {got}")
    if is_confirmation(trials[number]):
        confirmed = trials[number].user_attrs[CONFIRM_ATTR]["trial"]
        got = f"one that confirms trial {confirmed}; take that one"
        raise ExportError(f"study {stored.name!r}: trial {number} must be one of the search, got {got}")
    return trials[number]


def _describe_parts(stored: StoredStudy, chosen: FrozenTrial, recipe: dict[str, Any]) -> dict[str, int]:
    """Return in how large parts batches went through the model where they did not fit whole, the smallest parts.

    Those of the trial, which may have trained on kept maps, and of its confirmations, which train whole models.
    """
    trials = [
        trial
        for trial in stored.study.get_trials(deepcopy=False)
        if trial.number == chosen.number
        or (is_confirmation(trial) and trial.user_attrs[CONFIRM_ATTR]["trial"] == chosen.number)
    ]
    parts = [int(trial.user_attrs[MICRO_BATCH_ATTR]) for trial in trials if MICRO_BATCH_ATTR in trial.user_attrs]
    if not parts:
        return {}
    if not 1 <= min(parts) <= recipe["batch_size"]:
        raise ValueError(f"micro_batch must lie in [1, {recipe['batch_size']}], got {min(parts)}")
    return {"micro_batch": min(parts)}


def _describe_confirmed(stored: StoredStudy, number: int) -> dict[str, Any] | None:
    """Return what a trial's recipe showed on fresh seeds; None if it was not confirmed."""
    found = read_confirmation(stored.study)
    candidates = found.candidates if found else ()
    candidate = next((each for each in candidates if each.trial == number), None)
    if found is None or candidate is None:
        return None
    described: dict[str, Any] = {
        "mean": candidate.mean,
        "standard_deviation": candidate.deviation,
        "values": list(candidate.values),
        "n_folds": found.n_folds,
    }
    if candidate is found.winner:
        described["accuracy"] = found.prediction.accuracy
        described["accuracy_interval_95"] = [found.prediction.low, found.prediction.high]
    return described


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
