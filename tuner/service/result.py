"""What a study has come to: the end of ``tuner run``, and all of ``tuner status``."""

import os
from dataclasses import asdict, dataclass
from typing import Any, Literal

from optuna.trial import FrozenTrial

from tuner.search.confirmation import (
    Confirmation,
    count_search_trials,
    describe_confirmation,
    read_confirmation,
)
from tuner.search.ledger import Ledger, describe_ledger, read_ledger
from tuner.search.screening import Agreement, describe_agreement, is_screen, measure_agreement
from tuner.search.studies import StoredStudy, count_states, count_wanted, find_best, read_params
from tuner.search.study_facts import explain_damage
from tuner.search.trial_attrs import count_reasons
from tuner.service.kept_models import model_folder
from tuner.spec.durations import format_seconds
from tuner.spec.own_code import is_users_code
from tuner.spec.printable import as_printable

StoppedBy = Literal["done", "timeout", "budget", "sigint", "sigterm"]


@dataclass(frozen=True, kw_only=True)
class BestTrial:
    """The study's best completed trial."""

    number: int
    value: float
    params: dict[str, Any]
    """As searched, under Optuna's names."""
    recipe: dict[str, Any]
    """Resolved: all that training needs."""

    @property
    def needs_code(self) -> bool:
        """Whether its backbone is a function of the user's."""
        return is_users_code(str(self.recipe["backbone"]))


@dataclass(frozen=True, kw_only=True)
class StudyStatus:
    """A study at one moment."""

    name: str
    storage: str
    objective: str
    n_trials: int
    """COMPLETE and PRUNED trials that the study is to have."""
    counts: dict[str, int]
    """Trials by Optuna's states."""
    reasons: dict[str, int]
    """PRUNED and FAIL trials by why, such as ``PRUNED: pruner``."""
    best: BestTrial | None
    model_folder: str | None
    """Where the best trial's model lies, if it was kept."""
    n_screen: int
    """Finished trials of the screen, which count apart."""
    screen_agreement: Agreement | None
    """How the backbones' order by their heads agrees with that after deeper training; None: too few to say."""
    saved_seconds: float
    """What training on kept features saved of the frozen backbones' work, over all trials."""
    confirmation: Confirmation | None
    """What training the best few again has shown; None: it has not been done."""
    n_unconfirmed: int
    """Trials that completed after the confirmation, or without one."""
    ledger: Ledger
    """What all of it took."""
    stopped_by: StoppedBy = "done"

    @property
    def n_finished(self) -> int:
        """Trials that count."""
        return self.counts["COMPLETE"] + self.counts["PRUNED"]

    def to_json(self) -> dict[str, Any]:
        """Return the status as a JSON object."""
        confirmation = self.confirmation and self.confirmation.to_json()
        return asdict(self) | {"confirmation": confirmation, "ledger": self.ledger.to_json()}


def read_status(stored: StoredStudy, url: str, *, stopped_by: StoppedBy = "done") -> StudyStatus:
    """Return the status of a stored study.

    Raises:
        StudyError: If what is stored with it cannot be read.
    """
    best = find_best(stored.study)
    folder = model_folder(url, stored.name, best.number) if best else None
    trials = stored.study.get_trials(deepcopy=False)
    with explain_damage(f"study {stored.name!r}"):
        n_trials = count_wanted(stored)
        reasons = sorted(count_reasons(stored.study).items())
        agreement = measure_agreement(trials, stored.study.direction)
        saved_seconds = float(sum(trial.user_attrs.get("saved_seconds", 0.0) for trial in trials))
        confirmation, ledger = read_confirmation(stored.study), read_ledger(stored.study)
        n_unconfirmed = count_search_trials(stored.study) - (confirmation.n_search_trials if confirmation else 0)
    return StudyStatus(
        name=stored.name,
        storage=url,
        objective=stored.spec.study.objective,
        n_trials=n_trials,
        counts=count_states(stored.study),
        reasons={f"{state}: {reason}": count for (state, reason), count in reasons},
        best=_describe_best(best) if best else None,
        # Path.is_dir raises in Python 3.11 if the folder is out of reach.
        model_folder=str(folder) if folder and os.path.isdir(folder) else None,  # noqa: PTH112
        n_screen=sum(is_screen(trial) and trial.state.is_finished() for trial in trials),
        screen_agreement=agreement,
        saved_seconds=saved_seconds,
        confirmation=confirmation,
        n_unconfirmed=n_unconfirmed,
        ledger=ledger,
        stopped_by=stopped_by,
    )


def _describe_best(trial: FrozenTrial) -> BestTrial:
    return BestTrial(
        number=trial.number,
        value=trial.value or 0.0,
        params=dict(trial.params),
        recipe=read_params(trial),
    )


def is_finished(stored: StoredStudy) -> bool:
    """Whether the study has all its trials."""
    counts = count_states(stored.study)
    return counts["COMPLETE"] + counts["PRUNED"] >= count_wanted(stored)


def describe_status(status: StudyStatus) -> str:
    """Return a status for a person."""
    counts, reasons = status.counts, status.reasons
    lines = [
        f"study {status.name}: {status.n_finished} of {status.n_trials} trials: {counts['COMPLETE']} complete, "
        f"{counts['PRUNED']} pruned{_list_reasons(reasons, 'PRUNED')}, "
        f"{counts['FAIL']} failed{_list_reasons(reasons, 'FAIL')}"
        + (f", {counts['RUNNING']} running" if counts["RUNNING"] else "")
        + (f", {counts['WAITING']} queued" if counts["WAITING"] else "")
    ]
    if status.n_screen:
        gone = _list_reasons(reasons, "screen FAIL", "screen PRUNED")
        lines.append(f"screen: {status.n_screen} head trials besides{gone}")
    if status.screen_agreement:
        lines.append(describe_agreement(status.screen_agreement))
    if status.saved_seconds >= 1:
        lines.append(f"kept features saved {format_seconds(status.saved_seconds)} of the backbones' work")
    if status.ledger.held:
        lines.append(describe_ledger(status.ledger))
    if status.best is None:
        return _join([*lines, "best: none yet"])
    lines.append(f"best: trial {status.best.number}, {status.objective} {status.best.value:.4f}")
    recipe = status.best.recipe
    lines += [f"  {name} = {recipe.get(name, value)}" for name, value in status.best.params.items()]
    if status.model_folder:
        lines.append(f"its model: {status.model_folder}")
    if status.confirmation:
        lines += describe_confirmation(status.confirmation)
        if status.n_unconfirmed:
            lines.append(f"since then {status.n_unconfirmed} trials have completed, which nothing has confirmed")
    return _join(lines)


def _join(lines: list[str]) -> str:
    """Return lines as one text; params and reasons come from the database."""
    return "\n".join(map(as_printable, lines))


def _list_reasons(reasons: dict[str, int], *states: str) -> str:
    listed = [
        f"{count} {reason.partition(': ')[2].replace('_', ' ')}"
        for reason, count in reasons.items()
        if reason.partition(": ")[0] in states
    ]
    return f" ({', '.join(listed)})" if listed else ""
