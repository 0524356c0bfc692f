"""The figures of a report: how a search went, what mattered, and what it cost."""

from collections.abc import Sequence

import numpy as np
import optuna
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import FrozenTrial, TrialState

from tuner.search.ledger import Ledger
from tuner.search.trial_attrs import COST_ATTR, is_confirmation

_SEED = 0
_COLOURS = {TrialState.COMPLETE: "tab:blue", TrialState.PRUNED: "0.7", TrialState.FAIL: "tab:red"}


def draw_history(trials: Sequence[FrozenTrial], objective: str) -> Figure:
    """Draw the value of each completed trial, and the best so far.

    Args:
        trials: Of the study, at least one of them completed.
        objective: Its name.
    """
    done = [trial for trial in trials if trial.state == TrialState.COMPLETE]
    own = [trial for trial in done if not is_confirmation(trial)]
    figure, axes = _start(objective, "trial")
    values = [trial.value or 0.0 for trial in own]
    best = (np.minimum if objective == "val_loss" else np.maximum).accumulate(values)
    axes.plot([trial.number for trial in own], values, ".", label="search")
    axes.step([trial.number for trial in own], best, where="post", color="tab:blue", linewidth=1, label="best so far")
    if confirming := [trial for trial in done if is_confirmation(trial)]:
        confirmed = [trial.value or 0.0 for trial in confirming]
        axes.plot([trial.number for trial in confirming], confirmed, "x", label="confirmation")
    axes.legend(fontsize=8)
    return figure


def draw_curves(trials: Sequence[FrozenTrial], objective: str, best: int) -> Figure:
    """Draw the objective after each epoch of every trial's first training.

    Args:
        trials: Of the search.
        objective: Its name.
        best: Number of the trial to stand out.
    """
    figure, axes = _start(objective, "epoch")
    for trial in trials:
        if curve := trial.intermediate_values:
            (line,) = axes.plot(list(curve), list(curve.values()), color=_COLOURS.get(trial.state, "0.7"))
            line.set(linewidth=0.7, alpha=0.5)
            if trial.number == best:
                line.set(color="tab:orange", linewidth=2, alpha=1, zorder=3)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title(f"orange: trial {best}; grey: pruned", fontsize=9)
    return figure


def measure_importances(study: optuna.Study) -> dict[str, float]:
    """Return how much of the values' spread each param explains (fANOVA), the most first; confirmations left out.

    Returns:
        Nothing where trials are too few or too alike to say.
    """
    apart = optuna.create_study(direction=study.direction)
    apart.add_trials(
        [
            trial
            for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))
            if not is_confirmation(trial)
        ]
    )
    try:
        return get_param_importances(apart, evaluator=FanovaImportanceEvaluator(seed=_SEED))
    except (RuntimeError, ValueError):  # fewer than two trials, or all of one value
        return {}


def draw_importances(importances: dict[str, float]) -> Figure:
    """Draw the importance of each param.

    Args:
        importances: Of ``measure_importances``, not empty.
    """
    figure = Figure(figsize=(6, 0.8 + 0.35 * len(importances)), layout="constrained")
    axes = figure.subplots()
    names = list(importances)[::-1]
    axes.barh(names, [importances[name] for name in names])
    axes.set_xlabel("share of the spread explained (fANOVA)")
    axes.set_xlim(0, 1)
    return figure


def draw_costs(trials: Sequence[FrozenTrial], objective: str) -> Figure:
    """Draw value against cost: what is to the upper left is cheap and good.

    Args:
        trials: Of the search, at least one of them completed.
        objective: Its name.
    """
    figure, axes = _start(objective, "device-seconds of the trial")
    for state in (TrialState.COMPLETE, TrialState.PRUNED):
        shown = [trial for trial in trials if trial.state == state and trial.intermediate_values]
        costs = [max(1e-2, float(trial.user_attrs.get(COST_ATTR, 0.0))) for trial in shown]
        values = [
            list(trial.intermediate_values.values())[-1] if trial.value is None else trial.value for trial in shown
        ]
        axes.plot(costs, values, ".", color=_COLOURS[state], label=state.name.lower())
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter("{x:g}")  # plain numbers: matplotlib would write powers in its own markup
    axes.xaxis.set_minor_formatter("")
    axes.legend(fontsize=8)
    return figure


def draw_ledger(ledger: Ledger) -> Figure:
    """Draw what device time went into."""
    items = {name: value for name, value in ledger.to_json().items() if name not in {"held", "wall"} and value > 0}
    figure = Figure(figsize=(6, 0.8 + 0.35 * len(items)), layout="constrained")
    axes = figure.subplots()
    axes.barh(list(items)[::-1], list(items.values())[::-1], color="0.5")
    axes.set_xlabel("device-seconds")
    return figure


def _start(objective: str, x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6, 3.4), layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x_label)
    axes.set_ylabel(objective)
    axes.grid(color="0.93")
    return figure, axes
