"""One study struck until its faults are spent, then left to finish, and audited after each of its runs."""

import os
import random
import signal
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from sqlite3 import OperationalError

from benchmarks.faults.audit import Audit, Finding
from benchmarks.faults.forge import list_seen
from benchmarks.faults.processes import Place, Run
from benchmarks.faults.schedule import Damage, RunFaults, draw_faults
from benchmarks.faults.stored import StoredStudy, add_triggers, copied, read_stored
from tuner.errors import EXIT_SIGTERM, SearchError

_LIMIT_SECONDS = 300.0
_MAX_RUNS = 60
_N_LOSSES = 3
"""Idle workers that a run must lose in a row before it may give up."""
_N_FAILED = 5
"""Trials that must fail in a row before it may."""


@dataclass(kw_only=True)
class Outcome:
    """What became of one study, or of many."""

    struck: Counter[str] = field(default_factory=Counter)
    """Faults by kind."""
    n_studies: int = 0
    n_runs: int = 0
    n_trials: int = 0
    """COMPLETE, PRUNED and FAIL."""
    n_undone: int = 0
    n_resumed: int = 0
    """Trials that went on from a checkpoint."""
    n_given_up: int = 0
    """Runs that ended by themselves after too many losses, and said so."""
    n_tidied: int = 0
    """Killed runs that were started again with so few trials that nothing was left to run."""
    seconds: float = 0.0
    findings: list[str] = field(default_factory=list)
    kinds: Counter[str] = field(default_factory=Counter)
    """Findings by kind."""
    seen: Counter[str] = field(default_factory=Counter)
    """In how many sound studies the audit saw each forgery."""

    @property
    def n_kills(self) -> int:
        """SIGKILLs that struck: of a worker, of the process that forks them, of the coordinator, of both."""
        return sum(count for kind, count in self.struck.items() if kind.startswith("kill "))

    def add(self, other: "Outcome") -> None:
        """Take in another study's outcome."""
        self.struck += other.struck
        self.n_studies += other.n_studies
        self.n_runs += other.n_runs
        self.n_trials += other.n_trials
        self.n_undone += other.n_undone
        self.n_resumed += other.n_resumed
        self.n_given_up += other.n_given_up
        self.n_tidied += other.n_tidied
        self.seconds += other.seconds
        self.findings += other.findings
        self.kinds += other.kinds
        self.seen += other.seen


def strike_study(
    place: Place, source: random.Random, *, n_trials: int, max_kills: int, slowness: float = 1.0
) -> Outcome:
    """Run a study under faults to its end.

    Args:
        place: Holds the study file.
        source: Of all that is random here.
        n_trials: As in the study file.
        max_kills: After these a run is left alone.
        slowness: As for ``draw_faults``.
    """
    study = Study(place, source, n_trials=n_trials)
    while study.outcome.n_kills < max_kills and study.outcome.n_runs < _MAX_RUNS:
        if study.run(draw_faults(source, slowness=slowness)):
            break
        study.run_with_fewer_trials()
    else:
        study.run(RunFaults(tickets=(), actions=(), damage="none"))
    return study.conclude()


