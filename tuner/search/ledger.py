"""The bill of a study: seconds of devices by what they went into, over all runs."""

from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import optuna
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from tuner.search.trial_attrs import COST_ATTR, EPOCHS_ATTR, REASON_ATTR, is_confirmation
from tuner.spec.durations import format_seconds
from tuner.trial import Reason

RUNS_ATTR = "tuner:runs"
"""User attribute of the study: a list of ``RunCost`` as JSON, the oldest first."""
RETRAINS_ATTR = "tuner:retrains"
"""User attribute of the study: device-seconds of each retraining, the oldest first."""


@dataclass(frozen=True, kw_only=True)
class RunCost:
    """What one run of a study has held."""

    started: str
    """UTC."""
    wall_seconds: float
    n_devices: float
    """Held: GPUs, or CPU cores."""
    build_seconds: float
    """Of devices: decoding images, fetching or pretraining weights, probing how many workers share a device."""
    per_device: int | None = None
    """Workers on each device, where a probe chose their number."""
    probed_speeds: Sequence[float] = ()
    """Images per second that one worker, two workers and so on trained together in that probe."""

    @property
    def device_seconds(self) -> float:
        """All that was held, whether it worked or waited."""
        return self.wall_seconds * self.n_devices


@dataclass(frozen=True, kw_only=True)
class Ledger:
    """Device-seconds of a study."""

    build: float = 0.0
    """Decoding images, fetching or pretraining weights."""
    train: float = 0.0
    """Completed trials of the search, but for what validation took."""
    evaluate: float = 0.0
    """Their validation, by its share of their epochs."""
    pruned: float = 0.0
    """Trials that the pruner ended."""
    failed: float = 0.0
    """Trials that failed, diverged, ran out of memory or time, or were interrupted."""
    confirm: float = 0.0
    idle: float = 0.0
    """Held without a job: starting up, waiting for the last trials of others."""
    retrain: float = 0.0
    """By ``tuner train``, which no budget covers."""
    wall: float = 0.0
    """Seconds on the clock, of all runs; not part of the sum."""

    @property
    def held(self) -> float:
        """All that runs held of devices: what a budget of device time is spent on."""
        return self.build + self.train + self.evaluate + self.pruned + self.failed + self.confirm + self.idle

    def to_json(self) -> dict[str, float]:
        """Return the ledger as a JSON object."""
        return {name: round(value, 1) for name, value in asdict(self).items()} | {"held": round(self.held, 1)}


def read_ledger(study: optuna.Study) -> Ledger:
    """Add up what is stored with a study and its trials.

    Raises:
        KeyError, TypeError, ValueError: If it cannot be read; ``explain_damage`` says so in a user's words.
    """
    attrs = study.user_attrs
    runs = read_runs(attrs)
    parts = dict.fromkeys(("train", "evaluate", "pruned", "failed", "confirm"), 0.0)
    for trial in study.get_trials(deepcopy=False):
        for name, seconds in _bill(trial):
            parts[name] += seconds
    build = sum(run.build_seconds for run in runs)
    held = sum(run.device_seconds for run in runs)
    # A killed run wrote what it held a little before its end, so trials may have taken more than it says.
    idle = max(0.0, held - build - sum(parts.values()))
    retrain = float(sum(attrs.get(RETRAINS_ATTR, [])))
    return Ledger(build=build, idle=idle, retrain=retrain, wall=sum(run.wall_seconds for run in runs), **parts)


def read_runs(attrs: dict[str, Any]) -> list[RunCost]:
    """Return what each run has held."""
    return [RunCost(**run) for run in attrs.get(RUNS_ATTR, [])]


def _bill(trial: FrozenTrial) -> Iterable[tuple[str, float]]:
    """Return what a trial took, by what it went into."""
    seconds = float(trial.user_attrs.get(COST_ATTR, 0.0))
    if is_confirmation(trial):
        return [("confirm", seconds)]
    if trial.state == OptunaState.COMPLETE:
        epochs = trial.user_attrs.get(EPOCHS_ATTR, [])
        whole = sum(epoch["seconds"] for epoch in epochs)
        share = sum(epoch.get("val_seconds", 0.0) for epoch in epochs) / whole if whole else 0.0
        return [("train", seconds * (1 - share)), ("evaluate", seconds * share)]
    was_pruned = trial.user_attrs.get(REASON_ATTR) == Reason.PRUNER.value
    return [("pruned" if was_pruned else "failed", seconds)]


def describe_ledger(ledger: Ledger) -> str:
    """Return a bill for a person, in one line."""
    items = (
        ("build", ledger.build),
        ("train", ledger.train),
        ("evaluate", ledger.evaluate),
        ("pruned", ledger.pruned),
        ("failed", ledger.failed),
        ("confirm", ledger.confirm),
        ("idle", ledger.idle),
    )
    listed = ", ".join(f"{name} {format_seconds(seconds)}" for name, seconds in items if seconds >= 0.5)
    retrain = f"; retrain {format_seconds(ledger.retrain)}" if ledger.retrain else ""
    return f"device time: {format_seconds(ledger.held)} ({listed}) in {format_seconds(ledger.wall)}{retrain}"
