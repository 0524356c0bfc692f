"""A study as one HTML file that needs no network: what it found, what it is worth, and what it cost."""

import json
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
from optuna.trial import FrozenTrial, TrialState

from tuner.errors import ExportError
from tuner.paths import replacing
from tuner.production.calibration import Bin, Calibration
from tuner.production.confusion_picture import draw_confusion_figure
from tuner.production.openings import OPENINGS_ATTR
from tuner.production.pictures import render_svg
from tuner.production.reading import open_stored
from tuner.production.report_figures import (
    draw_costs,
    draw_curves,
    draw_history,
    draw_importances,
    draw_ledger,
    measure_importances,
)
from tuner.production.score_pictures import draw_calibration_figure
from tuner.production.stored_recipe import TRAINED_ATTR
from tuner.search.confirmation import Confirmation
from tuner.search.studies import StoredStudy
from tuner.search.study_facts import explain_damage
from tuner.search.trial_attrs import REASON_ATTR, is_confirmation
from tuner.service.result import StudyStatus, describe_status, read_status
from tuner.spec.durations import format_seconds
from tuner.spec.printable import as_printable

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
h1 { margin-bottom: 0 } h2 { margin-top: 2.2rem; border-bottom: 1px solid #ddd }
table { border-collapse: collapse; margin: .8rem 0 } th, td { padding: .2rem .8rem .2rem 0; text-align: left }
th { border-bottom: 1px solid #bbb } pre { background: #f5f5f5; padding: .8rem; overflow-x: auto }
svg { max-width: 100%; height: auto } .note { color: #666 }
"""
_MAX_FAILURES = 50


def write_report(study: str, out: str | Path, *, storage: str | None = None) -> Path:
    """Write a study's report: curves, importance, value against cost, confusion, calibration, failures and ledger.

    Args:
        study: The study's name.
        out: The HTML file; an older one is replaced.
        storage: SQLite URL; default: ``TUNER_STORAGE``, else ``sqlite:///studies.db``.

    Returns:
        The file.

    Raises:
        ExportError: If the file cannot be written.
        StudyError, StorageError: If there is no such study, or what is stored with it cannot be read.
    """
    path = Path(out)
    with open_stored(study, storage) as (stored, url), explain_damage(f"study {study!r}"):
        text = _render(stored, read_status(stored, url))
    try:
        with replacing(path) as temporary:
            temporary.write_text(text, encoding="utf-8")
    except OSError as error:
        raise ExportError(f"{path}: must be a file that can be written, got: {error.strerror or error}") from error
    return path


def _render(stored: StoredStudy, status: StudyStatus) -> str:
    trials = stored.study.get_trials(deepcopy=False)
    trained = stored.study.user_attrs.get(TRAINED_ATTR)
    sections = [
        _section("Result", f"<pre>{_text(describe_status(status))}</pre>"),
        *([] if status.confirmation is None else [_section("Confirmation", _tabulate(status.confirmation))]),
        _section("On test", _tell_test(trained, stored.study.user_attrs.get(OPENINGS_ATTR, []))),
        *_draw_search(stored, status, trials),
        *_draw_classes(stored, status, trials, trained),
        _section("Failures", _list_failures(trials)),
        _section("Device time", _tell_ledger(status)),
        _section("Study file", f"<pre>{_text(json.dumps(_show_spec(stored), indent=1))}</pre>"),
    ]
    date = datetime.now(UTC).isoformat(timespec="seconds")
    name = _text(stored.name)
    head = f'<meta charset="utf-8"><title>{name}</title><style>{_STYLE}</style>'
    body = f"<h1>{name}</h1><p class=note>report of {date}, by tuner</p>" + "".join(sections)
    return f"<!doctype html><html lang=en><head>{head}</head><body>{body}</body></html>\n"


def _text(value: object) -> str:
    """Return a text that is nothing but text in HTML, line by line."""
    return "\n".join(escape(as_printable(line)) for line in str(value).split("\n"))


def _section(title: str, content: str) -> str:
    return f"<section><h2>{escape(title)}</h2>{content}</section>"


def _table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in header)
    body = "".join("<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows)
    return f"<table><tr>{head}</tr>{body}</table>"


def _tabulate(found: Confirmation) -> str:
    rows = [
        (rank, each.trial, f"{each.mean:.4f} ± {each.deviation:.4f}", f"{each.search_value:.4f}", each.n_failed)
        for rank, each in enumerate(found.candidates, start=1)
    ]
    header = ("", "trial", f"{found.objective}, fresh seeds", "in the search", "seeds failed")
    return f"{_table(header, rows)}<p>{_text(found.prediction.describe())}</p>"


def _tell_test(trained: dict[str, Any] | None, openings: list[dict[str, str]]) -> str:
    looks = _table(("test was looked at", "by"), [(each["time"], each["reason"]) for each in openings])
    if trained is None:
        none = "<p>No model has been trained for production yet: <code>tuner train</code>.</p>"
        return none + (looks if openings else "")
    if trained["test"] is None:
        return (
            f"<p>A model of trial {int(trained['trial'])} was trained; without a test split no number is unbiased.</p>"
        )
    test = trained["test"]
    low, high = test["accuracy_interval_95"]
    line = f"accuracy {test['accuracy']:.4f} (95 % {low:.4f} to {high:.4f}, {test['n_images']} images)"
    more = f"balanced accuracy {test['balanced_accuracy']:.4f}, macro F1 {test['macro_f1']:.4f}"
    return f"<p>Model of trial {int(trained['trial'])}: {_text(line)}, {_text(more)}.</p>{looks}"


def _draw_search(stored: StoredStudy, status: StudyStatus, trials: Sequence[FrozenTrial]) -> list[str]:
    if status.best is None:
        return []
    objective = status.objective
    best = status.confirmation.winner.trial if status.confirmation else status.best.number
    own = [trial for trial in trials if not is_confirmation(trial)]
    sections = [
        _section("Search", render_svg(lambda: draw_history(trials, objective))),
        _section("Curves", render_svg(lambda: draw_curves(own, objective, best))),
        _section("Value against cost", render_svg(lambda: draw_costs(own, objective))),
    ]
    importances = measure_importances(stored.study)
    importance = render_svg(lambda: draw_importances(importances)) if importances else "<p>too few trials to say</p>"
    return [*sections, _section("Importance", importance)]


def _draw_classes(
    stored: StoredStudy, status: StudyStatus, trials: Sequence[FrozenTrial], trained: dict[str, Any] | None
) -> list[str]:
    """Draw confusion and calibration: on test where a model was trained, else the best trial's on val."""
    test = trained["test"] if trained else None
    if test is not None and "confusion_matrix" in test:
        title, matrix = "test", test["confusion_matrix"]
    elif status.best is not None:
        title = f"val, trial {status.best.number}"
        matrix = trials[status.best.number].user_attrs.get("class_report", {}).get("confusion_matrix")
    else:
        matrix = None
    sections = []
    if matrix is not None:
        counts = np.array(matrix)
        picture = render_svg(lambda: draw_confusion_figure(counts, stored.facts.classes, title))
        sections.append(_section("Confusion matrix", picture))
    if test is not None:
        before, after = (_read_calibration(test["calibration"][key]) for key in ("as_trained", "calibrated"))
        picture = render_svg(lambda: draw_calibration_figure(before, after, test["temperature"]))
        sections.append(_section("Calibration on test", picture))
    return sections


def _read_calibration(values: dict[str, Any]) -> Calibration:
    bins = tuple(Bin(**each) for each in values["bins"])
    return Calibration(ece=values["ece"], log_loss=values["log_loss"] or 0.0, bins=bins)


def _list_failures(trials: Sequence[FrozenTrial]) -> str:
    failed = [
        (
            trial.number,
            trial.state.name.lower(),
            trial.user_attrs.get(REASON_ATTR, "?"),
            trial.user_attrs.get("message", ""),
        )
        for trial in trials
        if trial.state == TrialState.FAIL or trial.user_attrs.get(REASON_ATTR) not in {None, "pruner"}
    ]
    if not failed:
        return "<p>none</p>"
    more = f"<p class=note>and {len(failed) - _MAX_FAILURES} more</p>" if len(failed) > _MAX_FAILURES else ""
    return _table(("trial", "state", "reason", "message"), failed[:_MAX_FAILURES]) + more


def _tell_ledger(status: StudyStatus) -> str:
    ledger = status.ledger
    rows = [(name, f"{seconds:.1f} s", format_seconds(seconds)) for name, seconds in ledger.to_json().items()]
    picture = render_svg(lambda: draw_ledger(ledger)) if ledger.held else ""
    return _table(("", "device-seconds", ""), rows) + picture


def _show_spec(stored: StoredStudy) -> dict[str, Any]:
    """Return the study file without what is left to its default."""
    shown: dict[str, Any] = stored.spec.model_dump(mode="json", exclude_defaults=True)
    return shown
