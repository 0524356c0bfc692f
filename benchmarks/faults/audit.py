"""Hold a database to account: against what workers logged before they sent it, and against what the user was shown.

What must be in the file after a kill: every end of a trial that was shown, and every end whose worker was given other
trials afterwards. What a worker had only sent may be lost with the kill, and is then trained again.
"""

import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.faults.stored import FINISHED, StoredStudy, StoredTrial

_EPOCH = re.compile(r"trial (\d+) epoch (\d+) value (\S+)")
_END = re.compile(r"trial (\d+) ended (\S+) (\S+)")
_CHECKPOINT = re.compile(r"trial-(\d+)\.pt")
_LOST_REASONS = ("worker_lost", "stalled", "cohort_lost", "unreadable", "interrupted")
_PASSING_REASONS = ("worker_lost", "stalled", "cohort_lost", "unreadable")
_MAX_RETRIES = 2
KINDS = (
    "lost",
    "told twice",
    "zombie",
    "corrupt",
    "wrong value",
    "wrong count",
    "retried too often",
    "half file",
    "left file",
)


@dataclass(frozen=True, kw_only=True)
class End:
    """How a trial ended, as somebody said it; only a completed one has a value."""

    state: str
    value: float | None


@dataclass(kw_only=True)
class Training:
    """One training of one trial, as its worker logged it."""

    epochs: dict[int, float] = field(default_factory=dict)
    end: End | None = None
    is_acknowledged: bool = False
    """Whether the worker was given other trials after the end."""


@dataclass(frozen=True, kw_only=True)
class Finding:
    """Something that must not be."""

    kind: str
    text: str


def read_end(line: str) -> tuple[int, End] | None:
    """Return the trial's number and its end, if the line tells one."""
    if not (match := _END.fullmatch(line)):
        return None
    value = None if match[3] == "-" else float(match[3])
    return int(match[1]), End(state=match[2], value=value)


def read_worker_log(path: Path) -> dict[int, Training]:
    """Read what one worker trained."""
    trainings: dict[int, Training] = defaultdict(Training)
    for line in path.read_text(encoding="ascii").splitlines():
        if match := _EPOCH.fullmatch(line):
            trainings[int(match[1])].epochs[int(match[2])] = float(match[3])
        elif told := read_end(line):
            trainings[told[0]].end = told[1]
        elif line.startswith("received "):
            for training in trainings.values():
                training.is_acknowledged = training.end is not None
    return trainings


