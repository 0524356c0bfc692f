"""Read, or delete, what studies have found; needs the storage, not the study file."""

from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

from optuna.storages import RDBStorage
from optuna.trial import FrozenTrial

from tuner.errors import StudyError
from tuner.search.screening import is_screen
from tuner.search.storage import hold_lock, resolve_url, study_lock_path, use_storage
from tuner.search.studies import StoredStudy, delete_stored, load_stored
from tuner.search.study_facts import explain_damage
from tuner.search.summaries import StudySummary, list_studies
from tuner.search.trial_attrs import CONFIRM_ATTR, EPOCHS_ATTR, PARAMS_ATTR, REASON_ATTR, VALUES_ATTR, is_confirmation
from tuner.service.checkpoints import remove_checkpoints
from tuner.service.kept_models import remove_halves, remove_models
from tuner.service.result import StudyStatus, read_status
from tuner.spec.printable import as_printable, as_printable_lines

_EPOCH_COLUMNS = ("epoch", "train_loss", "val_loss", "val_accuracy", "val_balanced_accuracy", "val_macro_f1", "seconds")


@contextmanager
def open_existing(storage: str | None) -> Iterator[tuple[RDBStorage, str]]:
    """Open a storage to read it; yield it with its URL.

    Raises:
        StorageError: If it cannot be read.
    """
    url = resolve_url(storage)
    with use_storage(url) as opened:
        yield opened, url


@contextmanager
def open_stored(study: str, storage: str | None) -> Iterator[tuple[StoredStudy, str]]:
    """Open a study to read it; yield it with the storage's URL.

    Raises:
        StorageError: If the storage cannot be read.
        StudyError: If it has no such study of ours, or the study's trials are damaged.
    """
    with open_existing(storage) as (opened, url):
        stored = load_stored(opened, study)
        with explain_damage(f"study {study!r}: its trials"):
            stored.study.get_trials(deepcopy=False)  # read once; the storage remembers those that are over
        yield stored, url


def read_summaries(storage: str | None = None) -> list[StudySummary]:
    """Return a summary of every study of a storage."""
    with open_existing(storage) as (opened, _):
        return list_studies(opened)


def read_study_status(study: str, storage: str | None = None) -> StudyStatus:
    """Return how far a study is."""
    with open_stored(study, storage) as (stored, url):
        return read_status(stored, url)


def list_trials(study: str, storage: str | None = None) -> list[dict[str, Any]]:
    """Return the trials of a study as rows with the same columns."""
    with open_stored(study, storage) as (stored, _):
        names = list(stored.spec.space)
        return [_make_row(trial, names) for trial in stored.study.get_trials(deepcopy=False)]


def _make_row(trial: FrozenTrial, names: list[str]) -> dict[str, Any]:
    attrs = trial.user_attrs
    return {
        "number": trial.number,
        "kind": "screen" if is_screen(trial) else "confirm" if is_confirmation(trial) else "search",
        "state": trial.state.name.lower(),
        "value": trial.value,
        "reason": attrs.get(REASON_ATTR),
        **{name: trial.params.get(name) for name in names},
        "unfrozen_layers_resolved": attrs.get("unfrozen_layers_resolved"),
        "epochs": len(trial.intermediate_values),
        "seconds": attrs.get("seconds"),
    }


def read_trial(study: str, number: int, storage: str | None = None) -> dict[str, Any]:
    """Return all that is known of one trial, as JSON.

    Raises:
        StudyError: If the study has no such trial.
    """
    with open_stored(study, storage) as (stored, _):
        trials = stored.study.get_trials(deepcopy=False)
        if number >= len(trials):
            raise StudyError(f"trial {number}: must be a trial of study {study!r}, which has {len(trials)} trials")
        trial = trials[number]
        return {
            "study": study,
            "number": number,
            "state": trial.state.name,
            "value": trial.value,
            "objective": stored.spec.study.objective,
            "params": trial.params,
            "recipe": trial.user_attrs.get(PARAMS_ATTR),
            "started": _write_time(trial.datetime_start),
            "ended": _write_time(trial.datetime_complete),
            **{key: value for key, value in trial.user_attrs.items() if key != PARAMS_ATTR},
        }


def _write_time(time: datetime | None) -> str | None:
    """Return a time of Optuna's, which is this machine's without saying so, in UTC."""
    return None if time is None else time.astimezone(UTC).isoformat(timespec="seconds")


def describe_trial(trial: dict[str, Any]) -> str:
    """Return a trial for a person: params, curve, and why it ended.

    Raises:
        StudyError: If what is stored with it cannot be read.
    """
    with explain_damage(f"trial {trial['number']} of {trial['study']!r}"):
        value = "" if trial["value"] is None else f", {trial['objective']} {trial['value']:.4f}"
        lines = [f"trial {trial['number']} of {trial['study']}: {trial['state'].lower()}{_tell_reason(trial)}{value}"]
        lines += [f"  {name} = {value}" for name, value in (trial["recipe"] or trial["params"]).items()]
        lines += ["", *_list_log(trial)]
        if epochs := trial.get(EPOCHS_ATTR):
            lines += ["", "  ".join(name.rjust(12) for name in _EPOCH_COLUMNS)]
            for number, epoch in enumerate(epochs):
                if number and epoch["epoch"] == 1:
                    lines.append("")  # the next training of the trial
                lines.append("  ".join(f"{epoch[name]:12.4g}" for name in _EPOCH_COLUMNS))
        if values := trial.get(VALUES_ATTR):
            lines += ["", f"the value is the mean of {', '.join(f'{value:.4f}' for value in values)}"]
        text = "\n".join(map(as_printable, lines))
        return f"{text}\n\n{as_printable_lines(trial['traceback'].rstrip())}" if "traceback" in trial else text


def _tell_reason(trial: dict[str, Any]) -> str:
    if REASON_ATTR not in trial:
        return ""
    return f" ({trial[REASON_ATTR]}{': ' + trial['message'] if trial['message'] else ''})"


def _list_log(trial: dict[str, Any]) -> list[str]:
    """Return what happened to a trial, when."""
    log = [f"{trial['started']}  started on {trial.get('device', '?')}"] if trial["started"] else []
    if confirms := trial.get(CONFIRM_ATTR):
        log.insert(0, f"confirms trial {confirms['trial']}, fresh seed {confirms['seed']}")
    if "retry_of" in trial:
        log.insert(0, f"queued again for trial {trial['retry_of']}, whose run ended")
    if trial["ended"]:
        took = f" after {trial['seconds']:.1f} s of training" if "seconds" in trial else ""
        log.append(f"{trial['ended']}  {trial['state'].lower()}{took}")
    return log


def delete_study(study: str, storage: str | None = None) -> None:
    """Delete a study, its trials and its kept models.

    Raises:
        StudyError: If there is none of this name, or it is running.
    """
    with open_existing(storage) as (opened, url):
        load_stored(opened, study)
        with hold_lock(study_lock_path(url, study)) as is_free:
            if not is_free:
                raise StudyError(f"study {study!r}: must not be running, a 'tuner run' holds it")
            remove_halves(url, study)
            remove_checkpoints(url, study)
            delete_stored(opened, study)
            remove_models(url, study)
