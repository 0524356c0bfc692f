"""What is stored with a trial besides what Optuna stores: its user attributes."""

import dataclasses
from collections import Counter
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from tuner.trial import ClassReport, EpochResult, Reason, TrialOutcome, Usage

PARAMS_ATTR = "params_resolved"
LAYERS_ATTR = "unfrozen_layers_resolved"
EPOCHS_ATTR = "epochs"
REASON_ATTR = "reason"
ATTEMPT_ATTR = "attempt"
"""How often the point was lost before, for a reason that may pass."""
MAX_RETRIES = 2
"""Of a point that was lost so."""
SCREEN_ATTR = "screen"
"""Of a screen trial alone: its backbone and its number among the screen trials of that backbone, from 0."""
CONFIRM_ATTR = "confirms"
"""Of a trial that confirms another one alone: that one's number, and which of its fresh seeds this is, from 0."""
VALUES_ATTR = "repeat_values"
"""Of a trial that was trained several times: the value of each training, in their order."""
MICRO_BATCH_ATTR = "micro_batch"
"""Images at a time, of a trial alone whose batches did not fit into memory whole."""
COST_ATTR = "device_seconds"
"""What the trial took of a device, its preparation included."""
_PASSING = tuple(reason.value for reason in Reason if reason.may_pass)
_MAX_MATRIX_CLASSES = 100
"""Of more classes a whole matrix per trial would slow down every reader of the database."""


def describe_end(
    outcome: TrialOutcome, epochs: list[EpochResult], objective: str, usage: Usage | None
) -> dict[str, Any]:
    """Return the user attributes of a finished trial.

    Args:
        outcome: How it ended.
        epochs: What its epochs showed.
        objective: The study's.
        usage: What it was trained with, if that is known.
    """
    attrs: dict[str, Any] = {"feasible": not (outcome.reason and outcome.reason.infeasible)}
    if epochs:
        first = [result for result in epochs if result.repeat == 0]
        best = (min if objective == "val_loss" else max)(first, key=lambda result: result.objective_value(objective))
        attrs |= {
            "seconds": round(sum(result.seconds for result in epochs), 3),
            "images_per_second": round(sum(result.images_per_second for result in epochs) / len(epochs), 1),
            "best_epoch": best.epoch,
            "best_epoch_value": best.objective_value(objective),
            EPOCHS_ATTR: [dataclasses.asdict(result) for result in epochs],
        }
    if usage is not None:
        attrs |= {name: value for name, value in dataclasses.asdict(usage).items() if value is not None}
    if outcome.report:
        attrs["class_report"] = _describe_report(outcome.report)
    if outcome.reason:
        attrs |= {REASON_ATTR: outcome.reason.value, "message": outcome.message}
    if outcome.traceback:
        attrs["traceback"] = outcome.traceback
    return attrs


def _describe_report(report: ClassReport) -> dict[str, Any]:
    """Return a report as JSON; of many classes only the cells that hold something, as (true, predicted, count)."""
    described = dataclasses.asdict(report)
    if len(report.recall) > _MAX_MATRIX_CLASSES:
        matrix = described.pop("confusion_matrix")
        described["confusion_cells"] = [
            (true, predicted, count) for true, row in enumerate(matrix) for predicted, count in enumerate(row) if count
        ]
    return described


def is_confirmation(trial: FrozenTrial) -> bool:
    """Whether a trial trains another one's recipe again."""
    return CONFIRM_ATTR in trial.user_attrs


def is_given_up(trial: FrozenTrial) -> bool:
    """Whether a failed trial's point is not tried again: an error repeats itself, and a loss is retried twice at most.

    One that was interrupted is tried again, and so is one that another program told without a reason.
    """
    reason = trial.user_attrs.get(REASON_ATTR)
    if reason in _PASSING:
        return int(trial.user_attrs.get(ATTEMPT_ATTR, 0)) >= MAX_RETRIES
    return reason not in (None, Reason.INTERRUPTED.value)


def count_reasons(study: optuna.Study) -> Counter[tuple[str, str]]:
    """Return how many PRUNED and FAIL trials there are by state and reason.

    Those beside the search stand apart, as ``screen FAIL`` and ``confirmation FAIL``.
    """
    return Counter(
        (
            _name_kind(trial) + trial.state.name,
            trial.user_attrs.get(REASON_ATTR, Reason.INTERRUPTED.value),
        )
        for trial in study.get_trials(deepcopy=False)
        if trial.state in {OptunaState.PRUNED, OptunaState.FAIL}
    )


def _name_kind(trial: FrozenTrial) -> str:
    if is_confirmation(trial):
        return "confirmation "
    return "screen " if SCREEN_ATTR in trial.user_attrs else ""