class Audit:
    """What is known of one study, over all its runs. Mutable."""

    def __init__(self, *, n_trials: int) -> None:
        self._n_trials = n_trials
        self._trainings: dict[int, list[Training]] = defaultdict(list)
        self._claims: dict[int, End] = {}
        self._finished: dict[int, StoredTrial] = {}
        self._was_torn = False
        self.n_undone = 0
        """Ends that a torn WAL took back."""
        self.findings: list[Finding] = []

    def _find(self, kind: str, text: str) -> None:
        finding = Finding(kind=kind, text=text)
        if finding not in self.findings:
            self.findings.append(finding)

    # --- what was said ---

    def hear(self, worker_logs: Iterable[Path], shown: Iterable[str]) -> None:
        """Take in what the workers of one run logged, and what that run showed."""
        for path in worker_logs:
            for number, training in read_worker_log(path).items():
                self._trainings[number].append(training)
                if training.end and training.is_acknowledged:
                    self._claim(number, training.end)
        told = [end for end in map(read_end, shown) if end]
        for number, count in Counter(number for number, _ in told).items():
            if count > 1:
                self._find("told twice", f"trial {number} was shown {count} times in one run")
        for number, end in told:
            self._claim(number, end)

    def _claim(self, number: int, end: End) -> None:
        """Keep that an end is in the file; another one than before, or one already seen in it, was told twice."""
        if self._claims.setdefault(number, end) != end:
            self._find("told twice", f"trial {number} ended as {self._claims[number]} and as {end}")
        if number in self._finished:
            self._find("told twice", f"trial {number} ended again, as {end}")

    # --- what is in the file ---

    def accept_loss(self, stored: StoredStudy) -> None:
        """Take back what a torn WAL no longer holds: the last commits may go, and nothing else."""
        self._was_torn = True
        there = {trial.number: trial for trial in stored.trials if trial.state in FINISHED}
        self.n_undone += len(self._claims.keys() - there.keys())
        self._claims = {number: end for number, end in self._claims.items() if number in there}
        self._finished = {number: trial for number, trial in self._finished.items() if number in there}

    def check(self, stored: StoredStudy) -> None:
        """Check the file as a kill, or an end, left it."""
        if stored.integrity != "ok":
            self._find("corrupt", stored.integrity)
            return
        self._check_numbers(stored)
        by_number = {trial.number: trial for trial in stored.trials}
        for number, end in self._claims.items():
            self._check_claim(number, end, by_number.get(number))
        for number, before in self._finished.items():
            now = by_number.get(number)
            if now is None:
                self._find("lost", f"trial {number} was in the file and is not")
            elif now != before:
                self._find("told twice", f"trial {number} changed after its end: {before} is now {now}")
        for trial in stored.trials:
            if trial.state in FINISHED:
                self._check_source(trial)
                self._finished.setdefault(trial.number, trial)

    def _check_numbers(self, stored: StoredStudy) -> None:
        numbers = [trial.number for trial in stored.trials]
        for number, count in Counter(numbers).items():
            if count > 1:
                self._find("told twice", f"{count} trials have the number {number}")
        if set(numbers) != set(range(len(set(numbers)))):
            self._find("lost", f"trials must be numbered without gaps, got {sorted(numbers)}")
        for number, n_ends in stored.n_ends.items():
            if n_ends > 1:
                self._find("told twice", f"trial {number} was given a finished state {n_ends} times")

    def _check_claim(self, number: int, end: End, trial: StoredTrial | None) -> None:
        if trial is None or trial.state not in FINISHED:
            self._find("lost", f"trial {number} ended as {end}, but is {trial.state if trial else 'missing'}")
        elif trial.state != end.state or (end.value is not None and trial.values != (end.value,)):
            self._find("wrong value", f"trial {number} ended as {end}, but is {trial}")

    def _check_source(self, trial: StoredTrial) -> None:
        """Check that one training, as its worker logged it, gave all that the file says of a trial."""
        trainings = self._trainings[trial.number]
        reason = trial.attrs.get("reason")
        if trial.completed is None:
            self._find("wrong value", f"trial {trial.number} is {trial.state} without a time")
        if reason in _LOST_REASONS:
            is_known = not trial.epochs or any(trial.epochs.items() <= each.epochs.items() for each in trainings)
        else:
            is_known = any(_gave(each, trial) for each in trainings)
        if not is_known:
            self._find("wrong value", f"no worker logged what the file says of {trial}, but {trainings}")

    def check_end(self, stored: StoredStudy) -> None:
        """Check the file of a study that is finished."""
        self.check(stored)
        self.check_open(stored, may_wait=False)
        if stored.n_counted != self._n_trials:
            problem = f"{self._n_trials} trials were asked for, {stored.n_counted} are complete or pruned"
            self._find("wrong count", problem)
        by_number = {trial.number: trial for trial in stored.trials}
        for trial in stored.trials:
            if (n_retries := _count_retries(trial, by_number)) > _MAX_RETRIES:
                self._find("retried too often", f"trial {trial.number} is retry {n_retries} of what was lost")

    def check_open(self, stored: StoredStudy, *, may_wait: bool) -> None:
        """Check that a study with no run under way has nothing running.

        Args:
            stored: The study.
            may_wait: Whether its queue may hold anything; else only what a kill interrupted.
        """
        by_number = {trial.number: trial for trial in stored.trials}
        for trial in stored.trials:
            earlier = by_number.get(trial.attrs.get("retry_of", -1))
            was_interrupted = earlier is not None and earlier.attrs.get("reason") == "interrupted"
            may_be_open = trial.state == "WAITING" and (may_wait or was_interrupted)
            if trial.state not in FINISHED and not may_be_open:
                self._find("zombie", f"trial {trial.number} is {trial.state} after the end")

    def check_kept(self, stored: StoredStudy, models: Path, checkpoints: Path) -> None:
        """Check what a study that is finished keeps: the best trial's model, and the checkpoints of what waits.

        After a torn WAL the best trial may be one whose model is gone, since a better one's end was in the file before.
        """
        waiting = [trial for trial in stored.trials if trial.state == "WAITING"]
        origins = {trial.attrs.get("first_attempt", trial.number) for trial in waiting}
        for path in sorted(checkpoints.rglob("*")):
            if (match := _CHECKPOINT.fullmatch(path.name)) and int(match[1]) not in origins:
                self._find("left file", f"the checkpoint {path.name} is left")
        complete = [trial for trial in stored.trials if trial.state == "COMPLETE"]
        best = max(complete, key=lambda trial: (trial.values, -trial.number), default=None)
        kept = sorted(path.name for path in models.glob("*/trial-*"))
        if best and kept != [f"trial-{best.number}"] and not (self._was_torn and not kept):
            self._find("left file", f"of the models only trial {best.number}'s must be kept, got {kept}")

    def check_files(self, *folders: Path) -> None:
        """Check that nothing half written is left."""
        for folder in folders:
            for path in folder.rglob("*"):
                if path.name.endswith((".tmp", ".old", ".new")) or path.name.startswith(".trial-"):
                    self._find("half file", f"{path.relative_to(folder.parent)} is left")


def _gave(training: Training, trial: StoredTrial) -> bool:
    """Whether a training gave a trial all its epochs, its state and, if it completed, its last value."""
    if training.end is None or training.end.state != trial.state or training.epochs != trial.epochs:
        return False
    last = tuple(training.epochs[step] for step in sorted(training.epochs)[-1:])
    if trial.state != "COMPLETE":
        return not trial.values or trial.values == last
    return trial.values == (training.end.value,) == last


def _count_retries(trial: StoredTrial, by_number: dict[int, StoredTrial]) -> int:
    """Return how many attempts at a trial's point a fault has ended that was nobody's wish."""
    count = 0
    while (earlier := by_number.get(trial.attrs.get("retry_of", -1))) is not None:
        count += earlier.attrs.get("reason") in _PASSING_REASONS
        trial = earlier
    return count