class Study:
    """A study under fault. Mutable."""

    def __init__(self, place: Place, source: random.Random, *, n_trials: int) -> None:
        self._place, self._source = place, source
        self._audit = Audit(n_trials=n_trials)
        self._has_triggers = False
        self._is_over = False
        self._damaged: dict[Path, bytes] = {}
        self.outcome = Outcome(n_studies=1)

    def run(self, faults: RunFaults) -> bool:
        """Run once; return whether the study is finished."""
        run = Run(self._place, self.outcome.n_runs, faults.tickets)
        for action in faults.actions:
            self._add_triggers()
            run.wait_for(action)
            run.strike(action, self._source.randrange(100))
        if not faults.actions:
            self._add_triggers()
        self._end(run)
        self._check_exit(run)
        self.check_damaged(run.worker_logs)
        self._audit.hear(run.worker_logs, run.lines)
        self._is_over = run.process.returncode == 0
        self._look()
        if not self._is_over:
            self.damage(faults.damage)
        return self._is_over

    def _end(self, run: Run) -> None:
        n_left = run.end(_LIMIT_SECONDS)
        self.outcome.n_runs += 1
        self.outcome.struck += run.struck
        self.outcome.n_resumed += run.n_resumed
        if n_left:
            self._find("left process", f"{n_left} in run {run.name}")

    def run_with_fewer_trials(self) -> None:
        """Once after a kill that left a trial running, run for as many trials as there are: all is only tidied up."""
        with copied(self._place.database) as copy:
            stored = read_stored(copy)
        states = {trial.state for trial in stored.trials}
        if self.outcome.n_tidied or not {"RUNNING", "COMPLETE"} <= states or stored.n_counted == 0:
            return
        run = Run(self._place, self.outcome.n_runs, n_trials=stored.n_counted)
        self._end(run)
        self.outcome.n_tidied += 1
        if run.process.returncode != 0 or run.worker_logs:
            self._find("wrong end", f"exit code {run.process.returncode} in run {run.name}: {run.lines[-12:]}")
        with copied(self._place.database) as copy:
            stored = read_stored(copy)
        self._audit.check(stored)
        self._audit.check_open(stored, may_wait=True)
        self._check_files(stored)

    def _add_triggers(self) -> None:
        """Let the database keep a history, as soon as it is there."""
        if not self._has_triggers and self._place.database.exists():
            with suppress(OperationalError):  # locked for long
                add_triggers(self._place.database)
                self._has_triggers = True

    def _look(self) -> None:
        with copied(self._place.database) as copy:
            self._audit.check(read_stored(copy))

    def _check_exit(self, run: Run) -> None:
        """Check that a run ended by itself only as it may."""
        code, struck = run.process.returncode, run.struck
        allowed = {0}
        if any("coordinator" in kind or "both" in kind for kind in struck):
            allowed.add(-signal.SIGKILL)
        if struck["SIGTERM"]:
            allowed |= {EXIT_SIGTERM, -signal.SIGTERM}
        if code == SearchError.exit_code and may_give_up(run.lines, struck):
            self.outcome.n_given_up += 1
        elif code not in allowed:
            self._find("wrong end", f"exit code {code} in run {run.name} after {dict(struck)}: {run.lines[-12:]}")

    def damage(self, damage: Damage) -> None:
        """Damage files that no process has open."""
        wal = self._place.database.with_name(f"{self._place.database.name}-wal")
        size = wal.stat().st_size if wal.exists() else 0
        match damage:
            case "WAL with garbage behind it" if size:
                with wal.open("ab") as file:
                    file.write(self._source.randbytes(self._source.randint(1, 9000)))
            case "torn WAL" if size:
                _tear(wal, size, self._source)
                with copied(self._place.database) as copy:
                    self._audit.accept_loss(read_stored(copy))
            case "damaged cache" if files := sorted(self._place.cache.rglob("*.npy")):
                path = self._source.choice(files)
                _break_file(path, self._source)
                self._damaged[path] = path.read_bytes()
            case _:
                return
        self.outcome.struck[damage] += 1
        self._look()

    def check_damaged(self, worker_logs: Iterable[Path]) -> None:
        """Check that workers which trained have noticed damaged pixels, and made them anew; features may lie unused."""
        if not any("received " in log.read_text(encoding="ascii") for log in worker_logs):
            return
        for path, content in self._damaged.items():
            if path.parent.name == "pixels" and path.exists() and path.read_bytes() == content:
                self._find("used damaged cache", path.name)
        self._damaged.clear()

    def conclude(self) -> Outcome:
        """Audit the study once it is finished; return what became of it."""
        if not self._is_over:
            self._find("wrong end", f"not finished after {self.outcome.n_runs} runs")
        stored = read_stored(self._place.database)
        self._audit.check_end(stored)
        self._check_files(stored)
        self.outcome.n_trials = len(stored.trials)
        self.outcome.n_undone = self._audit.n_undone
        for finding in self._audit.findings:
            self._keep(finding)
        if not self.outcome.findings:
            self.outcome.seen.update(list_seen(self._audit, self._place.database))
        return self.outcome

    def _check_files(self, stored: StoredStudy) -> None:
        database = self._place.database
        models, checkpoints = (database.with_name(f"{database.name}.{what}") for what in ("models", "checkpoints"))
        self._audit.check_kept(stored, models, checkpoints)
        self._audit.check_files(models, checkpoints, self._place.cache)

    def _find(self, kind: str, text: str) -> None:
        self._keep(Finding(kind=kind, text=text))

    def _keep(self, finding: Finding) -> None:
        self.outcome.kinds[finding.kind] += 1
        self.outcome.findings.append(f"{self._place.folder.name}: {finding.kind}: {finding.text}"[:2000])


def may_give_up(lines: Sequence[str], struck: Mapping[str, int]) -> bool:
    """Whether a run that ended as hopeless says so, and for a reason that it had.

    Args:
        lines: What it printed.
        struck: Faults by kind.
    """
    last = next((line for line in reversed(lines) if line.startswith("error: ")), "")
    if last.startswith("error: workers: must be able to start and prepare the study"):
        n_lost = sum(count for kind, count in struck.items() if "worker" in kind or "server" in kind)
        # A busy machine may keep workers silent for longer than they may be, without any fault.
        return n_lost >= _N_LOSSES or any("said nothing for" in line for line in lines)
    if "trials failed in a row" in last:
        return sum(" ended FAIL" in line for line in lines) >= _N_FAILED
    return False


def _tear(wal: Path, size: int, source: random.Random) -> None:
    """Cut a WAL's end off, or garble some bytes near it."""
    back = min(size - 1, source.randint(1, 3 * 4120))
    if source.random() < 0.5:
        os.truncate(wal, size - back)
        return
    with wal.open("r+b") as file:
        file.seek(size - back)
        file.write(source.randbytes(min(back, 64)))


def _break_file(path: Path, source: random.Random) -> None:
    """Truncate a file, or turn one of its bits."""
    size = path.stat().st_size
    if source.random() < 0.5:
        os.truncate(path, source.randrange(size))
        return
    place = source.randrange(size)
    with path.open("r+b") as file:
        file.seek(place)
        byte = file.read(1)[0]
        file.seek(place)
        file.write(bytes([byte ^ 1 << source.randrange(8)]))
